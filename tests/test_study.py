"""Laws of the study: its page stands alone and is the same whenever it is made, the walk's shapes
are the code's, and what is measured is what moves."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.grid import Spec
from vcloze_jax.painter import initial_noise
from vcloze_jax.study import __main__ as study
from vcloze_jax.study import ambiguity, page
from vcloze_jax.study.journey import EXAMPLES, TASK
from vcloze_jax.study.parts import PARTS, Lab

STEPS = 2


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The walk of tiny weights, made twice: two folders."""
    folder = tmp_path_factory.mktemp("study")
    weights = tiny.weights_folder(folder / "tiny")
    argv = ["walk", "--weights", f"{weights}", "--num-inference-steps", f"{STEPS}", "--quick"]
    for name in ("one", "two"):
        study.main([*argv, "--out", f"{folder / name}"])
    return folder / "one", folder / "two"


def test_same_bytes(report):
    """The same command gives the same page, tables and numbers, wherever it writes them."""
    files = [sorted(folder.iterdir()) for folder in report]
    assert [file.name for file in files[0]] == ["index.html", "study.json", "study.md"]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_page_stands_alone(report):
    """It asks for no file and no address, and runs nothing."""
    text = (report[0] / "index.html").read_text()
    tags = "".join(re.findall(r"<[^>]+>|<style>.*?</style>", text, re.S))
    sources = re.findall(r"""(?:src|href|srcset|url\()\s*=?\s*["']?([^"'\s>]+)""", tags)
    assert len(sources) > 10
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    outside = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|<script|<link|<iframe|@import|\son\w+=", outside)


