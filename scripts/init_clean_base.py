"""Mini with a random MMDiT of 64 channels, for placements that keep conditions clean: DIR.

    python scripts/init_clean_base.py runs/start
    python train.py --weights runs/start --placement dev --rank 0 --data graphemoji-fill

What that learnt at commit 6e9c3d8, when mini was smaller, ships as vcloze_jax/mini_clean.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from flax import nnx

from vcloze_jax.config import MINI
from vcloze_jax.inputs.papers import DEV
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import places, weights

if __name__ == "__main__":
    out = Path(sys.argv[1])
    own = "README.md", "evaluation.png", places.MINI_LORA.name, "transformer"
    shutil.copytree(places.MINI_FOLDER, out, ignore=shutil.ignore_patterns(*own))
    config = replace(MINI.flux, in_channels=DEV.channels)
    flux = Flux(config, rngs=nnx.Rngs(params=0))
    weights.save_pipeline(out, replace(MINI, flux=config), {"flux": flux})
    print(weights.summary(out, weights.checked_preset(out)))
