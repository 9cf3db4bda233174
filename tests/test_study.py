"""Laws of the study's page: it stands alone and is the same whenever it is made, and the walk's
shapes are the code's."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from PIL import Image

from scripts.make_graph200k import write_dataset
from vcloze_jax.config import MINI, UserError
from vcloze_jax.inputs.papers import DEV
from vcloze_jax.study import __main__ as study
from vcloze_jax.study import page
from vcloze_jax.study.asker import Spread
from vcloze_jax.study.journey import EXAMPLES, TASK
from vcloze_jax.study.parts import PARTS

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
    """The same command gives the same page, tables and numbers, wherever it writes them, but for
    the seconds that it took, which end the page."""
    files = [sorted(folder.iterdir()) for folder in report]
    assert [file.name for file in files[0]] == ["index.html", "study.json", "study.md"]
    for one, two in zip(*files, strict=True):
        (same, *took), again = (file.read_text().split("Seconds of each") for file in (one, two))
        assert same == again[0], one.name
        assert len(took) == len(again) - 1 == (one.suffix != ".json")
        assert all(re.search(r"walk\W+(td\W+)*\d+", each) for each in took)


def test_page_stands_alone(report):
    """It asks for no file and no address, and runs nothing."""
    text = (report[0] / "index.html").read_text()
    tags = "".join(re.findall(r"<[^>]+>|<style>.*?</style>", text, re.S))
    sources = re.findall(r"""(?:src|href|srcset|url\()\s*=?\s*["']?([^"'\s>]+)""", tags)
    assert len(sources) > 10
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
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


def test_a_report_that_is_stopped_keeps_its_parts(tmp_path, monkeypatch):
    """What was measured is on the page before the next part begins; CSV files lie beside it."""

    def run(name, lab):
        if name == "looks":
            raise KeyboardInterrupt
        return PARTS[name][0], page.Chapter(["measured"], {"n": 1}, {f"{name}.csv": "a,b"})

    monkeypatch.setattr(study, "run_part", run)
    painter = SimpleNamespace(preset=MINI)
    monkeypatch.setattr("vcloze_jax.pipeline.load_painter", lambda *args: painter)
    with pytest.raises(KeyboardInterrupt):
        study.main(["walk", "reverse", "looks", "--out", f"{tmp_path}"])
    numbers = json.loads((tmp_path / "study.json").read_text())
    assert numbers == {"walk": {"n": 1}, "reverse": {"n": 1}}
    assert (tmp_path / "index.html").read_text().count("measured") == 2
    assert (tmp_path / "walk.csv").read_text() == "a,b"


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
        ("unseen --photographs nowhere", "nowhere"),
        ("unseen --photographs {}", "broken.png"),
        ("dial --grid {}/fox.json", "fox: adapter: there is no 'maps'"),
        ("walk --grid {}/fox.json", "--grid: dial alone reads it"),
        ("walk --data-dir {}", "--data-dir: tables alone reads it"),
    ],
)
def test_flags_are_refused(argv, message, tmp_path, monkeypatch):
    """One line, before a model is read, and nothing is written."""
    monkeypatch.setattr("vcloze_jax.pipeline.load_painter", None)
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_text("no picture")
    spec = {"image": [["a.png", None]], "adapter": "maps"}
    (tmp_path / "fox.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=message) as refused:
        study.main([*argv.format(tmp_path).split(), "--out", f"{tmp_path}/out"])
    assert "\n" not in f"{refused.value}" and not (tmp_path / "out").exists()


def test_trained_items_are_no_test_items(tmp_path):
    """Tables of the paper are asked of the test split, or not at all."""
    write_dataset(tmp_path, as_json=True)
    assert len(study.open_test_items(tmp_path, MINI).numbers) > 0
    listed = tmp_path / "test/data.json"
    listed.write_text(json.dumps(json.loads(listed.read_text())[:2]))
    with pytest.raises(UserError, match="its test folder has too few items"):
        study.open_test_items(tmp_path, MINI)


def test_help_names_every_part(capsys):
    """Who adds a part says what it is."""
    with pytest.raises(SystemExit):
        study.main(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", said) for name in PARTS)


def test_records_are_tables():
    """A record may lack a column, and a number is written out; what has fields keeps them."""
    records = [{"a": "x", "b": 0.5}, {"a": Spread(0.1, 0.2, 0.3), "c": 2}]
    rows = page.tabulate_records(records)
    assert rows == [["a", "b", "c"], ["x", "0.500", "–"], ["0.100 (0.200; 0.300)", "–", "2"]]
    assert page.list_records(records)[1]["a"] == {"mean": 0.1, "subjects": 0.2, "noise": 0.3}


@pytest.mark.parametrize("part", ["walk", "looks"])
def test_what_opens_the_model_tells_no_segments(part, tmp_path, monkeypatch):
    """Parts that look into the MMDiT are refused where tokens have segments, before others run."""
    painter = SimpleNamespace(preset=replace(MINI, flux=replace(MINI.flux, placement=DEV)))
    monkeypatch.setattr("vcloze_jax.pipeline.load_painter", lambda *args: painter)
    monkeypatch.setattr(study, "run_part", None)
    with pytest.raises(UserError, match=f"{part}: it follows .* is of placement dev"):
        study.main(["dial", part, "--out", f"{tmp_path}"])
