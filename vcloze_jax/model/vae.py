"""The autoencoder of FLUX: pictures [B, H, W, 3] in [-1, 1] to latents [B, H/8, W/8, 16] and back.

Source: black-forest-labs/flux:src/flux/modules/autoencoder.py; the order of levels and the Linear
attention are diffusers' (AutoencoderKL). Convolutions and mid attention see the whole picture, so
a row of a grid must be encoded at its exact width, in one piece.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from vcloze_jax.model.layers import Dense, uniform

QUERIES = 2**13  # of the attention, at once: their scores, with all keys, take 512 MiB at 1024²


class Conv(nnx.Module):
    """2-D convolution, NHWC, weights [kh, kw, in, out]."""

    def __init__(self, in_channels, out_channels, size=3, *, stride=1, padding="SAME", rngs):
        self.stride, self.padding = stride, padding
        shape, bound = (size, size, in_channels, out_channels), (size * size * in_channels) ** -0.5
        self.kernel = nnx.Param(uniform(rngs.params(), shape, bound))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, x):
        strides, kernel = (self.stride, self.stride), self.kernel.astype(x.dtype)
        layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.lax.conv_general_dilated(x, kernel, strides, self.padding, **layout)
        return y + self.bias.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over the whole picture, in float32."""

    def __init__(self, channels, groups):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x, eps=1e-6):
        # Sums run over pixels first: a reduction that keeps the channels last is vectorised.
        y = x.astype(jnp.float32)
        mean = self.pool(y.mean((1, 2), keepdims=True))  # B 1 1 C
        var = self.pool(jnp.square(y - mean).mean((1, 2), keepdims=True))
        gain = jax.lax.rsqrt(var + eps) * self.scale.astype(jnp.float32)
        return ((y - mean) * gain + self.bias.astype(jnp.float32)).astype(x.dtype)

    def pool(self, x):
        """Mean over the channels of each group, repeated to [B, 1, 1, C]."""
        group = x.shape[-1] // self.groups
        return jnp.repeat(x.reshape(*x.shape[:-1], -1, group).mean(-1), group, -1)


class ResBlock(nnx.Module):
    """Norm, SiLU, conv, twice, around a residual (1x1 conv where the width changes)."""

    def __init__(self, in_channels, out_channels, groups, *, rngs):
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv(out_channels, out_channels, rngs=rngs)
        changes = in_channels != out_channels
        self.shortcut = Conv(in_channels, out_channels, 1, rngs=rngs) if changes else None

    def __call__(self, x):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """One head over all pixels of the smallest level."""

    def __init__(self, channels, groups, *, rngs):
        self.norm = GroupNorm(channels, groups)
        for name in ("q", "k", "v", "proj"):
            setattr(self, name, Dense(channels, channels, rngs=rngs))

    def __call__(self, x):
        B, H, W, C = x.shape
        h = self.norm(x).reshape(B, H * W, 1, C)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if H * W <= QUERIES:
            h = jax.nn.dot_product_attention(q, k, v)
        else:  # the same sums, without all scores at once: memory grows with the pixels only
            one = lambda q: jax.nn.dot_product_attention(q[:, None], k, v)[:, 0]  # noqa: E731
            h = jax.lax.map(one, q.swapaxes(0, 1), batch_size=QUERIES).swapaxes(0, 1)
        return x + self.proj(h).reshape(B, H, W, C)


class Mid(nnx.Module):
    def __init__(self, channels, groups, *, rngs):
        self.res1 = ResBlock(channels, channels, groups, rngs=rngs)
        self.attn = Attention(channels, groups, rngs=rngs)
        self.res2 = ResBlock(channels, channels, groups, rngs=rngs)

    def __call__(self, x):
        return self.res2(self.attn(self.res1(x)))


class Level(nnx.Module):
    """Residual blocks of one width, then the conv that halves or doubles the picture, if any."""

    def __init__(self, in_channels, out_channels, layers, groups, resize, *, rngs):
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.res = nnx.List([ResBlock(w, out_channels, groups, rngs=rngs) for w in widths])
        self.resize = resize(out_channels, out_channels, rngs=rngs) if resize else None

    def __call__(self, x):
        for block in self.res:
            x = block(x)
        return x if self.resize is None else self.resize(x)


class Encoder(nnx.Module):
    """Picture -> mean and log variance of the latent, [B, H/8, W/8, 2 * latent_channels]."""

    def __init__(self, c, *, rngs):
        # Padding after the last row and column only, as the original's (0, 1, 0, 1).
        half = partial(Conv, stride=2, padding=((0, 1), (0, 1)))
        ins, last = (c.channels[0], *c.channels[:-1]), len(c.channels) - 1
        self.conv_in = Conv(3, c.channels[0], rngs=rngs)
        self.down = nnx.List(
            Level(a, b, c.layers, c.groups, half if i < last else None, rngs=rngs)
            for i, (a, b) in enumerate(zip(ins, c.channels, strict=True))
        )
        self.mid = Mid(c.channels[-1], c.groups, rngs=rngs)
        self.norm_out = GroupNorm(c.channels[-1], c.groups)
        self.conv_out = Conv(c.channels[-1], 2 * c.latent_channels, rngs=rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Double(nnx.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, in_channels, out_channels, *, rngs):
        self.conv = Conv(in_channels, out_channels, rngs=rngs)

    def __call__(self, x):
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))


class Decoder(nnx.Module):
    """Latent -> picture; level 0 is the smallest, the first that runs."""

    def __init__(self, c, *, rngs):
        widths = c.channels[::-1]
        ins, last = (widths[0], *widths[:-1]), len(widths) - 1
        self.conv_in = Conv(c.latent_channels, widths[0], rngs=rngs)
        self.mid = Mid(widths[0], c.groups, rngs=rngs)
        self.up = nnx.List(
            Level(a, b, c.layers + 1, c.groups, Double if i < last else None, rngs=rngs)
            for i, (a, b) in enumerate(zip(ins, widths, strict=True))
        )
        self.norm_out = GroupNorm(widths[-1], c.groups)
        self.conv_out = Conv(widths[-1], 3, rngs=rngs)

    def __call__(self, z):
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VAE(nnx.Module):
    """Encoder, decoder, and the shift and scale that bring latents to unit size."""

    def __init__(self, c, *, rngs):
        self.config = c
        self.encoder = Encoder(c, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)

    def moments(self, x):
        """x [B, H, W, 3] in [-1, 1] -> mean, std of the raw latent, each [B, H/8, W/8, 16]."""
        mean, logvar = jnp.split(self.encoder(x), 2, -1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))

    def scaled(self, z):
        """Raw latent -> model latent."""
        return (z - self.config.shift) * self.config.scale

    def encode(self, x):
        """Model latent of x, the posterior's mean."""
        return self.scaled(self.moments(x)[0])

    def decode(self, z):
        """Model latent [B, h, w, 16] -> picture [B, 8h, 8w, 3], about [-1, 1]."""
        return self.decoder(z / self.config.scale + self.config.shift)
