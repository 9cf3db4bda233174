"""What FLUX reads of a prompt: all tokens through a T5 encoder, one vector out of CLIP.

Shapes: B batch, T tokens, D width, H heads, K head dim. Both encoders compute in the dtype of
their embeddings, with norms and softmax in float32. Blocks are one module whose weights carry
a leading layer axis. Source: huggingface/transformers:src/transformers/models/{t5,clip}.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from vcloze_jax.config import CLIPConfig, T5Config
from vcloze_jax.model.layers import Dense, RMSNorm, stack
from vcloze_jax.model.ops import layer_norm
from vcloze_jax.sharding import COLUMNS, ROWS, by_batch, fetched, gathered


class T5Encoder(nnx.Module):
    """T5 v1.1: gated GELU, no biases, RMS norms; positions enter as a bias of the scores only."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = nnx.Param(normal(1.0)(rngs.params(), (c.vocab, c.width)))
        self.relative_bias = nnx.Param(normal(c.width**-0.5)(rngs.params(), (c.buckets, c.heads)))
        self.blocks = stack(lambda rngs: T5Block(c, rngs=rngs), c.layers, rngs)
        self.norm = RMSNorm(c.width)

    def __call__(self, ids):
        """Token ids int32 [B, T] -> [B, T, D]. Padding is attended like any word, as FLUX does."""
        c = self.config
        buckets = relative_buckets(ids.shape[1], c.buckets, c.max_distance)  # T T
        bias = jnp.moveaxis(self.relative_bias[buckets], -1, 0)[None]  # 1 H T T
        x = by_batch(gathered(self.embed[...])[ids])  # B T D
        x, _ = jax.lax.scan(lambda x, block: (fetched(block)(x, bias), None), x, self.blocks)
        return self.norm(x)


class T5Block(nnx.Module):
    """Attention, then a gated MLP, each behind its own norm."""

    def __init__(self, c, *, rngs):
        inner, dense = c.heads * c.head_dim, dict(use_bias=False, rngs=rngs)
        self.heads = c.heads
        self.norm1 = RMSNorm(c.width)
        # Scores are not divided by sqrt(K): at birth the queries are, instead.
        self.q = Dense(c.width, inner, split=COLUMNS, std=(c.width * c.head_dim) ** -0.5, **dense)
        self.k, self.v = (Dense(c.width, inner, split=COLUMNS, **dense) for _ in range(2))
        self.o = Dense(inner, c.width, split=ROWS, **dense)
        self.norm2 = RMSNorm(c.width)
        self.wi_0 = Dense(c.width, c.mlp, split=COLUMNS, **dense)
        self.wi_1 = Dense(c.width, c.mlp, split=COLUMNS, **dense)
        self.wo = Dense(c.mlp, c.width, split=ROWS, **dense)

    def __call__(self, x, bias):
        """x [B, T, D], bias [1, H, T, T] -> [B, T, D]."""
        x = x + attend(self, self.norm1(x), scale=1.0, bias=bias)
        h = self.norm2(x)
        return x + self.wo(jax.nn.gelu(self.wi_0(h), approximate=True) * self.wi_1(h))


def relative_buckets(length, buckets, max_distance):
    """Bucket of key minus query position, int [T, T]: one half for each sign; in each half, near
    distances have a bucket of their own and far ones share logarithmic ones up to `max_distance`.

    float32, as in the reference: float64 puts some distances on the other side of an edge.
    """
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    half, near = buckets // 2, buckets // 4
    octave = np.log(np.maximum(distance, 1).astype(np.float32) / near)
    far = near + (octave / math.log(max_distance / near) * (half - near)).astype(int)
    return np.where(distance < near, distance, np.minimum(far, half - 1)) + half * (offset > 0)


class CLIPTextEncoder(nnx.Module):
    """CLIP's text tower: causal, learned positions, pooled where the prompt ends."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = nnx.Param(normal(0.02)(rngs.params(), (c.vocab, c.width)))
        self.positions = nnx.Param(normal(0.01)(rngs.params(), (c.max_length, c.width)))
        self.blocks = stack(lambda rngs: CLIPBlock(c, rngs=rngs), c.layers, rngs)
        self.norm = LayerNorm(c.width)

    def __call__(self, ids):
        """Token ids int32 [B, T], T <= max_length -> [B, D], read at the first `eos` of a row."""
        x = by_batch(gathered(self.embed[...])[ids]) + self.positions[None]  # B T D
        x, _ = jax.lax.scan(lambda x, block: (fetched(block)(x), None), x, self.blocks)
        first = jnp.argmax(ids == self.config.eos, axis=1)[:, None, None]  # B 1 1
        return self.norm(jnp.take_along_axis(x, first, 1)[:, 0])


class CLIPBlock(nnx.Module):
    """Causal attention, then an MLP with the quick GELU, each behind its own norm."""

    def __init__(self, c, *, rngs):
        self.heads = c.heads
        self.norm1 = LayerNorm(c.width)
        qkv = (Dense(c.width, c.width, split=COLUMNS, rngs=rngs) for _ in range(3))
        self.q, self.k, self.v = qkv
        self.o = Dense(c.width, c.width, split=ROWS, rngs=rngs)
        self.norm2 = LayerNorm(c.width)
        self.fc1 = Dense(c.width, c.mlp, split=COLUMNS, rngs=rngs)
        self.fc2 = Dense(c.mlp, c.width, split=ROWS, rngs=rngs)

    def __call__(self, x):
        """x [B, T, D] -> [B, T, D]."""
        x = x + attend(self, self.norm1(x), is_causal=True)
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * jax.nn.sigmoid(1.702 * h))


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias over the last axis, in float32."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        y = layer_norm(x.astype(jnp.float32), eps=1e-5)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def attend(block, x, **options):
    """Self-attention of a block on normed x [B, T, D] -> [B, T, D]; softmax in float32."""
    q, k, v = (f(x).reshape(*x.shape[:2], block.heads, -1) for f in (block.q, block.k, block.v))
    out = jax.nn.dot_product_attention(q, k, v, implementation="xla", **options)  # B T H K
    return block.o(out.reshape(*x.shape[:2], -1))
