"""Laws of spec.py: a good spec becomes one grid and prompt."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from specfolder import GRID, LAYOUT, make_folder, read

from vcloze_jax.config import FLUX_FILL, MINI, UserError
from vcloze_jax.grid import Spec
from vcloze_jax.inputs.cells import build_grid
from vcloze_jax.inputs.spec import KEYS
from vcloze_jax.inputs.specfiles import IMAGES, read_specs, write_spec


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


# --- what a good spec becomes ---


@pytest.mark.parametrize("preset, side, steps", [(MINI, 64, 30), (FLUX_FILL, 384, 30)])
def test_only_image_is_required(folder, preset, side, steps):
    """Law: everything but `image` has the preset's default."""
    spec = read(folder, {"image": GRID}, preset)
    assert spec.name == "fox" and spec.source == folder / "fox.json"
    assert spec.grid.shape == ((side, 2 * side),) * 2 and spec.grid.targets == [1]
    assert (spec.num_inference_steps, spec.guidance_scale, spec.seed) == (steps, 30.0, 0)
    assert spec.prompt == LAYOUT
    assert spec.content_prompt == "" and spec.latents is None and spec.upsampling is None


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, LAYOUT),
        (dict.fromkeys(["layout_prompt", "task_prompt", "content_prompt", "task"]), LAYOUT),
        ({"layout_prompt": ""}, ""),
        ({"layout_prompt": "Two rows.", "task_prompt": ""}, "Two rows."),
        ({"task_prompt": "Paint."}, LAYOUT + " Paint."),
        (
            {"content_prompt": "a red fox", "layout_prompt": "", "task_prompt": "Paint."},
            "Paint. The last image of the last row depicts: a red fox",
        ),
        ({"content_prompt": "", "task_prompt": "Paint."}, LAYOUT + " Paint."),
        (
            {
                "content_prompt": "The bottom-right corner image presents: a fox",
                "layout_prompt": "",
            },
            "The bottom-right corner image presents: a fox",
        ),
        (
            {"task": "depth-to-image", "layout_prompt": ""},
            "In each row, a logical task is demonstrated to achieve [IMAGE2] a high-quality image "
            "based on [IMAGE1] depth map showing gray-scale object contours.",
        ),
    ],
)
def test_prompt(folder, given, expected):
    """Law: null is absent, "" is none, and the parts that are not empty are joined by one space."""
    assert read(folder, {"image": GRID, **given}).prompt == expected


def test_values_are_taken(folder):
    """Law: every value given is the value used; 0 is a seed."""
    values = {"resolution": 32, "num_inference_steps": 7, "guidance_scale": 3, "seed": 2**32 - 1}
    spec = read(folder, {"image": GRID, **values})
    assert spec.grid.shape == ((32, 64),) * 2
    assert (spec.num_inference_steps, spec.guidance_scale, spec.seed) == (7, 3.0, 2**32 - 1)


def test_null_means_absent(folder):
    """Law: null, for any key but the pictures, is what leaving it away is; so is a byte order mark
    before the file."""
    plain = read(folder, {"image": GRID})
    text = json.dumps({"image": GRID} | dict.fromkeys((*KEYS[1:], IMAGES)))
    for content in (text, "\ufeff" + text):
        assert read(folder, content.encode()).resolved == plain.resolved
    with pytest.raises(UserError, match="image: must be a list, not null"):
        read(folder, {"image": None})


def test_latents_come_back_exactly(folder):
    """Law: initial noise is taken as it is stored."""
    spec = read(folder, {"image": GRID, "latents": "noise.npy"})
    assert np.array_equal(spec.latents, np.load(folder / "noise.npy"))


@pytest.mark.parametrize("mask", ["half.png", "strokes.png"])
def test_masked_cell_keeps_its_picture(folder, mask):
    """Law: white is generated, black and clear kept, and the cell's picture is there for the kept
    part."""
    spec = read(folder, {"image": [["a.png", {"image": "b.png", "mask": mask}]]})
    assert spec.grid.targets == [1]
    assert not spec.grid.query.mask[:, :96].any() and spec.grid.query.mask[:, 96:].all()
    assert np.array_equal(spec.grid.query.pixels[:, 64:], np.asarray(Image.open(folder / "b.png")))


