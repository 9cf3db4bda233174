"""The parts of the MMDiT: Dense with its LoRA branch, norms, streams and blocks.

Shapes: B batch, S image tokens, T text tokens, L = T + S, D width, H heads, K head dim, R rank.
Source: black-forest-labs/flux:src/flux/modules/layers.py. Weights may be of any dtype; a layer
computes in the dtype of its input, with norms, angles and softmax in float32.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from vcloze_jax.model.ops import attention, modulate, rope, timestep_embedding
from vcloze_jax.sharding import COLUMNS, JOINED, ROWS, WHOLE, by_batch, gathered, placed


def as_shape(features):
    return (features,) if isinstance(features, int) else features


def uniform(key, shape, bound):
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Dense(nnx.Module):
    """y = x W + bias + (x A) B + b_B, with the LoRA branch (A, B, b_B) only where rank > 0.

    Features may have several axes, as q, k and v do: x [..., *into] -> [..., *out]; weights are
    stored flat, [in, out]. `split` says where weights and output are on a mesh while the layer
    computes: left to itself, XLA reorders devices, and does it wrongly once in a while
    (benchmarks/wrong_matmul.py).

    No alpha: the branch has scale 1, its rank is clipped to min(in, out), A starts uniform in
    +-1/sqrt(in), B and its bias at zero (lzyhha/VisualCloze:models/modules/lora.py). A scale
    belongs to folding (lora.py), never to the layer.
    """

    def __init__(self, into, out, *, split=WHOLE, rank=0, use_bias=True, std=None, rngs):
        self.into, self.out, self.split = as_shape(into), as_shape(out), split
        inputs, outputs = math.prod(self.into), math.prod(self.out)
        bound = inputs**-0.5 if std is None else std * 3**0.5
        self.kernel = nnx.Param(uniform(rngs.params(), (inputs, outputs), bound))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None
        self.rank = min(rank, inputs, outputs)
        if self.rank:
            self.lora_a = nnx.LoRAParam(uniform(rngs.params(), (inputs, self.rank), inputs**-0.5))
            self.lora_b = nnx.LoRAParam(jnp.zeros((self.rank, outputs)))
            self.lora_bias = nnx.LoRAParam(jnp.zeros(outputs))

    def __call__(self, x):
        folds, n = self.rank and self.folding_is_cheaper(x.dtype), len(self.into)
        y = contract(x, self.kernel_at_work(x.dtype, folds), n)
        if self.bias is not None:
            y = y + self.bias.reshape(self.out).astype(x.dtype)
        if self.rank:
            a, b = self.lora_a.reshape(*self.into, -1), self.lora_b.reshape(-1, *self.out)
            branch = 0 if folds else contract(contract(x, a, n, True), b, 1, True)
            # The sum is cast, not the bias, whose gradient is then a sum in float32.
            y = y + (branch + self.lora_bias.reshape(self.out)).astype(x.dtype)
        return by_batch(y, self.split.output)

    def folding_is_cheaper(self, dtype):
        """Whether W + A B takes less time than the branch, and rounds nothing."""
        inputs, outputs = self.kernel.shape
        return dtype == jnp.float32 and 3 * self.rank * (inputs + outputs) > inputs * outputs

    def kernel_at_work(self, dtype, folds=False):
        """W [*into, *out], A B in it or not, whole over fsdp, its last row or column split."""
        kernel = self.kernel.astype(dtype)
        if folds:
            kernel = kernel + gathered(self.lora_a[...]) @ gathered(self.lora_b[...])
        if len(self.into + self.out) > 2:  # at rest it is not split part by part
            kernel = gathered(kernel)
        rows, columns = self.split.weight
        axes = *[None] * (len(self.into) - 1), rows, *[None] * (len(self.out) - 1), columns
        return placed(kernel.reshape(*self.into, *self.out), *axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x, w, n, whole=False):
    """x [..., *into] times w [*into, *out], n axes of each, w cast to the dtype of x, and then
    gathered if `whole` -> [..., *out]. The gradient of w is a sum in float32: autodiff would round
    it, and on CPUs would copy it, transposed."""
    return contract_forward(x, w, n, whole)[0]


def contract_forward(x, w, n, whole):
    w = gathered(w.astype(x.dtype)) if whole else w.astype(x.dtype)
    return jnp.tensordot(x, w, n), (x, w)


def contract_backward(n, whole, saved, dy):
    x, w = saved
    tokens, out = tuple(range(x.ndim - n)), tuple(range(n - w.ndim, 0))
    dw = jnp.tensordot(x, dy, (tokens, tokens), preferred_element_type=jnp.float32)
    return jnp.tensordot(dy, w, (out, out)), gathered(dw) if whole else dw.astype(w.dtype)


contract.defvjp(contract_forward, contract_backward)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x, eps=1e-6):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
        return (y * self.scale.astype(jnp.float32)).astype(x.dtype)


class MLPEmbedder(nnx.Module):
    """Linear, SiLU, Linear: of time, guidance and the pooled text."""

    def __init__(self, in_features, width, *, rank, rngs):
        self.in_layer = Dense(in_features, width, rank=rank, std=0.02, rngs=rngs)
        self.out_layer = Dense(width, width, rank=rank, std=0.02, rngs=rngs)

    def __call__(self, x):
        return self.out_layer(jax.nn.silu(self.in_layer(x)))

    def sinusoid(self, t):
        """t float32 [B] -> [B, D]."""
        return self(timestep_embedding(t))


class Stream(nnx.Module):
    """One side of a double block, image or text: its own weights around a shared attention."""

    def __init__(self, c, *, rngs):
        dense = dict(rank=c.rank, rngs=rngs)
        self.heads = c.heads
        self.mod = Dense(c.width, 6 * c.width, split=JOINED, std=0.0, **dense)
        self.qkv = Dense(c.width, (3, c.width), split=COLUMNS, **dense)
        self.q_norm = RMSNorm(c.head_dim)
        self.k_norm = RMSNorm(c.head_dim)
        self.proj = Dense(c.width, c.width, split=ROWS, **dense)
        self.mlp_in = Dense(c.width, c.mlp_ratio * c.width, split=COLUMNS, **dense)
        self.mlp_out = Dense(c.mlp_ratio * c.width, c.width, split=ROWS, **dense)

    def before(self, x, shift, scale):
        """x [B, S, D] -> q, k, v, each [B, S, H, K]."""
        q, k, v = split_heads(self.qkv(modulate(x, shift, scale)), self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def after(self, x, attn, gate1, shift2, scale2, gate2):
        """Close the residuals of attention and MLP around x [B, S, D]; the others are [B, 1, D]."""
        x = x + gate1 * self.proj(attn)
        h = jax.nn.gelu(self.mlp_in(modulate(x, shift2, scale2)), approximate=True)
        return x + gate2 * self.mlp_out(h)


class DoubleBlock(nnx.Module):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, c, *, rngs):
        self.img = Stream(c, rngs=rngs)
        self.txt = Stream(c, rngs=rngs)

    def __call__(self, img, txt, img_mod, txt_mod, pe, lengths=None):
        """img [B, S, D], txt [B, T, D], mods [B, 6D]; pe covers text, then image."""
        img_mod, txt_mod = chunks(img_mod, 6), chunks(txt_mod, 6)
        img_qkv = self.img.before(img, *img_mod[:2])
        txt_qkv = self.txt.before(txt, *txt_mod[:2])
        q, k, v = (
            jnp.concatenate(pair, 1) for pair in zip(txt_qkv, img_qkv, strict=True)
        )  # B L H K
        attn = attention(rope(q, pe), rope(k, pe), v, lengths)  # B L D
        T = txt.shape[1]
        img = self.img.after(img, attn[:, T:], *img_mod[2:])
        txt = self.txt.after(txt, attn[:, :T], *txt_mod[2:])
        return img, txt


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel over the joined sequence."""

    def __init__(self, c, *, rngs):
        dense = dict(rank=c.rank, rngs=rngs)
        self.heads = c.heads
        self.mod = Dense(c.width, 3 * c.width, split=JOINED, std=0.0, **dense)
        self.linear1 = Dense(c.width, (3 + c.mlp_ratio, c.width), split=COLUMNS, **dense)
        self.linear2 = Dense((1 + c.mlp_ratio, c.width), c.width, split=ROWS, **dense)
        self.q_norm = RMSNorm(c.head_dim)
        self.k_norm = RMSNorm(c.head_dim)

    def __call__(self, x, mod, pe, lengths=None):
        """x [B, L, D], mod [B, 3D] -> [B, L, D]."""
        shift, scale, gate = chunks(mod, 3)
        h = self.linear1(modulate(x, shift, scale))  # B L 7 D
        qkv, mlp = jnp.split(h, [3], 2)
        q, k, v = split_heads(qkv, self.heads)
        q, k = rope(self.q_norm(q), pe), rope(self.k_norm(k), pe)
        attn = attention(q, k, v, lengths)  # B L D
        h = jnp.concatenate([attn[:, :, None], jax.nn.gelu(mlp, approximate=True)], 2)
        return x + gate * self.linear2(h)


class LastLayer(nnx.Module):
    """Modulated norm and the projection to the velocity."""

    def __init__(self, c, *, rngs):
        self.mod = Dense(c.width, 2 * c.width, split=JOINED, std=0.0, rank=c.rank, rngs=rngs)
        self.linear = Dense(c.width, c.out_channels, std=0.0, rank=c.rank, rngs=rngs)

    def __call__(self, x, mod):
        """x [B, S, D], mod [B, 2D] -> [B, S, out_channels]."""
        return self.linear(modulate(x, *chunks(mod, 2)))


def chunks(mod, n):
    """[B, nD] -> n arrays [B, 1, D] that broadcast over tokens."""
    return jnp.split(mod[:, None], n, -1)


def split_heads(qkv, heads):
    """[B, L, 3, D] -> q, k, v [B, L, H, K]."""
    return jnp.moveaxis(qkv.reshape(*qkv.shape[:3], heads, -1), 2, 0)


def stack(make, layers, rngs):
    """`layers` modules as one, with a leading layer axis on every weight. Modules are pytrees: vmap
    makes them, scan runs them."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)
