"""Pixels and token ids -> what the MMDiT reads.

Text, positions, blanking and the velocity are the same for training and sampling; sampling takes
the mean of a picture's posterior, training a draw from it. A token stands for 16 x 16 pixels: the
autoencoder makes 16 channels of each 8 x 8, `pack` puts 2 x 2 of these into 64 channels, and a mask
of them becomes 256 (`pack_mask`). `rope_table` has the angles of a token's position, three numbers.
In FILL, the paper's Placement, every token is noisy, none is `clean`, and segments tell nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.ops import pack, pack_mask, rope_table
from vcloze_jax.model.text import CLIPTextEncoder, T5Encoder
from vcloze_jax.model.vae import VAE
from vcloze_jax.placement import kind_of

BLACK = -1.0  # of a blank cell, in model range
GREY = 0.0  # of what stock Fill masks: the second pass


class Models(NamedTuple):
    """The four networks of one preset; None for one that is not at hand."""

    flux: Flux | None
    vae: VAE | None
    t5: T5Encoder | None
    clip: CLIPTextEncoder | None


class Context(NamedTuple):
    """What the MMDiT reads beside the noisy tokens, the same for the loss and for sampling."""

    condition: jax.Array  # [B, S, 320]: latent of the blanked grid | mask; or [B, S, 0]
    txt: jax.Array  # [B, T, text_width]; before the text is encoded its ids, int32 [B, T]
    pooled: jax.Array  # [B, vec_width]; or ids
    guidance: jax.Array  # float32 [B]
    pe: tuple[jax.Array, jax.Array]  # cos, sin float32 [B or 1, T + S, 1, K/2]
    lengths: jax.Array | None = None  # int32 [B], real tokens, text included; None: no padding
    segments: jax.Array | None = None  # int32 [B, S], of a Placement by segments


def to_model(pixels, dtype=jnp.float32):
    """uint8 pixels -> [-1, 1]."""
    return (pixels.astype(jnp.float32) / 127.5 - 1).astype(dtype)


def check_painted(x):
    """Raise FloatingPointError for a picture or its latents, on the host, that hold NaN or inf."""
    if not np.isfinite(x).all():
        raise FloatingPointError("the painted picture is not finite; no picture is written")


def to_pixels(x):
    """Decoded pictures -> uint8, rounded half to even. Raises FloatingPointError on NaN or inf."""
    check_painted(x := np.asarray(x, np.float32))
    return np.rint(np.clip((x + 1) / 2, 0, 1) * 255).astype(np.uint8)


def blank(x, mask, fill):
    """x [B, h, W, 3] with its pixels at `fill` where mask bool [B, h, W] is True."""
    return jnp.where(mask[..., None], jnp.asarray(fill, x.dtype), x)


def encode_condition(vae, pixels, mask, fill=BLACK, dtype=jnp.float32):
    """One row of a grid to paint, uint8 [B, h, W, 3], and its mask, bool [B, h, W] -> tokens
    [B, S, 320]: latent of the blanked row | mask."""
    latent = vae.encode(blank(to_model(pixels, dtype), mask, fill))
    return jnp.concatenate([pack(latent), pack_mask(mask.astype(latent.dtype))], -1)


def encode_picture(vae, pixels, dtype=jnp.float32):
    """uint8 [B, h, W, 3] -> clean latent tokens [B, S, 64], the posterior's mean."""
    return pack(vae.encode(to_model(pixels, dtype)))


class Posteriors(NamedTuple):
    """All rows of a micro-batch as the autoencoder sees them, in model scale, and their masks."""

    truth: tuple  # mean and std, each [B, S, 64]
    blanked: tuple  # likewise, of the rows with their masked pixels at `fill`
    mask: jax.Array  # [B, S, 256]


def encode_rows(vae, rows, fill, dtype=jnp.float32):
    """Rows (pixels uint8 [B, h, W, 3], mask bool [B, h, W]) of a micro-batch -> Posteriors.

    Where nothing is ever masked the mask is None, and the row is encoded once.
    """
    truth = [to_model(pixels, dtype) for pixels, _ in rows]
    masks = [np.zeros(p.shape[:3], bool) if mask is None else mask for p, mask in rows]
    masked = [i for i, (_, mask) in enumerate(rows) if mask is not None]
    posteriors = encode_each(vae, truth + [blank(truth[i], masks[i], fill) for i in masked])
    of_truth = dict(enumerate(posteriors[: len(rows)]))
    of_blanked = of_truth | dict(zip(masked, posteriors[len(rows) :], strict=True))
    tokens = (posterior_tokens(vae, of.values()) for of in (of_truth, of_blanked))
    return Posteriors(*tokens, jnp.concatenate([pack_mask(m.astype(dtype)) for m in masks], 1))