def test_walk_has_the_shapes_of_the_code(report):
    """A station's shapes follow from preset and grid, and the functions that it names are there."""
    numbers = json.loads((report[0] / "study.json").read_text())["walk"]
    shapes = {
        name: shape for station in numbers["stations"] for name, shape in station["shapes"].items()
    }
    rows, T, flux = EXAMPLES + 1, tiny.TINY.t5.max_length, tiny.TINY.flux
    S = rows * TASK.columns * (64 // 16) ** 2
    assert shapes["grid.tokens"] == f"{S}"
    assert shapes["ids"] == f"float32 [{S}, 3]"
    assert shapes["cos"] == f"float32 [1, {T + S}, 1, {sum(flux.axes_dim) // 2}]"
    assert shapes["txt"] == f"float32 [{T}, {flux.text_width}]"
    assert shapes["condition"] == f"float32 [{S}, {flux.in_channels - flux.out_channels}]"
    assert shapes["img"] == f"float32 [{S}, {flux.in_channels}]"
    assert shapes["modulation.img"] == f"float32 [{flux.double_blocks}, 1, {6 * flux.width}]"
    assert shapes["states"] == f"float32 [{STEPS + 1}, {S}, {flux.out_channels}]"
    assert shapes["query row"] == f"uint8 [64, {64 * TASK.columns}, 3]"
    root = Path(study.__file__).parents[2]
    for place in (place for station in numbers["stations"] for place in station["where"]):
        file, name = place.split(": ")
        *_, last = name.split(".")
        assert re.search(rf"^\s*(def|class) {last}\b", (root / file).read_text(), re.M), place


def test_text_is_text():
    """What a name or a caption holds is shown, not obeyed; backquotes are code."""
    chapter = page.Chapter(["<b> `a->b`", page.TextTable([["x"], ["<i>"]], "&")], {})
    text = page.write_html("T", "", {"<c>": chapter})
    assert "&lt;b&gt; <code>a-&gt;b</code>" in text and "&lt;i&gt;" in text
    assert "| x |" in page.write_markdown("T", "", {"c": chapter})


@pytest.mark.parametrize(
    "argv, message",
    [
        ("walk dance", "'dance' is no part of the study; parts are walk"),
        ("--num-inference-steps 0", "--num-inference-steps"),
        ("--quickly", "--quickly"),
    ],
)
def test_flags_are_refused(argv, message, tmp_path, monkeypatch):
    """One line, before a model is read, and nothing is written."""
    monkeypatch.setattr("vcloze_jax.pipeline.load_painter", None)
    with pytest.raises(UserError, match=message) as refused:
        study.main([*argv.split(), "--out", f"{tmp_path}/out"])
    assert "\n" not in f"{refused.value}" and not (tmp_path / "out").exists()


def test_help_names_every_part(capsys):
    """Who adds a part says what it is."""
    with pytest.raises(SystemExit):
        study.main(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", said) for name in PARTS)


class Echo:
    """A painter that knows nothing of examples: a cell is the noise of its row's first tokens."""

    preset = MINI

    def __call__(self, specs, bar):
        return [SimpleNamespace(pixels=self.paint(spec)) for spec in specs]

    def paint(self, spec):
        last = initial_noise(spec)[-spec.grid.tokens // len(spec.grid.rows) :]
        level = np.uint8(128 + np.clip(40 * last[0, 0], -100, 100))
        return np.full_like(spec.grid.query.pixels, level)


class Copier(Echo):
    """One that paints the first example's target again, and black where there is none."""

    def paint(self, spec):
        return spec.grid.rows[0].pixels * (len(spec.grid.rows) > 1)


def chapter(painter, monkeypatch):
    monkeypatch.setattr(ambiguity, "QUICK_TASKS", 1)
    monkeypatch.setattr(ambiguity, "QUICK_SUBJECTS", 2)
    source = open_tasks("", MINI.recipe).held_out()
    return ambiguity.measure_ambiguity(Lab(painter, source, STEPS, quick=True, bar=None)).numbers


def test_what_reads_no_examples_is_not_moved_by_them(monkeypatch):
    """The noise of the last row is the same however many examples stand above: a model that does
    not read them has one error, and only another noise moves its picture."""
    numbers = chapter(Echo(), monkeypatch)
    errors = [row["error"] for row in numbers["ambiguity"]]
    assert len(errors) == 2 * len(ambiguity.COUNTS) and all(e == errors[0] for e in errors)
    (dial,) = numbers["dial"].values()
    assert dial.pop("another noise")["mean"] > 0
    assert {change: spread["mean"] for change, spread in dial.items()} == dict.fromkeys(dial, 0)


def test_what_copies_an_example_is_moved_with_it(monkeypatch):
    """No noise moves what reads none; what is changed moves it if the first example changes."""
    numbers = chapter(Copier(), monkeypatch)
    assert {row["moves"]["mean"] for row in numbers["ambiguity"]} == {0}
    (dial,) = numbers["dial"].values()
    moved = {change for change, spread in dial.items() if spread["mean"] > 0}
    assert moved == {"examples swapped", "all replaced", "the first dropped", "all dropped"}


def test_spreads():
    """Over subjects: of their means; over noise: inside each. Neither tells of the other."""
    subjects, noises = np.array([[0.0, 2.0], [0.0, 2.0]]), np.array([[0.0, 0.0], [2.0, 2.0]])
    assert ambiguity.Spread.of(subjects) == (1.0, pytest.approx(2**0.5), 0.0)
    assert ambiguity.Spread.of(noises) == (1.0, 0.0, pytest.approx(2**0.5))


def test_noise_of_the_last_row_is_kept():
    """The noise of a grid is the end of that of the largest one, its rows from the bottom."""
    source = open_tasks("", MINI.recipe).held_out()
    asker = ambiguity.Asker(Lab(Echo(), source, STEPS, quick=True, bar=None))
    task = ambiguity.graph.parse_task(ambiguity.TASKS[0])
    specs = []
    for count in ambiguity.COUNTS:
        asked = task, task, asker.examples(count)[0], asker.subjects[0]
        specs.append(asker.specify(*ambiguity.pose_question(source, *asked), seed=3))
    largest = Spec(specs[-1].grid, "", STEPS, 30.0, 3)
    for spec in specs:
        assert np.array_equal(spec.latents, initial_noise(largest)[-spec.grid.tokens :])
