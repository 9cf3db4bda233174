"""The parts of the MMDiT: Dense with its LoRA branch, norms, streams and blocks.

Shapes: B batch, S image tokens, T text tokens, L = T + S, D width, H heads, K head dim, R rank.
Source: black-forest-labs/flux:src/flux/modules/layers.py. Weights may be of any dtype; a layer
computes in the dtype of its input, with norms, angles and softmax in float32. Of ops.py, `modulate`
is (1 + scale) * LayerNorm(x) + shift, and `rope` turns channels 2i and 2i + 1 by the i-th angle of
a token's position, of whose three numbers each has a part of the K.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vcloze_jax.model.ops import KEPT, modulate, rope
from vcloze_jax.sharding import COLUMNS, OF_HEADS, OF_PARTS, ROWS, TO_HEADS, VECTOR, WHOLE, placed


def uniform(key, shape, bound):
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Dense(nnx.Module):
    """y = x W + (bias + b_B) + (x A) B, with the LoRA branch (A, B, b_B) only where rank > 0.

    Inputs and outputs may have several axes, as heads do: W [*into, *out], A [*into, R],
    B [R, *out]. `split` says where weights and output are on a mesh while the layer computes: left
    to itself, XLA reorders devices, at times wrongly (benchmarks/wrong_matmul.py).

    No alpha: the branch has scale 1, its rank is clipped to min(in, out), A starts uniform in
    +-1/sqrt(in), B and its bias at zero (lzyhha/VisualCloze:models/modules/lora.py). A scale
    belongs to folding (storage/folding.py), never to the layer.
    """

    def __init__(self, into, out, *, split=WHOLE, rank=0, use_bias=True, std=None, rngs):
        self.split = split
        into, out = ((n,) if isinstance(n, int) else n for n in (into, out))
        inputs, outputs = math.prod(into), math.prod(out)
        bound = inputs**-0.5 if std is None else std * 3**0.5
        self.kernel = nnx.Param(uniform(rngs.params(), (*into, *out), bound))
        self.bias = nnx.Param(jnp.zeros(out)) if use_bias else None
        self.rank = min(rank, inputs, outputs)
        if self.rank:
            self.lora_a = nnx.LoRAParam(uniform(rngs.params(), (*into, self.rank), inputs**-0.5))
            self.lora_b = nnx.LoRAParam(jnp.zeros((self.rank, *out)))
            self.lora_bias = nnx.LoRAParam(jnp.zeros(out))

    def __call__(self, x):
        """x [..., *into] -> [..., *out]."""
        inputs, outputs, batch = self.split
        kernel, n = self.kernel[...], len(inputs)
        bias = None if self.bias is None else self.bias[...]
        if self.rank:
            bias = self.lora_bias[...] if bias is None else bias + self.lora_bias
        folds = self.rank and self.folding_is_cheaper(x.dtype)
        if folds:
            a = placed(self.lora_a[...], *inputs, None)
            kernel = kernel + contract(a, self.lora_b[...], None, 1, (None, *outputs))
        y = contract(x, kernel, bias, n, (*inputs, *outputs))
        if self.rank and not folds:
            h = contract(x, self.lora_a[...], None, n, (*inputs, None))  # ... R
            y = y + contract(h, self.lora_b[...], None, 1, (None, *outputs))
        y = placed(y, *batch, *[None] * (y.ndim - 1 - len(outputs)), *outputs)
        return checkpoint_name(y, KEPT)

    def folding_is_cheaper(self, dtype):
        """Whether folding rounds nothing and costs less: a token costs the branch 3 R (in + out)
        products, forward and backward, and folding in * out, those of W's gradient."""
        inputs, outputs = self.lora_a.size // self.rank, self.lora_b.size // self.rank
        return dtype == jnp.float32 and 3 * self.rank * (inputs + outputs) > inputs * outputs


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def contract(x, w, bias, n, axes):
    """x [..., *into] times w [*into, *out], n axes of each, plus bias [*out], or None ->
    [..., *out], in the dtype of x; w then lies over those `axes` of the mesh.

    Gradients of w and bias are sums in float32, over tokens and devices; autodiff would round them.
    Each is made by a matrix product whose result is not taller than wide, of factors that are not
    read transposed: on a CPU that is two to five times as fast, and sums are slower than products.
    """
    return contract_forward(x, w, bias, n, axes)[0]


def contract_forward(x, w, bias, n, axes):
    y = jnp.tensordot(x, placed(w.astype(x.dtype), *axes), n)
    return y if bias is None else y + bias.astype(x.dtype), (x, w, bias)


def contract_backward(n, axes, saved, dy):
    x, w, bias = saved
    # Tokens in float32 are a CPU's: there copies pay, which a barrier keeps from being undone.
    on_cpu = x.dtype == jnp.float32 and x.ndim > 2
    copied = jax.lax.optimization_barrier if on_cpu else lambda x: x
    at_work, out = placed(w.astype(x.dtype), *axes), tuple(range(n - w.ndim, 0))
    if on_cpu:
        dx = jnp.tensordot(dy, copied(jnp.moveaxis(at_work, out, range(len(out)))), len(out))
    else:
        dx = jnp.tensordot(dy, at_work, (out, tuple(range(n, w.ndim))))
    x, dy = x.reshape(-1, *w.shape[:n]), dy.reshape(-1, *w.shape[n:])
    by_tokens = partial(jnp.tensordot, axes=(0, 0), preferred_element_type=jnp.float32)
    tall = n > 1 or (on_cpu and w.ndim == 2 and w.shape[0] > w.shape[1])
    dw = jnp.moveaxis(copied(by_tokens(dy, x)), 0, -1) if tall else by_tokens(x, dy)
    db = None if bias is None else by_tokens(jnp.ones(len(dy), dy.dtype), dy).astype(bias.dtype)
    return dx, placed(dw, *axes).astype(w.dtype), db


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


