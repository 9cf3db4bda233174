"""Clean references once: where they see nobody but each other, and are told time 0, their keys and
values are the same at all Euler steps. They are computed before the first one, and each step asks
the MMDiT of its own tokens alone, which see them, too.

It is exact, and for sampling alone: training, which knows no second step, asks of all tokens under
a mask. Kept keys are padded to one length for all grids; which are real is told to the attention
as it is for padded tokens, by a bias on a GPU, by segment ids on a TPU. FLUX.2's klein does the
same (huggingface/diffusers:src/diffusers/models/transformers/transformer_flux2.py, Flux2KVCache).
"""

from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vcloze_jax import flow
from vcloze_jax.conditioning import Context, velocity
from vcloze_jax.grid import bucket
from vcloze_jax.model.mmdit import Flux, Modulation
from vcloze_jax.model.ops import attention
from vcloze_jax.painter import Painter
from vcloze_jax.placement import ALL, kind_of
from vcloze_jax.sharding import batch_sharding
from vcloze_jax.storage.weights import abstract


def are_constant(placement):
    """Whether what is clean in a Placement is the same at all steps, and all else sees it, told t:
    two kinds of tokens, of which each is FLUX without a mask, by one vector."""
    alone = "".join("01"[clean] for clean in placement.clean)
    kinds = zip(placement.clean, placement.time, placement.branch, placement.attends, strict=True)
    two = {(True, "0", "mod", alone), (False, "t", "mod", ALL[0])}
    return set(kinds) == two and not placement.embeds


class Prepared(NamedTuple):
    """What steps read of a batch: N of its S tokens move, C are references, both padded right."""

    context: Context  # of the text and what moves
    places: jax.Array  # int32 [B, N], where that is among the S; S if it is padding
    real: jax.Array  # bool [B, 1, T + N + C], what is no padding
    kept: tuple  # keys, turned by their positions, and values: [double, B, C, H, K], [single, …]


def prepare_parts(flux, x, context, sizes):
    """Tokens x [B, S, 64] and their Context -> Prepared, what moves padded to the first of the two
    `sizes`, references to the other."""
    (B, S, _), T = x.shape, context.txt.shape[1]
    clean = jnp.asarray(flux.config.placement.clean)[kind_of(context.segments)]  # B S
    is_real = jnp.arange(S) < context.lengths[:, None] - T
    moving, given = find(~clean & is_real, sizes[0]), find(clean & is_real, sizes[1])
    real = jnp.concatenate([jnp.ones((B, T), bool), moving < S, given < S], 1)[:, None]
    silent = context._replace(txt=context.txt[:, :0], pe=tuple(a[:, T:] for a in context.pe))
    kept = keep(flux, pick(x, given), choose(silent, given))
    return Prepared(choose(context, moving), moving, real, kept)


def keep(flux, x, context):
    """Keys and values that all layers have of references x [B, C, 64]: at time 0, without text."""

    def attend(q, k, v):
        return attention(q, k, v, context.lengths), (k, v)

    mod = flux.modulation(jnp.zeros_like(context.guidance), context.guidance, context.pooled)
    img, txt = flux.img_in(enter_beside(x, context)), flux.txt_in(context.txt)
    return flux.run_blocks(img, txt, only(mod), context.pe, attend)[1]


def prepared_velocity(flux, x, mod, prepared):
    """`velocity` of tokens x [B, S, 64], 0 of what is clean, none of which is asked again."""
    context, places, real, kept = prepared

    def attend(q, k, v, *kept):
        k, v = (jnp.concatenate(pair, 1) for pair in zip((k, v), kept, strict=True))
        return attention(q, k, v, None, real), None

    img, txt = flux.img_in(enter_beside(pick(x, places), context)), flux.txt_in(context.txt)
    out, _ = flux.run_blocks(img, txt, mod := only(mod), context.pe, attend, kept=kept)
    out = flux.final(out[:, txt.shape[1] :], mod.final)
    samples = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x, out.dtype).at[samples, places].set(out, mode="drop")


def enter_beside(x, context):
    """Tokens x [B, n, 64] beside their condition, in its dtype."""
    return jnp.concatenate([x.astype(context.condition.dtype), context.condition], -1)


