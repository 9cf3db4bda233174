"""A mini base of 64 channels, for the placements that keep conditions clean."""

import shutil
from dataclasses import replace
from pathlib import Path

from flax import nnx

from vcloze_jax.devices import make_mesh
from vcloze_jax.inputs.papers import DEV
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import places, weights
from vcloze_jax.storage.models import LazyModels
from vcloze_jax.storage.preset import load_preset


def derive_clean_base(out: Path):
    """Write the shipped base, its adapter folded in, without the columns of img_in that read
    condition and mask: it has seen no clean token yet, and is where training begins."""
    folder = places.MINI_FOLDER
    preset = load_preset(folder)
    models = LazyModels(folder, preset, [(places.MINI_LORA, 1.0)], make_mesh())
    tree = nnx.to_pure_dict(nnx.state(models.flux))
    tree["img_in"]["kernel"] = tree["img_in"]["kernel"][: DEV.channels]
    preset = replace(preset, flux=replace(preset.flux, in_channels=DEV.channels))
    t5, clip = models.load_encoders()
    flux = nnx.merge(weights.abstract(Flux, preset.flux)[0], tree)
    weights.save_pipeline(out, preset, dict(flux=flux, vae=models.vae, t5=t5, clip=clip))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, out / name, dirs_exist_ok=True)
