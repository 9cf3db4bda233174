"""The kernels behind ops.attention: what the formula there gives, to rounding, without the scores.

Shapes: B batch, L tokens, H heads, K head dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from vcloze_jax.model.ops import KEPT
from vcloze_jax.sharding import BATCH, P

LANES = 128  # of a TPU: tokens are cut into multiples of it
BLOCK = 2048  # tokens of a block, at most
OF_KINDS = 640  # of these queries, at most, where they are of kinds: their features are more
AT_ONCE = 512  # keys that its queries meet at once, at most
TILE = 2**19  # scores at once, at most
HIDDEN = -1e30  # a score that weighs nothing, beside any other


def cudnn(q, k, v, lengths, sees=None, kinds=None):
    """NVIDIA's flash attention: q [B, L, H, K], k, v alike or of more tokens, lengths int32 [B] or
    None, sees bool [B, R, L] and kinds [B, L], or None, as ops.attention has them -> [B, L, H, K].
    A mesh may split samples and heads. Who sees whom is a bias, which takes the memory of one
    head's scores; no GPU has run that yet.

    Its gradient takes an even number of tokens alone (seen on an H200, jax 0.11.2), so that an odd
    one gets a token that nobody sees.
    """
    B, L = q.shape[:2]
    keys = k.shape[1]
    more = (0, L % 2), (0, keys % 2)
    if L % 2 or keys % 2:
        lengths = jnp.full(B, keys) if lengths is None else lengths
        pad = lambda x, n: jnp.pad(x, ((0, 0), n, (0, 0), (0, 0)))  # noqa: E731
        q, k, v = pad(q, more[0]), pad(k, more[1]), pad(v, more[1])
    seen = dict(key_value_seq_lengths=lengths)
    if sees is not None:
        pairs = sees if kinds is None else jnp.take_along_axis(sees, kinds[..., None], 1)
        pairs = jnp.broadcast_to(pairs, (B, L, keys))
        seen["mask"] = jnp.pad(pairs, ((0, 0), *more), mode="edge")[:, None]
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **seen)[:, :L]


def splash(q, k, v, lengths, sees=None, kinds=None, *, interpret=False):
    """jax's Pallas kernel for TPUs, K a multiple of 128: as `cudnn`, each device its own samples
    and heads. `interpret` runs it on a CPU, for tests.

    Tokens are padded to what blocks divide. Every query, padded ones too, is in the segment of the
    real keys, so that it sees what the plain formula shows it. With kinds, a query that may
    see nobody gets the mean of all real keys' values, as there, but another gradient: no Placement
    has such a one. Queries are scaled before the product: in bfloat16 that is one rounding more.
    """
    (B, L, H, K), keys = q.shape, k.shape[1]
    rows, columns = padded_length(L), padded_length(keys)
    if lengths is None and columns > keys:
        lengths = jnp.full(B, keys)
    real = None if lengths is None else jnp.arange(columns) < lengths[:, None]  # B columns
    q = q * K**-0.5
    if kinds is not None:
        q, k = tell_kinds(q, k, sees, kinds)
    elif sees is not None:
        seen = jnp.pad(sees[:, 0], ((0, 0), (0, columns - keys)))
        real = seen if real is None else seen & real
    tile = choose_blocks(rows, columns, BLOCK if kinds is None else OF_KINDS)
    blocks = kernels.BlockSizes(*2 * tile, use_fused_bwd_kernel=True)

    def on_device(q, k, v, real):
        mask = masks.MultiHeadMask([masks.FullMask((rows, columns))] * q.shape[1])
        how = dict(block_sizes=blocks, residual_checkpoint_name=KEPT, interpret=interpret)
        kernel = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, **how)

        def of_sample(q, k, v, real):
            if real is None:
                return kernel(q, k, v)
            real = real.astype(jnp.int32)
            return kernel(q, k, v, kernels.SegmentIds(jnp.ones(rows, jnp.int32), real))

        # vmap would make samples an axis of the kernel's grid, along which the sums it keeps change
        # and so lie twice in a chip's vector memory; a loop would copy what it is handed.
        reals = [None] * len(q) if real is None else real
        return jnp.stack([of_sample(*sample) for sample in zip(q, k, v, reals, strict=True)])

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        place = P(*BATCH, None if H % mesh.shape["tensor"] else "tensor")
        places = dict(in_specs=(place, place, place, BATCH), out_specs=place)
        on_device = jax.shard_map(on_device, check_vma=False, **places)

    def heads_first(x, size):
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)))

    q, k, v = heads_first(q, rows), heads_first(k, columns), heads_first(v, columns)
    return on_device(q, k, v, real)[:, :, :L].swapaxes(1, 2)


def tell_kinds(q, k, sees, kinds):
    """q and k with LANES more features each, which add 0 to a score, exactly, where a query's kind
    sees the key, and HIDDEN where it does not.

    It takes half as many operations again. The kernel's own masks of data are read for each head,
    four bytes a score; and its segments see who is equal, so that kinds which see some keys alike,
    and others not, would each take a call of their own, over all tokens.
    """
    kinds = jax.nn.one_hot(kinds, LANES, dtype=q.dtype)  # B L LANES
    hidden = jnp.where(sees, 0, HIDDEN).astype(k.dtype).swapaxes(1, 2)  # B keys R
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, LANES - hidden.shape[2])))

    def join(x, features):
        features = jnp.broadcast_to(features[:, :, None], (*x.shape[:3], LANES))
        return jnp.concatenate([x, features], -1)

    return join(q, kinds), join(k, hidden)


def padded_length(tokens):
    """Of the lengths that are at most 4% longer than so many tokens, that with the largest tile."""
    least = -(-tokens // LANES) * LANES
    lengths = range(least, max(least, tokens * 26 // 25) + 1, LANES)

    def tile(length):
        queries, _, at_once = choose_blocks(length, length, BLOCK)
        return queries * at_once

    return max(lengths, key=tile)


def choose_blocks(rows, columns, most):
    """Queries of a block, so many at most, its keys, and of these how many at once: the largest
    that fit into the scoped memory of a v5e, and much what was measured to be best (tokamax 0.0.17:
    data/autotuning).
    """
    keys = multiples(columns, BLOCK)[-1]
    tiles = [(q, keys, n) for q in multiples(rows, most) for n in multiples(keys, AT_ONCE)]
    fit = [(q, keys, n) for q, keys, n in tiles if q * n <= TILE]
    return max(fit, key=lambda tile: (tile[0] * tile[2], tile[0]))


def multiples(length, most):
    """Of LANES, which divide a length: up to `most`."""
    return [n for n in range(LANES, most + 1, LANES) if length % n == 0]
