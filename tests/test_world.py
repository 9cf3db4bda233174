"""Laws of what mini says of grids that are unlike what it was trained on."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from vcloze_jax.config import MINI
from vcloze_jax.data.graph import NODES
from vcloze_jax.data.graphemoji import read_nodes
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.spec import read_spec
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.inputs.world import describe_unlike_mini, has_icon_border

ROOT = Path(__file__).parents[1]
PHOTOS = "astronaut", "camera", "chelsea", "coffee", "coins", "rocket", "grass", "gravel", "brick"


def test_what_it_was_trained_on():
    """Of mini's own nodes, held out from training, nine in ten or more are known by their borders,
    and of nearly all nodes all are."""
    _, nodes = read_nodes("held_out")
    shares = np.array([[has_icon_border(x) for x in column] for column in nodes.swapaxes(0, 1)])
    known = dict(zip(NODES, shares.mean(1), strict=True))
    assert min(known.values()) > 0.9 and sum(share == 1 for share in known.values()) >= 15, known


def test_the_examples():
    """The examples that ship are of its world."""
    specs = read_specs(sorted(ROOT.glob("examples/*.json")), MINI)
    assert [describe_unlike_mini(spec) for spec in specs] == [""] * len(specs)


@pytest.mark.parametrize("name", PHOTOS)
def test_photographs(name):
    """A photograph is none of it, also beside a condition that it has a mask for."""
    photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((64, 64))
    mask = Image.new("RGB", (64, 64))
    for rows in ([[photo, None]], [[photo, mask], [photo, None]]):
        sentence = describe_unlike_mini(read_spec({"image": rows}, MINI))
        assert sentence.endswith(" and does not do photographs well")


@pytest.mark.parametrize(
    "colour, is_told", [((20, 30, 90), True), ("black", False), ("white", False)]
)
def test_grounds(colour, is_told):
    """A column of pictures on a colour is told, also where the other is an icon on white; one on
    black or white is not."""
    icon = Image.open(ROOT / "examples/pictures/rocket_fluent_3d.png").convert("RGB")
    other = Image.new("RGB", (64, 64), colour)
    other.paste(icon.resize((32, 32)), (16, 16))
    sentence = describe_unlike_mini(read_spec({"image": [[icon, other], [icon, None]]}, MINI))
    assert sentence.endswith("does not do grounds of other colours well") == is_told
    assert bool(sentence) == is_told


def test_all_at_once():
    """Size and second pass are told, too, all in one sentence."""
    icon = Image.open(ROOT / "examples/pictures/poodle_fluent_3d.png")
    table = {"image": [[icon, None]], "resolution": 128, "upsampling": {}}
    assert describe_unlike_mini(read_spec(table, MINI)) == (
        "mini was trained on icons on white of 64x64, and does not do cells of 128x128 or a second "
        "pass well"
    )


def test_nothing_is_given():
    """A grid without any given cell is no photograph."""
    grid = Grid.from_cells(np.zeros((1, 2, 64, 64, 3), np.uint8), np.ones((1, 1, 1, 1), bool))
    spec = read_spec({"image": [[None, None]]}, MINI)
    assert spec.grid.shape == grid.shape and describe_unlike_mini(spec) == ""
