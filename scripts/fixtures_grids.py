"""Fixture of tests/test_parity_grids.py: what diffusers paints of grids of every kind.

Run by scripts/make_fixtures.py (needs torch, diffusers and transformers, extra `parity`).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import reference  # noqa: E402

from vcloze_jax.storage.textreader import Tokenizers  # noqa: E402


def main():
    """Write tests/data/grids.safetensors, by tests/reference.py: its weights, grids and noise are
    drawn again by whoever reads it.

    For each kind K and number of steps N `K/N/pixels` uint8 [h, W, 3] is the query row as it was
    decoded, `K/N/latents` float16 [S, 64] all latents at t = 0; `K/t5`, `K/clip` are the tokens of
    its prompt, so that other tokenizers of mini change nothing.
    """
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = reference.weights_folder(Path(folder, "weights"))
        fill = reference.load(folder)
        tokenizers = Tokenizers(folder, reference.PRESET.t5, reference.PRESET.clip)
        for name in reference.KINDS:
            for steps in reference.STEPS:
                inputs = reference.inputs(name, steps)
                t5, clip, _ = tokenizers([inputs[1]])
                arrays |= {f"{name}/t5": t5[0], f"{name}/clip": clip[0]}
                pixels, latents = reference.paint(fill, *inputs)
                arrays[f"{name}/{steps}/pixels"] = pixels
                arrays[f"{name}/{steps}/latents"] = latents.astype(np.float16)
    arrays = {name: np.ascontiguousarray(x) for name, x in sorted(arrays.items())}
    save_file(arrays, ROOT / "tests/data/grids.safetensors")


if __name__ == "__main__":
    main()
