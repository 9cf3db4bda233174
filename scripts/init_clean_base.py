"""Mini's base without the channels of a condition, for placements that keep conditions clean: DIR.

    python scripts/init_clean_base.py runs/start
    python train.py --weights runs/start --placement dev --rank 0 --data graphemoji-fill

What that learns ships as vcloze_jax/mini_clean: its card, vcloze_jax/mini/README.md, says how.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from vcloze_jax.inputs.papers import DEV
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import places, weights

if __name__ == "__main__":
    out, mini = Path(sys.argv[1]), places.MINI_FOLDER
    own = "README.md", "evaluation.png", places.MINI_LORA.name, "transformer"
    shutil.copytree(mini, out, ignore=shutil.ignore_patterns(*own))
    preset = weights.load_preset(mini)
    config = replace(preset.flux, in_channels=DEV.channels)
    tree = weights.read_tree(Flux, preset.flux, mini)
    tree["img_in"]["kernel"] = tree["img_in"]["kernel"][: DEV.channels]  # what is noisy comes first
    preset = replace(preset, flux=config)
    weights.save_pipeline(out, preset, {"flux": weights.build(Flux, config, tree)})
    print(weights.summary(out, weights.checked_preset(out)))
