"""Where tokens look: what attention gives to every token, read off inside the blocks.

The MMDiT does not know of it: a block is handed what it calls for attention, and here that listens
first. So what is measured are the queries and keys that were there, whatever the block has become;
and of L x L no more is ever held than the scores of some queries.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.model.ops import attention
from vcloze_jax.placement import TEXT, kind_of
from vcloze_jax.sharding import on_host, spread

CHUNK = 256  # queries at once
CONDITIONS_OF, TARGET_OF = "conditions of example {}", "target of example {}"
QUERY, TARGET = "the query's conditions", "the target itself"
NAMES = "text", CONDITIONS_OF, TARGET_OF, QUERY, TARGET  # of placement.SEGMENTS


def attention_heat(q, k, queries, lengths=None, chunk=CHUNK):
    """How much the tokens `queries`, int [Q], attend to every token, in the mean over them and over
    heads: float32 [B, L], whose sum over L is one. q, k [B, L, H, K] as attention gets them."""
    B, L, H, K = q.shape
    real = None if lengths is None else jnp.arange(L) < lengths[:, None, None, None]  # B 1 1 L
    total = jnp.zeros((B, L), jnp.float32)
    for start in range(0, len(queries), chunk):
        part = q[:, queries[start : start + chunk]]  # B Q H K
        scores = jnp.einsum("bqhk,blhk->bhql", part, k, preferred_element_type=jnp.float32)
        scores = scores * K**-0.5
        if real is not None:
            scores = jnp.where(real, scores, -jnp.inf)
        total += jax.nn.softmax(scores).sum((1, 2))
    return total / (H * len(queries))


def hear_blocks(flux, img, txt, mod, pe, lengths, *, hear):
    """As Flux.__call__ -> velocity [B, S, 64], and what `hear` says of each block, the double
    blocks first: [blocks, …]."""

    def attend(q, k, v):
        return attention(q, k, v, lengths), hear(q, k, lengths=lengths)

    x, heard = flux.run_blocks(flux.img_in(img), flux.txt_in(txt), mod, pe, attend)
    return flux.final(x[:, txt.shape[1] :], mod.final), jnp.concatenate(heard)


def look(flux, x, mod, context, *, queries):
    """Heat float32 [blocks, B, T + S] of the tokens `queries`, int [Q], at noisy tokens x."""
    img = jnp.concatenate([x.astype(context.condition.dtype), context.condition], -1)
    args = flux, img, context.txt, mod, context.pe, context.lengths
    return hear_blocks(*args, hear=partial(attention_heat, queries=queries))[1]


class Onlooker:
    """What a Painter tells of its steps to: it looks where tokens `queries` of grids of one shape
    look before each, and keeps that in `heat`, [steps][blocks, B, T + bucket] for every batch."""

    def __init__(self, painter, queries):
        self.painter, self.heat = painter, []
        self.look = jax.jit(partial(look, queries=queries))

    def __call__(self, canvases, i, before, _):
        flux = self.painter.models.flux
        if i == 0:
            batch = canvases + canvases[-1:] * (len(before) - len(canvases))
            _, times, self.context = self.painter.stack(batch, before.shape[1])
            told = self.context.guidance, self.context.pooled
            self.mods = self.painter.modulate_steps(flux, times, *told), times
            self.heat.append([])
        mod, *_ = self.painter.select_step(*self.mods, i)
        heat = on_host(self.look(flux, spread(before, self.painter.mesh), mod, self.context))
        self.heat[-1].append(heat[:, : len(canvases)])


def paint_and_look(painter, specs, bar):
    """Paint Specs of one shape -> their Canvases, and where the tokens of the target, as
    `segment_tokens` has it, look at every step: float32 [steps, blocks, N, T + S]."""
    names, segments = segment_tokens(specs[0].grid, painter.preset.t5.max_length)
    onlooker = Onlooker(painter, np.flatnonzero(segments == names.index(TARGET)))
    canvases = painter(specs, bar, onlooker)
    heat = np.concatenate([np.stack(steps) for steps in onlooker.heat], 2)
    return canvases, heat[..., : len(segments)]


def segment_tokens(grid, text_tokens):
    """Names of the segments of text and grid, by their number, and of which each token is, int
    [T + S]: text, of each example its conditions and its target, the query's, its target."""
    numbers = np.concatenate([np.full(text_tokens, TEXT), grid.segments()])
    found, segments = np.unique(numbers, return_inverse=True)
    return [NAMES[kind_of(n)].format(n // len(NAMES) + 1) for n in found], segments


def segment_masses(heat, segments):
    """How much of the attention goes to each segment, [..., T + S] -> [..., segments]; the sum over
    them is that of the heat, one."""
    return heat @ np.eye(segments.max() + 1, dtype=heat.dtype)[segments]
