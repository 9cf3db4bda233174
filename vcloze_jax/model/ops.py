"""The formulas of FLUX that own no weights: packing, positions, attention, time features, norms."""

from pkgutil import resolve_name

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"  # name of what gradients find, and do not compute again, by `keep_products`


def pack(x):
    """Latent [B, h, w, C] -> tokens [B, h/2 * w/2, 4C], row-major; channel = c*4 + py*2 + px.

    Source: black-forest-labs/flux:src/flux/sampling.py (prepare).
    """
    B, h, w, C = x.shape
    x = x.reshape(B, h // 2, 2, w // 2, 2, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, h * w // 4, C * 4)


def unpack(tokens, h, w):
    """Tokens [B, h/2 * w/2, 4C] -> latent [B, h, w, C]; the inverse of `pack`."""
    B, _, D = tokens.shape
    x = tokens.reshape(B, h // 2, w // 2, D // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, h, w, D // 4)


def pack_mask(mask):
    """Pixel mask [B, H, W] (1 = generate) -> [B, S, 256]: 8x8 pixels to 64 channels, then packed.

    Source: black-forest-labs/flux:src/flux/sampling.py (prepare_fill).
    """
    B, H, W = mask.shape
    x = mask.reshape(B, H // 8, 8, W // 8, 8).transpose(0, 1, 3, 2, 4)
    return pack(x.reshape(B, H // 8, W // 8, 64))


def rope_table(ids, axes_dim, theta):
    """Position ids [..., L, 3] -> (cos, sin), float32 [..., L, 1, K/2]; on the host, in NumPy.

    Angles are float64, as in diffusers: bfloat16 would round position 257 to 256. 1 is the heads'.
    """
    ids = np.asarray(ids, np.float64)
    omega = [theta ** -(np.arange(0, dim, 2) / dim) for dim in axes_dim]
    angles = np.concatenate([ids[..., i, None] * w for i, w in enumerate(omega)], -1)
    angles = angles[..., None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope(x, pe):
    """Rotate the interleaved pairs of x [B, L, H, K] by `pe` in float32; back in x's dtype."""
    cos, sin = pe
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    out = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return out.reshape(x.shape).astype(x.dtype)


def attention(q, k, v, lengths=None, sees=None, kinds=None):
    """Softmax attention over q, k, v [B, L, H, K] -> [B, L, H, K]; the one seam for kernels.

    `lengths` int32 [B] counts each sample's real tokens: padding is on the right only, and nobody
    sees it. Where not all see all, `sees` bool [B, R, L] says whom each of R kinds of queries sees,
    and `kinds` [B, L] of which a query is, None for R = 1. Keys may be more than queries. The
    platform is that of the mesh in use: programs are compiled for others than ours. The formula has
    its heads first, sums by products, divides last and takes maxima in two turns: XLA's CPU backend
    differentiates it more than twice as fast as jax.nn's.
    """
    L, K = k.shape[1], k.shape[3]
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    kernel = choose_kernel(platform, q.dtype, K)
    if kernel != "xla":
        compute = resolve_name(f"vcloze_jax.kernels:{kernel}")  # slow to import
        return compute(q, k, v, lengths, sees, kinds)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # B H L K
    scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    if lengths is not None:
        real = jnp.arange(L) < lengths[:, None, None, None]  # B 1 1 L
        scores = jnp.where(real, scores, -jnp.inf)
    if sees is not None:
        pairs = sees if kinds is None else jnp.take_along_axis(sees, kinds[..., None], 1)
        scores = jnp.where(pairs[:, None], scores, -jnp.inf)
    parts = jax.lax.stop_gradient(scores).reshape(*scores.shape[:3], -1, np.gcd(L, 32))
    largest = jax.lax.optimization_barrier(parts.max(3)).max(3, keepdims=True)
    weights = jnp.exp(K**-0.5 * (scores - largest))  # B H Q L, Q queries; their sum is to divide by
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out, total = checkpoint_name((out, jnp.matmul(weights, jnp.ones((L, 1)))), KEPT)  # B H Q K or 1
    return (out / total).swapaxes(1, 2).astype(v.dtype)


def choose_kernel(platform, dtype, head_dim):
    """What computes attention there: "cudnn", "splash", or XLA, the formula."""
    if dtype != "bfloat16":
        return "xla"
    return {"gpu": "cudnn", "tpu": "xla" if head_dim % 128 else "splash"}.get(platform, "xla")


def keep_products(primitive, *_, **params):
    """What gradients keep: what is named `KEPT`, and cuDNN's own, whose statistics have no name."""
    named = primitive.name == "name" and params["name"] == KEPT
    return named or primitive.name.startswith("dot_product_attention_fwd")


def timestep_embedding(t, dim=256):
    """Sinusoid of t float32 [B], time in 0 .. 1 or guidance -> float32 [B, dim], cosines first.

    The argument 1000 * t is rounded to float32 before it meets the frequencies, as the reference
    does: a float64 sinusoid moves a tiny model's output by 6e-4 at guidance 30. So do frequencies
    one float32 apart, hence an exact exponential of the float32 exponents.
    """
    half = dim // 2
    exponents = -np.log(np.float32(10_000)) * np.arange(half, dtype=np.float32) / half
    freqs = np.exp(exponents, dtype=np.float64).astype(np.float32)
    angles = (1000.0 * t.astype(jnp.float32))[..., None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def layer_norm(x, eps=1e-6):
    """LayerNorm over the last axis without affine, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def modulate(x, shift, scale):
    """Adaptive LayerNorm: x [B, L, D] normed, then shifted and scaled by [B, 1, D]."""
    return (1 + scale) * layer_norm(x) + shift
