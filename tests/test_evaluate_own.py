"""Laws of evaluate --data: what is asked, of what it is measured, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vcloze_jax import evaluate, evaluate_own
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.owndata import open_own
from vcloze_jax.storage import places


class Echo:
    """A painter that paints every target as the first cell of the last row is, or grey where an
    example is given."""

    preset, models = MINI, SimpleNamespace(folder=places.MINI_FOLDER, loras=[])

    def __init__(self):
        self.specs = []

    def __call__(self, specs, progress):
        self.specs += specs
        return [SimpleNamespace(targets=[self.paint(spec.grid)]) for spec in specs]

    def paint(self, grid):
        first = grid.split(grid.query.pixels)[0]
        return first if len(grid.rows) == 1 else np.full_like(first, 128)


@pytest.fixture
def echo(monkeypatch):
    painter = Echo()
    monkeypatch.setattr(evaluate_own, "load_painter", lambda *_: painter)
    return painter


@pytest.fixture
def pairs(tmp_path):
    """A folder of twelve pairs: number i is a noise, and the same half as bright."""
    for side in ("in", "out"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        for side, pixels in (("in", noise), ("out", noise // 2)):
            Image.fromarray(pixels).save(tmp_path / "pairs" / side / f"{i}.png")
    return tmp_path / "pairs"


def run(data, out, *more):
    evaluate.main(["--data", f"{data}", "--out", f"{out}", *more])
    return json.loads((out / "table.json").read_text())


def test_held_out_pairs_are_asked(pairs, tmp_path, echo, capsys):
    """What training holds out, and nothing else, is asked with 0, 1 and 2 examples, each question
    from one seed; the baselines are what they are called; the table is printed and written."""
    record = run(pairs, tmp_path / "out")
    held = open_own(str(pairs), MINI.recipe).held_out()
    (members,) = held.buckets.values()
    assert [spec.seed for spec in echo.specs] == [*members] * 3
    assert [len(spec.grid.rows) for spec in echo.specs] == [1] * 4 + [2] * 4 + [3] * 4
    files = [pairs / "in" / f"{held.samples.pairs[n][0]}.png" for n in members]
    shown = [np.asarray(Image.open(file)) for file in files]
    for picture, spec in zip(shown, echo.specs, strict=False):
        np.testing.assert_array_equal(spec.grid.split(spec.grid.query.pixels)[0], picture)
        assert spec.grid.targets == [1]
    scores = record["scores"]
    assert scores["0 examples"] == scores["a given cell"] != scores["1 example"]
    assert scores["1 example"] == scores["2 examples"]
    noise = np.stack(shown)
    errors = np.sqrt(np.square((noise - noise // 2) / 255).mean((1, 2, 3)))
    assert np.isclose(scores["a given cell"]["rmse"], errors.mean())
    assert 0 < scores["its mean colour"]["rmse"] < scores["a given cell"]["rmse"]
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out and "| the model, 2 examples | 4 |" in table
    height, width, _ = np.asarray(Image.open(tmp_path / "out/sheet.png")).shape
    assert height == 4 * (64 + 14 + 8) and width >= 5 * 72 + 8


def test_grids_are_asked_with_their_own_rows(pairs, tmp_path, echo):
    """A grid of two rows is asked with its last row alone, and as it stands; all of the data where
    nothing is held out, and at most so many as are asked for."""
    rows = [[f"pairs/{side}/{i}.png" for side in ("in", "out")] for i in range(12)]
    lines = [json.dumps({"image": [rows[i - 1], rows[i]]}) for i in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    record = run(tmp_path / "own.jsonl", tmp_path / "out", "--held-out", "0", "--subjects", "5")
    assert [spec.seed for spec in echo.specs] == [0, 2, 5, 8, 11] * 2
    assert [len(spec.grid.rows) for spec in echo.specs] == [1] * 5 + [2] * 5
    for alone, whole in zip(echo.specs[:5], echo.specs[5:], strict=True):
        np.testing.assert_array_equal(alone.grid.query.pixels, whole.grid.query.pixels)
        assert "with 1 rows" in alone.prompt and "with 2 rows" in whole.prompt
    assert "2 examples" not in record["scores"]


def test_a_cell_that_is_asked_in_part(pairs, tmp_path, echo):
    """Where every cell has a masked pixel nothing can be copied, and no copy is told of."""
    half = np.zeros((64, 64), np.uint8)
    half[32:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    cell = {"image": "pairs/in/0.png", "mask": "half.png"}
    (tmp_path / "own.jsonl").write_text(json.dumps({"image": [[cell]]}))
    scores = run(tmp_path / "own.jsonl", tmp_path / "out")["scores"]
    assert [*scores] == ["0 examples", "its mean colour"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data nowhere", "^--data nowhere: there is no such file or folder"),
        ("--data {} --card README.md", "^--card: holds mini's own table"),
        ("--data {} --subjects 0", "^--subjects 0: must be at least 1"),
        ("--data {} --held-out 1.5", "^--held-out 1.5: must be from 0 to 1"),
        ("--data {}/in", "no pair in it"),
        ("--data {} --resolution 0", "--resolution"),
        ("--held-out 0.5", "^--held-out: is of --data; add that"),
        ("--resolution 64", "^--resolution: is of --data; add that"),
    ],
)
def test_refused_before_anything_is_loaded(pairs, tmp_path, monkeypatch, flags, message):
    """One line, nothing loaded and nothing written."""
    monkeypatch.setattr(evaluate_own, "load_painter", None)
    with pytest.raises(UserError, match=message):
        evaluate.main([*flags.format(pairs).split(), "--out", f"{tmp_path}/out"])
    assert not Path(tmp_path / "out").exists()
