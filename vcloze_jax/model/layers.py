"""The parts of the MMDiT: Dense with its LoRA branch, norms, streams and blocks.

Shapes: B batch, N image tokens, T text tokens, L = T + N, D width, H heads, K head dim.
Source: black-forest-labs/flux:src/flux/modules/layers.py. Weights may be of any dtype; a layer
computes in the dtype of its input, with norms, angles and softmax in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vcloze_jax.model.ops import attention, modulate, rope, timestep_embedding
from vcloze_jax.sharding import AT_WORK, by_batch, placed


def uniform(key, shape, bound):
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Dense(nnx.Module):
    """y = x W + b + (x A) B + b_B, with the LoRA branch (A, B, b_B) only where rank > 0.

    No alpha: the branch has scale 1, its rank is clipped to min(in, out), A starts uniform in
    +-1/sqrt(in), B and its bias at zero (lzyhha/VisualCloze:models/modules/lora.py). A scale
    belongs to folding (lora.py), never to the layer.
    """

    def __init__(self, in_features, out_features, *, split=None, rank=0, use_bias=True, std=None, rngs):
        self.split = split
        bound = in_features**-0.5 if std is None else std * 3**0.5
        self.kernel = nnx.Param(uniform(rngs.params(), (in_features, out_features), bound))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None
        self.rank = min(rank, in_features, out_features)
        if self.rank:
            a = uniform(rngs.params(), (in_features, self.rank), in_features**-0.5)
            self.lora_a = nnx.LoRAParam(a)
            self.lora_b = nnx.LoRAParam(jnp.zeros((self.rank, out_features)))
            self.lora_bias = nnx.LoRAParam(jnp.zeros(out_features))

    def __call__(self, x):
        into, out = AT_WORK[self.split]
        y = x @ placed(self.kernel.astype(x.dtype), into, out)
        if self.bias is not None:
            y = y + self.bias.astype(x.dtype)
        if self.rank:
            a = placed(self.lora_a.astype(x.dtype), into, None)
            b = placed(self.lora_b.astype(x.dtype), None, out)
            y = y + ((x @ a) @ b + self.lora_bias.astype(x.dtype))
        return by_batch(y, out)


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
        return self(timestep_embedding(t))


class Stream(nnx.Module):
    """One side of a double block, image or text: its own weights around a shared attention."""

    def __init__(self, c, *, rngs):
        dense = dict(rank=c.rank, rngs=rngs)
        self.heads = c.heads
        self.mod = Dense(c.width, 6 * c.width, split="columns", std=0.0, **dense)
        self.qkv = Dense(c.width, 3 * c.width, split="columns", **dense)
        self.q_norm = RMSNorm(c.head_dim)
        self.k_norm = RMSNorm(c.head_dim)
        self.proj = Dense(c.width, c.width, split="rows", **dense)
        self.mlp_in = Dense(c.width, c.mlp_ratio * c.width, split="columns", **dense)
        self.mlp_out = Dense(c.mlp_ratio * c.width, c.width, split="rows", **dense)

    def before(self, x, shift, scale):
        """x [B, N, D] -> q, k, v, each [B, N, H, K]."""
        qkv = self.qkv(modulate(x, shift, scale))  # B N 3D
        q, k, v = split_heads(qkv, self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def after(self, x, attn, gate1, shift2, scale2, gate2):
        """Close the residuals of attention and MLP around x [B, N, D]."""
        x = x + gate1 * self.proj(attn)
        h = jax.nn.gelu(self.mlp_in(modulate(x, shift2, scale2)), approximate=True)
        return x + gate2 * self.mlp_out(h)


class DoubleBlock(nnx.Module):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, c, *, rngs):
        self.img = Stream(c, rngs=rngs)
        self.txt = Stream(c, rngs=rngs)

    def __call__(self, img, txt, img_mod, txt_mod, pe, lengths=None):
        """img [B, N, D], txt [B, T, D], mods [B, 6D]; pe covers text, then image."""
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
        mlp = c.mlp_ratio * c.width
        dense = dict(rank=c.rank, rngs=rngs)
        self.heads = c.heads
        self.mod = Dense(c.width, 3 * c.width, split="columns", std=0.0, **dense)
        self.linear1 = Dense(c.width, 3 * c.width + mlp, split="columns", **dense)
        self.linear2 = Dense(c.width + mlp, c.width, split="rows", **dense)
        self.q_norm = RMSNorm(c.head_dim)
        self.k_norm = RMSNorm(c.head_dim)

    def __call__(self, x, mod, pe, lengths=None):
        """x [B, L, D], mod [B, 3D] -> [B, L, D]."""
        shift, scale, gate = chunks(mod, 3)
        h = self.linear1(modulate(x, shift, scale))  # B L 3D+4D
        qkv, mlp = jnp.split(h, [3 * x.shape[-1]], -1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = rope(self.q_norm(q), pe), rope(self.k_norm(k), pe)
        attn = attention(q, k, v, lengths)  # B L D
        out = self.linear2(jnp.concatenate([attn, jax.nn.gelu(mlp, approximate=True)], -1))
        return x + gate * out


class LastLayer(nnx.Module):
    """Modulated norm and the projection to the velocity."""

    def __init__(self, c, *, rngs):
        self.mod = Dense(c.width, 2 * c.width, split="columns", std=0.0, rank=c.rank, rngs=rngs)
        self.linear = Dense(c.width, c.out_channels, std=0.0, rank=c.rank, rngs=rngs)

    def __call__(self, x, mod):
        """x [B, N, D], mod [B, 2D] -> [B, N, out_channels]."""
        return self.linear(modulate(x, *chunks(mod, 2)))


def chunks(mod, n):
    """[B, nD] -> n arrays [B, 1, D] that broadcast over tokens."""
    return jnp.split(mod[:, None], n, -1)


def split_heads(qkv, heads):
    """[B, L, 3D] -> q, k, v [B, L, H, K]; the rows of the fused weight are [q | k | v]."""
    B, L, _ = qkv.shape
    return jnp.moveaxis(qkv.reshape(B, L, 3, heads, -1), 2, 0)


def stack(make, layers, rngs):
    """`layers` modules as one, with a leading layer axis on every weight."""
    keys = jax.random.split(rngs.params(), layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)
