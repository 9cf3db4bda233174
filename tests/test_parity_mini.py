"""The shipped model in diffusers, transformers and peft: they paint the pictures that we paint.

tests/reference.py says how diffusers paints; test_parity_grids.py knows more kinds of grids.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
import reference

from vcloze_jax.config import MINI
from vcloze_jax.grid import Spec
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.pipeline import load_painter
from vcloze_jax.storage import places

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[1] / "examples"
SPECS = ("3_two_examples", "8_partly_masked")


@pytest.fixture(scope="module")
def pipeline():
    """The shipped folder as diffusers' own pipeline, all its parts in float32, with the adapter."""
    pytest.importorskip("diffusers"), pytest.importorskip("peft")
    return reference.load(places.MINI_FOLDER, places.MINI_LORA)


@pytest.fixture(scope="module")
def painter():
    return load_painter(None, None, None)


@pytest.mark.parametrize("steps", [4, 30])
@pytest.mark.parametrize("name", SPECS)
def test_same_picture(pipeline, painter, name, steps):
    """From the same noise, diffusers' picture is ours to 2 of 255 levels, on average to a quarter:
    float32 sums in another order, N calls deep, and a sinusoid that differs in its last digit."""
    (spec,) = read_specs([EXAMPLES / f"{name}.json"], MINI)
    noise = np.asarray(jax.random.normal(jax.random.key(1), (spec.grid.tokens, 64)))
    (ours,) = painter([Spec(spec.grid, spec.prompt, steps, spec.guidance_scale, latents=noise)])
    theirs, _ = reference.paint(pipeline, spec.grid, spec.prompt, steps, spec.guidance_scale, noise)
    difference = np.abs(theirs.astype(int) - ours.pixels)
    print(f"{name}, {steps} steps: at most {difference.max()}, mean {difference.mean():.4f}")
    assert theirs.std() > 20  # a picture, not a plain colour
    assert difference.max() <= 2 and difference.mean() < 0.25