def only(mod):
    """A Modulation of several vectors -> of the first alone, by which all tokens go."""
    return Modulation(mod.img[..., 0, :], mod.txt, mod.single[..., 0, :], mod.final[..., 0, :])


def choose(context, places):
    """The Context of the text and of the tokens at `places`, int32 [B, n]; all are of one kind."""
    S, T = context.condition.shape[1], context.txt.shape[1]
    pe = tuple(jnp.concatenate([a[:, :T], pick(a[:, T:], places)], 1) for a in context.pe)
    chosen = dict(condition=pick(context.condition, places), pe=pe, segments=None)
    return context._replace(**chosen, lengths=T + (places < S).sum(1))


def find(part, size):
    """Where `part`, bool [B, S], is True, from left to right: int32 [B, size], padded with S."""
    return jax.vmap(partial(jnp.flatnonzero, size=size, fill_value=part.shape[1]))(part)


def pick(x, places):
    """Of x [B, S, …] what is at `places` [B, n]: [B, n, …], zeros where there is nothing."""
    return jax.vmap(partial(jnp.take, axis=0, mode="fill", fill_value=0))(x, places)


def take_step(flux, x, mod, context, t, t_next):
    """painter.euler_step, where the context may be Prepared."""
    ask = prepared_velocity if isinstance(context, Prepared) else velocity
    return flow.euler(x, ask(flux, x, mod, context), t, t_next)


def part_sizes(grid, preset):
    """To how many tokens those of a grid that move are padded, and its references, 0 if there are
    none or they are not constant: to as many cells as `bucket` would have pairs of them."""
    placement = preset.flux.placement
    given = np.array(placement.clean)[kind_of(grid.segments(placement))] & are_constant(placement)
    counts = int((~given).sum()), int(given.sum())
    return tuple(n and bucket(2 * n, preset.resolution) // 2 for n in counts)


@cache
def parts_flops(preset, tokens, sizes):
    """Of one grid, of so many `tokens`, padded: FLOPs of `prepare_parts`, and of a step. In float32
    and without remat, as plan.flux_flops has them, where nothing is a loop."""
    shape = lambda *sizes, dtype="float32": jax.ShapeDtypeStruct((1, *sizes), dtype)  # noqa: E731
    c, T = replace(preset.flux, remat="none"), preset.t5.max_length
    flux, x, t = nnx.merge(*abstract(Flux, c)), shape(tokens, c.out_channels), shape()
    words = shape(T, c.text_width), shape(c.vec_width)
    angles = shape(T + tokens, 1, c.head_dim // 2)
    rest = t, (angles, angles), shape(dtype="int32"), shape(tokens, dtype="int32")
    context = Context(shape(tokens, c.in_channels - c.out_channels), *words, *rest)
    mod = jax.eval_shape(Flux.modulation, flux, t, t, context.pooled)
    once = jax.jit(prepare_parts, static_argnums=3).lower(flux, x, context, sizes)
    step = jax.jit(prepared_velocity).lower(flux, x, mod, once.out_info)
    return once.cost_analysis()["flops"], step.cost_analysis()["flops"]


def kept_bytes(preset, tokens, dtype):
    """Of one grid: the keys and values that all layers have of so many tokens of references."""
    layers = preset.flux.double_blocks + preset.flux.single_blocks
    return 2 * layers * tokens * preset.flux.width * jnp.dtype(dtype).itemsize


class OncePainter(Painter):
    """A Painter in a Placement whose clean tokens `are_constant`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prepare_parts = jax.jit(prepare_parts, static_argnums=3)
        self.euler_step = jax.jit(take_step, out_shardings=batch_sharding(self.mesh))

    def batches(self, canvases):
        """As a Painter's, of grids alike in `part_sizes`, too."""
        groups = defaultdict(list)
        for canvas in canvases:
            groups[part_sizes(canvas.spec.grid, self.preset)].append(canvas)
        for group in groups.values():
            yield from super().batches(group)

    def prepare(self, batch, flux, x, context):
        sizes = part_sizes(batch[0].spec.grid, self.preset)
        return self.prepare_parts(flux, x, context, sizes) if sizes[1] else context


def choose_painter(preset):
    """The class of Painter for a preset's placement."""
    return OncePainter if are_constant(preset.flux.placement) else Painter
