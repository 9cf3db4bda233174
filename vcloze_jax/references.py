"""Clean references once: where they see nobody but each other, and are told time 0, their keys and
values are the same at all Euler steps. They are computed before the first one, and each step asks
the MMDiT of its own tokens alone, which see them, too.

It is exact, and for sampling alone: training, which knows no second step, asks of all tokens under
a mask. FLUX.2's klein does it, by other code for each of its attentions
(huggingface/diffusers:src/diffusers/models/transformers/transformer_flux2.py, Flux2KVCache).
"""

from collections import defaultdict
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax import flow
from vcloze_jax.conditioning import velocity
from vcloze_jax.grid import bucket
from vcloze_jax.model.mmdit import Modulation, near
from vcloze_jax.model.ops import attention, rope
from vcloze_jax.painter import Painter
from vcloze_jax.placement import ALL
from vcloze_jax.sharding import batch_sharding


def are_constant(placement):
    """Whether what is clean in a Placement is the same at all steps, and all else sees it, told t:
    two kinds of tokens, of which each is FLUX without a mask, by one vector."""
    alone = "".join("01"[clean] for clean in placement.clean)
    kinds = zip(placement.clean, placement.time, placement.branch, placement.attends, strict=True)
    two = {(True, "0", "mod", alone), (False, "t", "mod", ALL[0])}
    return set(kinds) == two and not placement.embeds


class Prepared(NamedTuple):
    """What steps read of a batch whose references, C of its S tokens, are done; N of them move.

    Both are padded on the right.
    """

    condition: jax.Array  # [B, N, 0], or beside a canvas [B, N, 320]
    txt: jax.Array  # [B, T, text_width]
    pooled: jax.Array  # [B, vec_width]
    guidance: jax.Array  # float32 [B]
    pe: tuple[jax.Array, jax.Array]  # cos, sin float32 [B, T + N, 1, K/2]
    places: jax.Array  # int32 [B, N], of what moves among the S; S where it is padding
    real: jax.Array  # bool [B, 1, T + N + C], no padding
    kept: tuple  # keys, turned by their positions, and values: [double, B, C, H, K], [single, …]


def prepare_parts(flux, x, context, sizes):
    """Noisy tokens and clean ones, x [B, S, 64], and their Context, to be padded to `sizes`, those
    that move first -> Prepared."""
    S, T = x.shape[1], context.txt.shape[1]
    clean = jnp.asarray(flux.config.placement.clean)[context.segments]  # B S
    is_real = jnp.arange(S) < context.lengths[:, None] - T
    moving, held = (find(kept & is_real, n) for kept, n in zip((~clean, clean), sizes, strict=True))
    of_text, of_image = zip(*(jnp.split(angles, [T], 1) for angles in context.pe), strict=True)
    pe = [pick(angles, held) for angles in of_image]
    counts = (held < S).sum(1)

    def attend(q, k, v):
        q, k = rope(q, pe), rope(k, pe)
        return attention(q, k, v, counts), (k, v)

    img = side_by_side(pick(x, held), pick(context.condition, held))
    mod = flux.modulation(jnp.zeros_like(context.guidance), context.guidance, context.pooled)
    _, kept = run_blocks(flux, img, context.txt[:, :0], only(mod), attend)
    pe = [jnp.concatenate([a, pick(b, moving)], 1) for a, b in zip(of_text, of_image, strict=True)]
    real = jnp.concatenate([jnp.ones((len(x), T), bool), moving < S, held < S], 1)
    condition = pick(context.condition, moving)
    words = context.txt, context.pooled, context.guidance
    return Prepared(condition, *words, tuple(pe), moving, real[:, None], kept)


def prepared_velocity(flux, x, mod, prepared):
    """`velocity` of tokens x [B, S, 64], 0 of what is clean, none of which is asked again."""
    T, pe = prepared.txt.shape[1], prepared.pe

    def attend(q, k, v, *kept):
        q, k = rope(q, pe), rope(k, pe)
        k, v = (jnp.concatenate(pair, 1) for pair in zip((k, v), kept, strict=True))
        return attention(q, k, v, None, prepared.real), None

    img, mod = side_by_side(pick(x, prepared.places), prepared.condition), only(mod)
    out, _ = run_blocks(flux, img, prepared.txt, mod, attend, prepared.kept)
    out = flux.final(out[:, T:], mod.final)
    samples = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x, out.dtype).at[samples, prepared.places].set(out, mode="drop")


def run_blocks(flux, img, txt, mod, attend, kept=((), ())):
    """As Flux.__call__ -> what it projects, [B, T + S, D], and what `attend(q, k, v)` tells of the
    double blocks, and of the single; it is handed, too, what is `kept` for the block."""

    def double(x, layer):
        block, img_mod, txt_mod, kept = near(layer)
        return block(*x, img_mod, txt_mod, lambda *qkv: attend(*qkv, *kept))

    def single(x, layer):
        block, mod, kept = near(layer)
        return block(x, mod, lambda *qkv: attend(*qkv, *kept))

    scan = partial(jax.lax.scan, unroll=flux.config.remat == "none")
    x = flux.img_in(img), flux.txt_in(txt)
    (img, txt), first = scan(double, x, (flux.double, mod.img, mod.txt, kept[0]))
    x = jnp.concatenate([txt, img], 1)  # B L D
    x, rest = scan(single, x, (flux.single, mod.single, kept[1]))
    return x, (first, rest)


def side_by_side(x, condition):
    """Tokens [B, n, 64] beside their condition, in its dtype."""
    return jnp.concatenate([x.astype(condition.dtype), condition], -1)


def only(mod):
    """A Modulation of several vectors -> of the first alone, by which all tokens go."""
    return Modulation(mod.img[..., 0, :], mod.txt, mod.single[..., 0, :], mod.final[..., 0, :])


def find(kept, size):
    """Where kept, bool [B, S], is True, from left to right: int32 [B, size], padded with S."""
    find = partial(jnp.flatnonzero, size=size, fill_value=kept.shape[1])
    return jax.vmap(find)(kept)


def pick(x, places):
    """Of x [B or 1, S, …] what is at `places` [B, n]: [B, n, …], zeros where there is nothing."""
    x = jnp.broadcast_to(x, (len(places), *x.shape[1:]))
    return jax.vmap(partial(jnp.take, axis=0, mode="fill", fill_value=0))(x, places)


def take_step(flux, x, mod, context, t, t_next):
    """painter.euler_step, where the context may be Prepared."""
    ask = prepared_velocity if isinstance(context, Prepared) else velocity
    return flow.euler(x, ask(flux, x, mod, context), t, t_next)


def part_sizes(grid, preset):
    """To how many tokens those of a grid that move are padded, and its references: to a number of
    cells as `bucket` has them of pairs; to 0 where there is none."""
    clean = np.array(preset.flux.placement.clean)[grid.segments(preset.flux.placement)]
    counts = len(clean) - clean.sum(), clean.sum()
    return tuple(n and bucket(2 * n, preset.resolution) // 2 for n in map(int, counts))


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
