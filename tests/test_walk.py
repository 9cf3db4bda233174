"""The law of the walk by hand: what is told to readers is what sample.py does."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from vcloze_jax.pipeline import Pipeline

WALK = Path(__file__).parents[1] / "examples/walk.py"


@pytest.mark.slow
def test_walk_paints_what_the_pipeline_paints(tmp_path, monkeypatch):
    """The cell that it makes stage by stage is the library's, to a rounding of levels; every
    chapter's picture is kept."""
    monkeypatch.chdir(tmp_path)
    walk = runpy.run_path(str(WALK))
    (painting,) = Pipeline.load().paint([WALK.with_name("3_two_examples.json")])
    assert np.abs(np.int16(walk["cell"]) - np.asarray(painting.images[0])).max() <= 1
    shown = re.findall(r'^show\("(\w+)"', WALK.read_text(), re.M)
    assert {file.stem for file in Path("outputs/walk").iterdir()} == set(shown)
