"""Rows of pixels that the autoencoder has seen before are not encoded again.

A small model is shown a small set of pictures hundreds of times, and on a CPU their encoding is a
good part of a step (benchmarks/mini_step.py); with --cache a large one is spared it, too. What is
kept is the posterior; latents are drawn from it anew.
"""

from collections import OrderedDict
from functools import partial
from hashlib import blake2b

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.conditioning import Posteriors, blank, posterior_tokens, to_model
from vcloze_jax.model.ops import pack_mask
from vcloze_jax.placement import FILL
from vcloze_jax.sharding import compute_dtype, spread
from vcloze_jax.step import merge_models

LIMIT = 3 * 2**30  # bytes; what was used longest ago goes first


def choose_readers(trainer, cache):
    """Have a Trainer read from a GridCache or, on one CPU, from memory; elsewhere its own program
    encodes, a whole micro-batch at once. Before anything is compiled."""
    alone = trainer.mesh.size == 1 and trainer.mesh.devices.flat[0].platform == "cpu"
    if cache or alone:
        vae = merge_models(trainer.graphdefs, trainer.frozen, names=("vae",)).vae
        how = trainer.recipe.mask_fill, compute_dtype(trainer.mesh)
        memory = RowMemory(vae, *how, cache and cache.rows, trainer.preset.flux.placement)
        trainer.read_rows = partial(memory.read_rows, mesh=trainer.mesh)
    if cache:
        trainer.read_prompts = partial(cache.read_prompts, tokenizers=trainer.tokenizers)


class RowMemory:
    """Encodes rows of grids, those that are new one by one on one device: what comes of a row
    depends on no other and on no mesh, so that a run which goes on with an empty memory is the same
    run. With a `store` of arrays what is encoded is kept there, too."""

    def __init__(self, vae, fill, dtype, store=None, placement=FILL):
        here = jax.tree.map(lambda x: x.addressable_data(0), vae)  # each device has all of it
        self.encode = partial(jax.jit(partial(encode_row, fill=fill, dtype=dtype)), here)
        self.placement, self.store = placement, store
        self.kept, self.room = OrderedDict(), LIMIT

    def read_rows(self, examples, mesh):
        """Examples of one shape (None: another host's) -> their Posteriors on the mesh."""
        read = [x and self.encode_grid(x.grid) for x in examples]
        arrays = [spread([x and x[i] for x in read], mesh) for i in range(5)]
        return Posteriors(tuple(arrays[:2]), tuple(arrays[2:4]), arrays[4])

    def encode_grid(self, grid):
        """Mean and std of a grid's rows, then those of its blanked rows, as tokens in model scale,
        [S, 64] each; and its mask's [S, 256]; in NumPy."""
        parts = []
        for row in grid.pictures(self.placement):
            clean = self.look_up(row.pixels, np.zeros_like(row.mask))
            blanked = self.look_up(row.pixels, row.mask)
            parts.append((*clean, *blanked, pack_mask(row.mask[None])[0].astype(clean.dtype)))
        return [np.concatenate(of_rows) for of_rows in zip(*parts, strict=True)]

    def look_up(self, pixels, mask):
        """Mean and std of one row's tokens, blanked by its mask: [2, s, 64]."""
        key = blake2b(repr(mask.shape).encode() + pixels.tobytes() + mask.tobytes()).digest()
        if key not in self.kept:
            self.kept[key] = self.recall(pixels, mask)
            self.room -= self.kept[key].nbytes
        self.kept.move_to_end(key)
        while self.room < 0:
            self.room += self.kept.popitem(last=False)[1].nbytes
        return self.kept[key]

    def recall(self, pixels, mask):
        """The same of a row that is not in memory."""
        if self.store and (found := self.store.read((pixels, mask))):
            return found[0]
        moments = np.asarray(self.encode(pixels[None], mask[None]))
        if self.store:
            self.store.write((pixels, mask), [moments])
        return moments


def encode_row(vae, pixels, mask, *, fill, dtype):
    """One row, uint8 [1, h, W, 3], blanked by bool [1, h, W] -> its posterior's mean and std as
    tokens in model scale, [2, s, 64]."""
    moments = vae.moments(blank(to_model(pixels, dtype), mask, fill))
    return jnp.concatenate(posterior_tokens(vae, [moments]))
