"""Rows of pixels that the autoencoder has seen before are not encoded again.

A small model is shown a small set of pictures hundreds of times, and on a CPU their encoding is a
good part of a step (benchmarks/mini_step.py). What is kept is the posterior; latents are drawn from
it anew.
"""

from collections import OrderedDict
from functools import partial
from hashlib import blake2b

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.conditioning import Posteriors, blank, posterior_tokens, to_model
from vcloze_jax.model.ops import pack_mask
from vcloze_jax.sharding import compute_dtype
from vcloze_jax.step import merge_models

LIMIT = 3 * 2**30  # bytes; what was used longest ago goes first


def choose_row_encoder(trainer):
    """What encodes the rows of a Trainer: on one CPU a RowMemory; elsewhere its own program does, a
    whole micro-batch at once."""
    if trainer.mesh.size > 1 or trainer.mesh.devices.flat[0].platform != "cpu":
        return tuple
    vae = merge_models(trainer.graphdefs, trainer.frozen, names=("vae",)).vae
    return RowMemory(vae, trainer.recipe.mask_fill, compute_dtype(trainer.mesh))


class RowMemory:
    """Encodes the rows of a micro-batch, those that are new one by one: what comes of a row depends
    on no other, so that a run which goes on with an empty memory is the same run."""

    def __init__(self, vae, fill, dtype):
        self.encode = partial(jax.jit(partial(encode_row, fill=fill, dtype=dtype)), vae)
        self.kept, self.room = OrderedDict(), LIMIT

    def __call__(self, rows):
        """[(pixels uint8 [B, h, W, 3], mask bool [B, h, W] or None)] -> Posteriors, in NumPy."""
        parts = []
        for pixels, mask in jax.device_get(rows):
            nothing = np.zeros(pixels.shape[:3], bool)
            clean = [self.look_up(*row) for row in zip(pixels, nothing, strict=True)]
            blanked = clean
            if mask is not None:
                blanked = [self.look_up(*row) for row in zip(pixels, mask, strict=True)]
            tokens = pack_mask(nothing if mask is None else mask).astype(clean[0].dtype)
            parts.append((np.stack(clean, 1), np.stack(blanked, 1), tokens))
        clean, condition, mask = (np.concatenate(part, -2) for part in zip(*parts, strict=True))
        return Posteriors(tuple(clean), tuple(condition), mask)

    def look_up(self, pixels, mask):
        """Mean and std of one row's tokens, blanked by its mask: [2, s, 64]."""
        key = blake2b(pixels.tobytes() + mask.tobytes()).digest()
        if key not in self.kept:
            self.kept[key] = np.asarray(self.encode(pixels[None], mask[None]))
            self.room -= self.kept[key].nbytes
        self.kept.move_to_end(key)
        while self.room < 0:
            self.room += self.kept.popitem(last=False)[1].nbytes
        return self.kept[key]


def encode_row(vae, pixels, mask, *, fill, dtype):
    """One row, uint8 [1, h, W, 3], blanked by bool [1, h, W] -> its posterior's mean and std as
    tokens in model scale, [2, s, 64]."""
    moments = vae.moments(blank(to_model(pixels, dtype), mask, fill))
    return jnp.concatenate(posterior_tokens(vae, [moments]))