def draw_training(posteriors, keys):
    """Posteriors -> clean latents [B, S, 64], condition [B, S, 320], share [B, S].

    Latent and condition are two draws from the posterior, by the B `keys`. The share is that of a
    token's masked pixels. Source: lzyhha/VisualCloze:train.py.
    """
    (mean, std), (condition_mean, condition_std), mask = posteriors
    draw = jax.vmap(lambda key: jax.random.normal(key, (2, *mean.shape[1:]), mean.dtype))
    draws = draw(keys)  # B 2 S 64
    condition = condition_mean + condition_std * draws[:, 1]
    share = mask.astype(jnp.float32).mean(-1)
    return mean + std * draws[:, 0], jnp.concatenate([condition, mask], -1), share


def posterior_tokens(vae, posteriors):
    """(mean, std) of all rows -> mean and std as tokens in model scale, each [B, S, 64]."""
    means, stds = zip(*posteriors, strict=True)
    mean = jnp.concatenate([pack(vae.scaled(mean)) for mean in means], 1)
    return mean, jnp.concatenate([pack(std * vae.config.scale) for std in stds], 1)


def encode_each(vae, pictures):
    """Posterior (mean, std) of every picture [B, h, W, 3]; those of equal shape share one pass, in
    which all of a sample's stay where the sample is."""
    groups = {}
    for i, x in enumerate(pictures):
        groups.setdefault(x.shape, []).append(i)
    posteriors = {}
    for (B, *shape), members in groups.items():
        joined = jnp.stack([pictures[i] for i in members], 1).reshape(-1, *shape)
        mean, std = (m.reshape(B, len(members), *m.shape[1:]) for m in vae.moments(joined))
        posteriors.update({i: (mean[:, k], std[:, k]) for k, i in enumerate(members)})
    return [posteriors[i] for i in range(len(pictures))]


def enter(x, condition, segments, placement):
    """Noisy tokens x [..., S, 64] and condition [..., S, 320] as they enter: what is clean is its
    own latent, and with 64 channels nothing stands beside it. FILL leaves both alone."""
    if any(placement.clean):
        x = put_clean(x, condition[..., : x.shape[-1]], segments, placement)
    return x, condition[..., : placement.channels - x.shape[-1]]


def put_clean(x, clean, segments, placement):
    """x [..., S, D], but `clean` where a token's segment enters clean."""
    return jnp.where(jnp.asarray(placement.clean)[kind_of(segments)][..., None], clean, x)


def segment_table(grids, placement, size):
    """Segments of the tokens, padded to `size`: int32 [B, size]; None where nobody asks."""
    if not placement.by_segment:
        return None
    return np.stack([np.pad(grid.segments(placement), (0, size - grid.tokens)) for grid in grids])


def position_table(grids, config, text_tokens, size):
    """RoPE tables of text and image tokens, padded to `size`: float32 [B, T + size, 1, K/2].

    Text and its padding, which is seen as in FLUX, stand at (0, 0, 0); so does img's, unseen.
    """
    ids = np.zeros((len(grids), text_tokens + size, 3), np.float32)
    for of_grid, grid in zip(ids, grids, strict=True):
        of_grid[text_tokens : text_tokens + grid.tokens] = grid.ids(config.placement)
    return rope_table(ids, config.axes_dim, config.theta)


def encode_text(t5, clip, t5_ids, clip_ids, dtype=jnp.float32):
    """Token ids -> txt [B, T, text_width] and pooled [B, vec_width]."""
    return t5(t5_ids).astype(dtype), clip(clip_ids).astype(dtype)


def velocity(flux, x, mod, context):
    """What the MMDiT says about tokens x [B, S, 64]: velocity [B, S, 64], 0 of what is clean.

    `mod` is flux.modulation of their time, apart, so that a sampler computes all steps' at once.
    """
    condition, segments = context.condition, context.segments
    img = jnp.concatenate([x.astype(condition.dtype), condition], -1)  # B S 384, or 64
    out = flux(img, context.txt, mod, context.pe, context.lengths, segments)
    return out if segments is None else put_clean(out, 0, segments, flux.config.placement)
