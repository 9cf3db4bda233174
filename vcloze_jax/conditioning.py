"""Pixels and prompts -> what the MMDiT reads. Training and sampling share every line of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.ops import pack, pack_mask, rope_table
from vcloze_jax.model.text import CLIPTextEncoder, T5Encoder
from vcloze_jax.model.vae import VAE

BLACK = -1.0  # of a blank cell, in model range
GREY = 0.0  # of what stock Fill masks: the second pass


class Models(nnx.Module):
    """The four networks of one preset, as one tree: flux/, vae/, t5/, clip/."""

    def __init__(self, preset, *, rngs):
        self.flux = Flux(preset.flux, rngs=rngs)
        self.vae = VAE(preset.vae, rngs=rngs)
        self.t5 = T5Encoder(preset.t5, rngs=rngs)
        self.clip = CLIPTextEncoder(preset.clip, rngs=rngs)


def to_model(pixels, dtype=jnp.float32):
    """uint8 pixels -> [-1, 1]."""
    return (pixels.astype(jnp.float32) / 127.5 - 1).astype(dtype)


def to_pixels(x):
    """Decoded pictures -> uint8, rounded half to even. Raises FloatingPointError on NaN or inf."""
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
        raise FloatingPointError("the decoded picture is not finite; no picture is written")
    return np.rint(np.clip((x + 1) / 2, 0, 1) * 255).astype(np.uint8)


def blank(x, mask, fill):
    """x [B, h, W, 3] with its masked pixels at `fill`."""
    return jnp.where(mask[..., None], jnp.asarray(fill, x.dtype), x)


def condition_tokens(latent, mask):
    """Latent of the blanked picture [B, h/8, W/8, 16] and its mask [B, h, W] -> [B, S, 320]."""
    return jnp.concatenate([pack(latent), pack_mask(mask.astype(latent.dtype))], -1)


def encode_condition(vae, pixels, mask, fill=BLACK, dtype=jnp.float32):
    """One row of a grid to paint, uint8 [B, h, W, 3] and bool [B, h, W] -> tokens [B, S, 320]."""
    return condition_tokens(vae.encode(blank(to_model(pixels, dtype), mask, fill)), mask)


def encode_picture(vae, pixels, dtype=jnp.float32):
    """uint8 [B, h, W, 3] -> clean latent tokens [B, S, 64], the posterior's mean."""
    return pack(vae.encode(to_model(pixels, dtype)))


def encode_training(vae, rows, fill, key, dtype=jnp.float32):
    """Rows of a micro-batch -> clean latents [B, S, 64], condition [B, S, 320], mask [B, S].

    A row is (pixels uint8 [B, h, W, 3], mask bool [B, h, W] or None where nothing is ever
    masked). Latent and condition are two draws from the posterior; without a mask it is the same
    posterior, and the row is encoded once. The mask returned is the masked share of each token.
    Source: lzyhha/VisualCloze:train.py.
    """
    clean = [to_model(pixels, dtype) for pixels, _ in rows]
    masked = {i: mask for i, (_, mask) in enumerate(rows) if mask is not None}
    blanked = [blank(clean[i], mask, fill) for i, mask in masked.items()]
    posteriors = encode_each(vae, clean + blanked)  # of all clean rows, then of the blanked ones
    of_blanked = dict(zip(masked, posteriors[len(rows) :], strict=True))

    def tokens(posteriors):
        """Mean and deviation of all rows as tokens, [2, B, S, 64], in model scale."""
        parts = [[pack(vae.scaled(mean)), pack(std * vae.config.scale)] for mean, std in posteriors]
        return jnp.concatenate([jnp.stack(part) for part in parts], 2)

    clean_tokens = tokens(posteriors[: len(rows)])
    blanked_tokens = tokens([of_blanked.get(i, posteriors[i]) for i in range(len(rows))])
    draws = jax.random.normal(key, clean_tokens.shape, dtype)  # one for each of the two
    latents, condition = (
        mean + std * draw
        for (mean, std), draw in zip((clean_tokens, blanked_tokens), draws, strict=True)
    )
    no_mask = [jnp.zeros(x.shape[:3], dtype) for x in clean]
    packed = [pack_mask(masked.get(i, no).astype(dtype)) for i, no in enumerate(no_mask)]
    mask = jnp.concatenate(packed, 1)  # B S 256
    share = mask.astype(jnp.float32).mean(-1)
    return latents, jnp.concatenate([condition, mask], -1), share


def encode_each(vae, pictures):
    """Posterior (mean, std) of every picture [B, h, W, 3]; those of equal shape share one pass."""
    groups = {}
    for i, x in enumerate(pictures):
        groups.setdefault(x.shape, []).append(i)
    posteriors = {}
    for members in groups.values():
        moments = vae.moments(jnp.concatenate([pictures[i] for i in members]))
        parts = zip(*(jnp.split(m, len(members)) for m in moments), strict=True)
        posteriors.update(zip(members, parts, strict=True))
    return [posteriors[i] for i in range(len(pictures))]


def position_table(grids, config, text_tokens, bucket):
    """RoPE tables of text and image tokens, padded to `bucket`: float32 [B, T + bucket, 1, K/2].

    Text stands at (0, 0, 0); so does padding, which nobody attends to.
    """
    ids = np.zeros((len(grids), text_tokens + bucket, 3), np.float32)
    for row, grid in zip(ids, grids, strict=True):
        row[text_tokens : text_tokens + grid.tokens] = grid.ids()
    return rope_table(ids, config.axes_dim, config.theta)


def encode_text(t5, clip, t5_ids, clip_ids, dtype=jnp.float32):
    """Token ids -> txt [B, T, text_width] and pooled [B, vec_width]."""
    return t5(t5_ids).astype(dtype), clip(clip_ids).astype(dtype)


def velocity(flux, x, condition, txt, mod, pe, lengths=None):
    """What the MMDiT says about noisy tokens x [B, S, 64]: velocity [B, S, 64]."""
    img = jnp.concatenate([x.astype(condition.dtype), condition], -1)  # B S 384
    return flux(img, txt, mod, pe, lengths)
