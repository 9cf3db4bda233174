"""Laws of sample.py: what is written, and what a picture depends on.

Tiny random models paint; the last test is of the shipped ones.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from paintspecs import BLANK, PARTLY, POODLE, ROCKET, SMALL, TOKENS, names, pixels
from PIL import Image
from safetensors.numpy import load_file, save_file

import sample
from vcloze_jax.config import UserError
from vcloze_jax.data.graph import NODES
from vcloze_jax.data.graphemoji import read_nodes
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.inputs.specfiles import read_specs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def run(folder, tmp_path):
    """Write specs {name: content}, run sample.py on them all, and return its output folder."""

    def run(specs, out="out", *more):
        files = [tmp_path / f"{name}.json" for name in specs]
        for file, content in zip(files, specs.values(), strict=True):
            small = [SMALL | c for c in content] if isinstance(content, list) else SMALL | content
            file.write_text(json.dumps(small))
        argv = ["--grid", *files, "--weights", folder, "--out", tmp_path / out, *more]
        assert sample.main([str(arg) for arg in argv]) in (None, 0)
        return tmp_path / out

    return run


# --- what is written ---


def test_outputs(run):
    """A spec gives its grid, its targets in column order and its record, and nothing else."""
    out = run({"fox": PARTLY, "owl": BLANK})
    fox = ["fox.json", "fox.png", "fox_target0.png", "fox_target1.png"]
    assert names(out) == [*fox, "owl.json", "owl.png", "owl_target0.png"]


def test_record(run):
    """The record holds the spec with its defaults filled in and what the painting took; read as
    a spec again, it is the same spec."""
    record = json.loads((run({"fox": PARTLY}) / "fox.json").read_text())
    assert record["spec"]["guidance_scale"] == 30 and record["spec"]["seed"] == 7
    assert record["prompt"].endswith(" Draw.")
    assert record["sizes"] == [[32, 32], [32, 32]]
    assert record["tokens"] == {"image": TOKENS, "text": 32, "bucket": 2 * TOKENS}
    assert record["dropped_tokens"] == {"t5": 0, "clip": 0}
    assert set(record["seconds"]) == {"load", "text", "vae", "compile", "paint", "decode"}
    assert min(record["seconds"].values()) >= 0 < record["seconds"]["compile"]
    assert record["compiles"] >= 0  # none where the cache held all of them
    assert record["versions"]["jax"] == jax.__version__
    again = record["spec"] | {"num_inference_steps": 1}
    assert json.loads((run({"fox": again}) / "fox.json").read_text())["spec"] == again


def test_a_record_is_painted_again(run, folder):
    """A record is a spec of its own: painted again where it lies, it gives the same bytes, or after
    another one of a batch the same to a level; with another seed, another picture."""
    out = run({"fox": PARTLY}, "out", "--images", "2", "--seed", "5")
    written = names(out)
    assert written[0] == "fox_seed5.json" and written[4] == "fox_seed6.json"
    argv = ["--grid", f"{out}/fox_seed6.json", "--weights", str(folder), "--out", str(out)]
    of_two = pixels(out / "fox_seed6.png").astype(int)
    sample.main(argv)
    assert np.abs(pixels(out / "fox_seed6.png") - of_two).max() <= 1
    before = {name: (out / name).read_bytes() for name in names(out)}
    sample.main(argv)
    assert names(out) == list(before) == written
    for name in names(out):
        if name.endswith(".png"):
            assert (out / name).read_bytes() == before[name]
    sample.main([*argv, "--seed", "7"])
    assert (out / "fox_seed6.png").read_bytes() != before["fox_seed6.png"]
    with pytest.raises(UserError, match="fox.json is an input; choose another"):
        run({"fox": PARTLY}, ".")


def test_flags_are_keys(run):
    """A flag says of all specs what its key says of one; several pictures are those of their
    seeds, painted alone."""
    one = {"seed": 3, "num_inference_steps": 1, "guidance_scale": 7.5}
    out = run({"fox": PARTLY | one, "owl": BLANK | one}, "keys")
    flags = "--seed 3 --steps 1 --guidance 7.5".split()
    changed = run({"fox": PARTLY, "owl": BLANK}, "flags", *flags)
    several = run({"fox": PARTLY | {"num_images_per_prompt": 3, "seed": 1}}, "several", *flags[2:])
    for name in ("fox", "owl"):
        spec = json.loads((changed / f"{name}.json").read_text())["spec"]
        assert {key: spec[key] for key in one} == one
        assert (changed / f"{name}.png").read_bytes() == (out / f"{name}.png").read_bytes()
    assert [name for name in names(several) if name.endswith(".json")] == [
        f"fox_seed{k}.json" for k in (1, 2, 3)
    ]
    last, alone = (pixels(f).astype(int) for f in (several / "fox_seed3.png", out / "fox.png"))
    assert np.abs(last - alone).max() <= 1  # batches of three and of two round apart


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seed -1", r"^--seed -1: must be an integer in 0"),
        ("--steps 0", r"^--steps 0: must be an integer in 1"),
        ("--guidance nan", r"^--guidance nan: must be a number"),
        ("--images 2000", r"^--images 2000: must be an integer in 1 ... 1024"),
        ("--images 1000", r"grid 2000 of at most 1024 at once"),
        ("--images 2 --seed 4294967295", r"fox.json: num_images_per_prompt: the last seed would"),
    ],
)
def test_wrong_flags(run, flags, message):
    """A number that cannot be is told with its flag, before anything is painted."""
    with pytest.raises(UserError, match=message):
        run({"fox": BLANK, "owl": BLANK}, "out", *flags.split())


def test_dial(run):
    """The dial's numbers are those of the changed specs, as of another seed, painted by itself.
    It changes no picture, and the record is otherwise the same."""
    two = {"image": [POODLE, ROCKET, [POODLE[0], None]], "seed": 7}
    plain, dialled = run({"fox": two}), run({"fox": two}, "dialled", "--dial")
    was, same = (pixels(out / "fox_target0.png") for out in (plain, dialled))
    assert np.array_equal(was, same)
    record, other = (json.loads((out / "fox.json").read_text()) for out in (dialled, plain))
    moves = record.pop("dial")
    assert record.keys() == other.keys() and record["spec"] == other["spec"]
    ways = "in reverse order", "without example 1", "without example 2", "without examples"
    assert [*moves] == [*ways, "seed 8", "seed 9", "seed 10"]
    out = run({"fox": two | {"seed": 8}}, "other")
    moved = rmse(pixels(out / "fox_target0.png") / 255, was / 255)
    assert moves["seed 8"] == pytest.approx(moved, abs=1e-3) and moved > 0


def test_boxes(run):
    """The boxes are where the cells lie in the sheet: given cells are the resized inputs,
    painted ones the targets; all else is white but for the marks in the gutters."""
    out = run({"fox": PARTLY})
    sheet, record = pixels(out / "fox.png").copy(), json.loads((out / "fox.json").read_text())
    boxes = record["boxes"]
    cut = [[sheet[y : y + h, x : x + w].copy() for x, y, w, h in row] for row in boxes]
    grid = read_specs([out.parent / "fox.json"], tiny.TINY)[0].grid
    assert np.array_equal(np.concatenate(cut[0], 1), grid.rows[0].pixels)
    for i in (0, 1):
        assert np.array_equal(cut[1][i], pixels(out / f"fox_target{i}.png"))
    for x, y, w, h in sum(boxes, []):
        sheet[y : y + h, x : x + w] = 255
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert colours == {(255, 255, 255), (226, 88, 34)}


def test_kept_pixels(run):
    """The kept part of a partly masked cell is the input's, exactly; the rest is painted."""
    out = run({"fox": PARTLY})
    target, given = pixels(out / "fox_target1.png"), pixels(ROCKET[1])
    given = np.asarray(Image.fromarray(given).resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(target[:, :16], given[:, :16])
    assert (target[:, 16:] != given[:, 16:]).mean() > 0.9


def test_a_list_of_specs(run):
    """The i-th spec of a list is named so, also in a list of one."""
    out = run({"fox": [PARTLY, BLANK], "owl": [BLANK]})
    sheets = [name for name in names(out) if name.endswith(".png") and "target" not in name]
    assert sheets == ["fox-0.png", "fox-1.png", "owl-0.png"]
    assert (out / "fox-1.png").read_bytes() == (out / "owl-0.png").read_bytes()


def test_cut_short(run, tmp_path, monkeypatch):
    """A kill leaves whole files only, and no record: the record is what is written last."""
    replaced, rename = [], os.replace

    def killed(source, target):
        if len(replaced) == 2:
            raise KeyboardInterrupt
        replaced.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run({"fox": PARTLY})
    assert replaced == names(tmp_path / "out") == ["fox.png", "fox_target0.png"]


def test_outputs_never_replace_a_spec(run, tmp_path):
    """An output folder in which a record would replace the spec itself is an error."""
    with pytest.raises(UserError, match="fox.json is an input"):
        run({"fox": BLANK}, ".")


# --- what a picture depends on ---


def test_repeated(run):
    """The same spec is the same file, to the byte; seed 0 is a seed and the default one."""
    specs = {"fox": BLANK, "zero": BLANK | {"seed": 0}, "one": BLANK | {"seed": 1}}
    first, second = run(specs, "first"), run(specs, "second")
    for name in names(first):
        if name.endswith(".png"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    sheets = [(first / f"{name}.png").read_bytes() for name in specs]
    assert sheets[0] == sheets[1] != sheets[2]


def test_latents(run, tmp_path):
    """Given noise is the noise: that of a seed paints what the seed paints, in any batch."""
    noise = np.asarray(jax.random.normal(jax.random.key(3), (TOKENS, 64)))
    np.save(tmp_path / "noise.npy", noise)
    np.save(tmp_path / "other.npy", -noise)
    given = {"latents": "noise.npy", "seed": 9}
    specs = {"seed": {"seed": 3}, "given": given, "other": given | {"latents": "other.npy"}}
    out = run({name: BLANK | change for name, change in specs.items()})
    sheets = [(out / f"{name}.png").read_bytes() for name in specs]
    assert sheets[0] == sheets[1] != sheets[2]


# --- never a black picture, never a picture of wrong inputs ---


def test_not_finite(run, folder, tmp_path):
    """Weights that overflow are told, and no picture is written."""
    with tiny.overflowing(folder), pytest.raises(FloatingPointError, match="not finite"):
        run({"fox": BLANK})
    assert names(tmp_path / "out") == []


def test_nan_in_a_file(run, folder, tmp_path):
    """A NaN in a weights file is the user's error, and names the tensor."""
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    sound = file.read_bytes()
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][3] = np.nan
    save_file(tensors, file)
    try:
        with pytest.raises(UserError, match="vae: decoder.conv_in.bias holds NaN"):
            run({"fox": BLANK})
    finally:
        file.write_bytes(sound)
    assert names(tmp_path / "out") == []


def test_check(run):
    """--check validates and paints nothing."""
    assert names(run({"fox": BLANK}, "out", "--check")) == []


# --- the shipped model ---


def test_mini(tmp_path, capsys):
    """Out of the box two examples turn a backpack into its mask, with less than a third of
    the error of a copy (it is 0.06 of it; without examples 0.6)."""
    spec = ROOT / "examples/3_two_examples.json"
    sample.main(["--grid", str(spec), "--out", str(tmp_path)])
    assert "1 grids painted" in capsys.readouterr().out
    names, pictures = read_nodes("held_out")
    views = pictures[names.index("backpack")].astype(float)
    copy, truth = (views[NODES.index(node)] for node in ("fluent_3d", "mask"))
    painted = pixels(tmp_path / "3_two_examples_target0.png").astype(float)
    assert np.abs(painted - truth).mean() < np.abs(copy - truth).mean() / 3
