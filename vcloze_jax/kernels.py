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
AT_ONCE = 512  # keys that its queries meet at once, at most
TILE = 2**19  # scores at once, at most


def cudnn(q, k, v, lengths, pairs=None):
    """NVIDIA's flash attention: q [B, L, H, K], k, v alike or of more tokens, lengths int32 [B] or
    None, pairs bool [B, L or 1, L] or None -> [B, L, H, K]. A mesh may split samples and heads.
    Pairs are a bias, which takes the memory of one head's scores; no GPU has run that yet.

    Its gradient takes an even number of tokens alone (seen on an H200, jax 0.11.2), so that an odd
    one gets a token that nobody sees.
    """
    B, L = q.shape[:2]
    keys = k.shape[1]
    more = (0, L % 2), (0, keys % 2)
    if pairs is not None:
        pairs = jnp.pad(jnp.broadcast_to(pairs, (B, L, keys)), ((0, 0), *more), mode="edge")
    if L % 2 or keys % 2:
        lengths = jnp.full(B, keys) if lengths is None else lengths
        pad = lambda x, n: jnp.pad(x, ((0, 0), n, (0, 0), (0, 0)))  # noqa: E731
        q, k, v = pad(q, more[0]), pad(k, more[1]), pad(v, more[1])
    seen = dict(key_value_seq_lengths=lengths)
    if pairs is not None:
        seen["mask"] = pairs[:, None]
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **seen)[:, :L]


def splash(q, k, v, lengths, interpret=False):
    """jax's Pallas kernel for TPUs, K a multiple of 128: as `cudnn`, each device its own samples
    and heads. `interpret` runs it on a CPU, for tests.

    Tokens are padded to what is cut well. All queries are of one segment, and real keys alone, so
    that padded queries see what they see in the formula. Queries are scaled before they are
    multiplied: in bfloat16 that is one rounding more.
    """
    B, L, H, _ = q.shape
    size = padded_length(L)
    if lengths is None and size > L:
        lengths = jnp.full(B, L)
    blocks = kernels.BlockSizes(*2 * choose_blocks(size), use_fused_bwd_kernel=True)

    def on_device(q, k, v, lengths):
        mask = masks.MultiHeadMask([masks.FullMask((size, size))] * q.shape[1])
        how = dict(block_sizes=blocks, residual_checkpoint_name=KEPT, interpret=interpret)
        kernel = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, **how)

        def of_sample(q, k, v, length):
            if length is None:
                return kernel(q, k, v)
            real = (jnp.arange(size) < length).astype(jnp.int32)
            return kernel(q, k, v, kernels.SegmentIds(jnp.ones_like(real), real))

        return jax.vmap(of_sample)(q, k, v, lengths)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        place = P(*BATCH, None if H % mesh.shape["tensor"] else "tensor")
        places = dict(in_specs=(place, place, place, BATCH), out_specs=place)
        on_device = jax.shard_map(on_device, check_vma=False, **places)
    pads = (0, 0), (0, 0), (0, size - L), (0, 0)
    q, k, v = (jnp.pad(x.swapaxes(1, 2), pads) for x in (q * q.shape[-1] ** -0.5, k, v))
    return on_device(q, k, v, lengths)[:, :, :L].swapaxes(1, 2)


def padded_length(tokens):
    """Of the lengths that are at most 4% longer than so many tokens, that with the largest tile."""
    least = -(-tokens // LANES) * LANES
    lengths = range(least, max(least, tokens * 26 // 25) + 1, LANES)
    return max(lengths, key=lambda length: choose_blocks(length)[0] * choose_blocks(length)[2])


def choose_blocks(length):
    """Queries of a block, its keys, and of these how many at once: the largest that fit into the
    scoped memory of a v5e, and much what was measured to be best (tokamax 0.0.17: data/autotuning).
    """
    divisors = [d for d in range(LANES, BLOCK + 1, LANES) if length % d == 0]
    keys = divisors[-1]
    at_once = [d for d in range(LANES, AT_ONCE + 1, LANES) if keys % d == 0]
    tiles = [(q, keys, n) for q in divisors for n in at_once if q * n <= TILE]
    return max(tiles, key=lambda tile: (tile[0] * tile[2], tile[0]))
