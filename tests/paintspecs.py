"""Specs of small grids, and what is read of what they paint."""

from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = Path(__file__).parents[1] / "examples/pictures"
POODLE, ROCKET = (
    [f"{PICTURES}/{name}_{view}.png" for view in ("fluent_flat", "fluent_3d")]
    for name in ("poodle", "rocket")
)
HALF = {"image": ROCKET[1], "mask": f"{PICTURES}/right_half.png"}
TOKENS = 16  # of a grid of two rows of two cells of 32 x 32


# What is asked of most tests: an example, and a query with its target blank or half blank.
BLANK = {"image": [POODLE, [ROCKET[0], None]]}
PARTLY = {"image": [POODLE, [None, HALF]], "task_prompt": "Draw.", "seed": 7}
SMALL = {"resolution": 32, "num_inference_steps": 2}


def pixels(file):
    return np.asarray(Image.open(file))


def names(out):
    return sorted(file.name for file in out.iterdir()) if out.exists() else []