def test_paths_are_relative_to_the_spec(folder, monkeypatch):
    """Law: paths start at the spec's folder, not at the caller's; `..` and absolute ones work."""
    (folder / "specs").mkdir()
    monkeypatch.chdir("/")
    cells = [["../a.png", str(folder / "b.png")], ["../wide.png", None]]
    spec = read(folder, {"image": cells}, name="specs/fox.json")
    assert spec.resolved["image"][0] == [str(folder / "a.png"), str(folder / "b.png")]


def test_resolved_spec_is_the_same_spec(folder):
    """Law: the record's spec, read from any folder, gives the same grid, prompt and numbers."""
    spec = {
        "image": [["a.png", "wide.png"], [{"image": "b.png", "mask": "half.png"}, None]],
        "task": "depth-to-image",
        "content_prompt": "a fox",
        "seed": 3,
    }
    first = read(folder, spec)
    (folder / "other").mkdir()
    second = read(folder, json.dumps(first.resolved), name="other/fox.json")
    assert second.resolved == first.resolved and second.prompt == first.prompt
    for ours, theirs in zip(second.grid.rows, first.grid.rows, strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert np.array_equal(ours.mask, theirs.mask)


def test_a_list_is_numbered(folder):
    """Law: the i-th spec of a list is NAME-i, from 0, also in a list of one."""
    (folder / "fox.json").write_text(json.dumps([{"image": GRID}] * 2))
    (folder / "one.json").write_text(json.dumps([{"image": GRID}]))
    names = [s.name for s in read_specs([folder / "fox.json", folder / "one.json"], MINI)]
    assert names == ["fox-0", "fox-1", "one-0"]


@pytest.mark.parametrize(
    "names",
    [("fox.json", "sub/fox.json"), ("fox.json", "fox.json"), ("fox.json", "fox_target0.json")],
)
def test_outputs_never_collide(folder, names):
    """Law: two specs that would write the same file are an error before anything is painted."""
    (folder / "sub").mkdir()
    for name in names:
        up = "../" if "/" in name else ""
        (folder / name).write_text(json.dumps({"image": [[up + "a.png", None]]}))
    with pytest.raises(UserError, match="fox.*is also that of"):
        read_specs([folder / name for name in names], MINI)


def test_no_accelerator_library_is_imported():
    """Law: a mistake is reported in a fraction of a second, because nothing here imports JAX."""
    code = (
        "import sys, vcloze_jax.inputs.spec; "
        "sys.exit(bool({'jax', 'flax', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("cell", [None, {"image": "b.png", "mask": "half.png"}])
def test_written_specs_are_read(folder, cell):
    """Law: a Spec that is written is read again with the same masks, the same pixels wherever they
    are given, the same sentence and numbers."""
    told = {"task_prompt": "Draw [IMAGE2] – “it”.", "content_prompt": "a fox", "seed": 5}
    told |= {"num_inference_steps": 3, "guidance_scale": 2.5}
    spec = read(folder, {"image": [["a.png", "wide.png"], ["b.png", cell]]} | told)
    write_spec(folder / "again.json", spec, MINI.resolution)
    (again,) = read_specs([folder / "again.json"], MINI)
    for row, same in zip(spec.grid.rows, again.grid.rows, strict=True):
        np.testing.assert_array_equal(row.mask, same.mask)
        np.testing.assert_array_equal(row.pixels[~row.mask], same.pixels[~row.mask])
    for key in ("prompt", "seed", "num_inference_steps", "guidance_scale"):
        assert getattr(spec, key) == getattr(again, key)


@pytest.mark.parametrize("resolution", [64, 384])
@pytest.mark.parametrize("shape", [(1, 2), (9, 16), (3, 2), (21, 9)])
def test_written_specs_keep_their_sizes(tmp_path, shape, resolution):
    """Law: also where rounding makes another size of a row's size, a Spec that is written is read
    as large as it was, whether a cell of it is asked for, or two, or a part."""
    width, height = (100 * side for side in shape)
    picture = Image.new("RGB", (width, height))
    part = picture, np.arange(width) // (width // 2) == np.zeros((height, 1))
    for i, asked in enumerate(([picture, None], [None, None], [picture, part])):
        grid = build_grid([[picture] * 3, [picture, *asked]], resolution)
        write_spec(tmp_path / f"{i}.json", Spec(grid, "", 1, 1.0), resolution)
        (again,) = read_specs([tmp_path / f"{i}.json"], MINI)
        assert [row.size for row in again.grid.rows] == [row.size for row in grid.rows]