class Stream(nnx.Module):
    """One side of a double block, image or text: its own weights around a shared attention."""

    def __init__(self, c, mods=("mod",), *, rngs):
        dense, heads = dict(rank=c.rank, rngs=rngs), (c.heads, c.head_dim)
        for name in mods:
            setattr(self, name, Dense(c.width, 6 * c.width, split=VECTOR, std=0.0, **dense))
        self.qkv = Dense(c.width, (3, *heads), split=TO_HEADS, **dense)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)
        self.proj = Dense(heads, c.width, split=OF_HEADS, **dense)
        self.mlp_in = Dense(c.width, c.mlp_ratio * c.width, split=COLUMNS, **dense)
        self.mlp_out = Dense(c.mlp_ratio * c.width, c.width, split=ROWS, **dense)

    def before(self, x, shift, scale):
        """x [B, S, D] -> q, k, v, each [B, S, H, K]."""
        q, k, v = jnp.moveaxis(self.qkv(modulate(x, shift, scale)), 2, 0)
        return self.q_norm(q), self.k_norm(k), v

    def after(self, x, attn, gate1, shift2, scale2, gate2):
        """Add attention and MLP to x [B, S, D]; attn is [B, S, H, K], the others [B, 1 or S, D]."""
        x = x + gate1 * self.proj(attn)
        h = jax.nn.gelu(self.mlp_in(modulate(x, shift2, scale2)), approximate=True)
        return x + gate2 * self.mlp_out(h)


class DoubleBlock(nnx.Module):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, c, *, rngs):
        self.img = Stream(c, dict.fromkeys(c.placement.branch), rngs=rngs)
        self.txt = Stream(c, rngs=rngs)

    def __call__(self, img, txt, img_mod, txt_mod, pe, attend):
        """img [B, S, D], txt [B, T, D], mods [B, 6D], pe of text, then image -> both, and what is
        told: of q, k, v [B, T + S, H, K] `attend` gives attention, and what a scan collects."""
        img_mod, txt_mod = chunks(img_mod, 6), chunks(txt_mod, 6)
        img_qkv = self.img.before(img, *img_mod[:2])
        txt_qkv = self.txt.before(txt, *txt_mod[:2])
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn, told = attend(rope(q, pe), rope(k, pe), v)  # B L H K
        T = txt.shape[1]
        img = self.img.after(img, attn[:, T:], *img_mod[2:])
        txt = self.txt.after(txt, attn[:, :T], *txt_mod[2:])
        return (img, txt), told


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel over the joined sequence: linear1 makes q, k, v and the MLP's
    4 D hidden channels, as 4 more [H, K]; linear2 takes what attention gives, and these."""

    def __init__(self, c, *, rngs):
        dense, heads = dict(rank=c.rank, rngs=rngs), (c.heads, c.head_dim)
        for name in dict.fromkeys(c.placement.branch):
            setattr(self, name, Dense(c.width, 3 * c.width, split=VECTOR, std=0.0, **dense))
        self.linear1 = Dense(c.width, (3 + c.mlp_ratio, *heads), split=TO_HEADS, **dense)
        self.linear2 = Dense((1 + c.mlp_ratio, *heads), c.width, split=OF_PARTS, **dense)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim), RMSNorm(c.head_dim)

    def __call__(self, x, mod, pe, attend):
        """x [B, L, D], mod [B, 3D] -> [B, L, D], and what `attend` tells."""
        shift, scale, gate = chunks(mod, 3)
        h = self.linear1(modulate(x, shift, scale))  # B L 7 H K
        qkv, mlp = jnp.split(h, [3], 2)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k = rope(self.q_norm(q), pe), rope(self.k_norm(k), pe)
        attn, told = attend(q, k, v)  # B L H K
        h = jnp.concatenate([attn[:, :, None], jax.nn.gelu(mlp, approximate=True)], 2)
        return x + gate * self.linear2(h), told


class LastLayer(nnx.Module):
    """Modulated norm and the projection to the velocity."""

    def __init__(self, c, *, rngs):
        self.mod = Dense(c.width, 2 * c.width, split=VECTOR, std=0.0, rank=c.rank, rngs=rngs)
        self.linear = Dense(c.width, c.out_channels, std=0.0, rank=c.rank, rngs=rngs)

    def __call__(self, x, mod):
        """x [B, S, D], mod [B, 2D] -> [B, S, out_channels]."""
        return self.linear(modulate(x, *chunks(mod, 2)))


def chunks(mod, n):
    """[B, nD] -> n arrays [B, 1, D], which tokens share; of their own, [B, S, nD] -> [B, S, D]."""
    return jnp.split(mod[:, None] if mod.ndim == 2 else mod, n, -1)


def stack(make, layers, rngs):
    """`layers` modules as one, with a leading layer axis on every weight; vmap makes it."""
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), layers))
