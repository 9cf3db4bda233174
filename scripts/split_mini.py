"""Part an MMDiT that paints grids into mini's base, which infills, and mini's adapter.

    python train.py --weights CLOZE --data graphemoji-fill --rank 32 --out FILL
    python scripts/split_mini.py CLOZE FILL/lora.safetensors

All weights learn more than an adapter does, but what ships should be what FLUX.1-Fill and
VisualCloze are: a base that infills, and an adapter beside it. So an adapter learns to infill on
top of what paints grids; folded in, it makes the base, and its opposite is the adapter that leads
back. Together they are what was learnt, but for the base's rounding to bfloat16.
"""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import adapters, folding, places, weights


def main(folder, file, out=places.MINI_FOLDER):
    """The weights folder of what paints grids and the adapter that infills -> a weights folder, its
    adapter in it."""
    preset = weights.load_preset(folder)
    # As it ships: what is folded in here is what the opposite takes away.
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters.load(file, preset.flux))
    tree = weights.read_tree(Flux, preset.flux, folder)
    folding.fold(tree, adapter)
    shutil.copytree(folder, out, dirs_exist_ok=True)
    weights.save_pipeline(out, preset, {"flux": weights.build(Flux, preset.flux, tree)})
    adapters.save(out / places.MINI_LORA.name, opposite(adapter), "bfloat16")


def opposite(adapter):
    """The adapter that takes away what this one adds: the same A, with B and its bias negated."""
    negate = lambda path, x: x if path[-1].key == "lora_a" else -x  # noqa: E731
    return jax.tree_util.tree_map_with_path(negate, adapter)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
