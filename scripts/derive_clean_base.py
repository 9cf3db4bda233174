"""A mini base of 64 channels, for the placements that keep conditions clean: DIR.

    python scripts/derive_clean_base.py DIR
    python train.py --weights DIR --placement dev --rank 0 --data graphemoji --out runs/dev_base

It is the shipped base, its adapter folded in, without the columns of img_in that read condition and
mask: it has seen no clean token yet, and is where training begins.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from flax import nnx

from vcloze_jax.devices import make_mesh
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.placement import DEV
from vcloze_jax.storage import places, weights
from vcloze_jax.storage.models import LazyModels
from vcloze_jax.storage.preset import load_preset


def main(out):
    preset, folder = load_preset(places.MINI_FOLDER), places.MINI_FOLDER
    models = LazyModels(folder, preset, [(places.MINI_LORA, 1.0)], make_mesh())
    tree = nnx.to_pure_dict(nnx.state(models.flux))
    tree["img_in"]["kernel"] = tree["img_in"]["kernel"][: DEV.channels]
    preset = replace(preset, flux=replace(preset.flux, in_channels=DEV.channels))
    flux = nnx.merge(weights.abstract(Flux, preset.flux)[0], tree)
    t5, clip = models.load_encoders()
    parts = dict(flux=flux, vae=models.vae, t5=t5, clip=clip)
    weights.save_pipeline(out, preset, parts)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, out / name, dirs_exist_ok=True)
    print(f"{out}: {weights.summary(out, weights.checked_preset(out))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
