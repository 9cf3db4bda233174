"""Laws of the user's own data as a source: rows, held-out parts; what is shown."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from scripts.make_pairs import ICONS, TASKS
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.draws import ROWS, draw_rows
from vcloze_jax.data.owndata import choose_part, open_own
from vcloze_jax.data.report import show_source
from vcloze_jax.data.sources import Shape, draw_group
from vcloze_jax.inputs.cells import row_size
from vcloze_jax.inputs.sheet import MARK

ROOT = Path(__file__).parents[1]
RECIPE = MINI.recipe


def write_pairs(folder, count, sizes=((64, 64),)):
    """A folder of pairs: the input of number i is (i, 0, 0) everywhere, its output (i, 255, 0)."""
    for side, level in (("in", 0), ("out", 255)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = Image.new("RGB", sizes[i % len(sizes)], (i, level, 0))
            picture.save(folder / side / f"{i:03}.png")
            (folder / f"{i:03}.txt").write_text(f"number {i}")
    return folder


def read_all(prompts):
    """Tokenizers that leave nothing unread."""
    unread = {"dropped_tokens": {"t5": 0}, "unknown_characters": {"t5": 0}}
    return None, None, [unread] * len(prompts)


def numbers(example):
    """Which pairs the rows of a grid show, as `write_pairs` wrote them."""
    return [int(row.pixels[0, 0, 0]) for row in example.grid.rows]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of 40 pairs."""
    return write_pairs(tmp_path_factory.mktemp("own") / "pairs", 40)


def test_the_cut_is_the_bucket_of_the_query(tmp_path):
    """All cells of a grid have the size of the query's bucket, whatever their own."""
    sizes = [(128, 96), (96, 128), (96, 96)]
    folder = write_pairs(tmp_path / "pairs", 30, sizes)
    source = open_own(str(folder), replace(RECIPE, group=2))
    cells = {row_size(w, h, 64) for w, h in ((4, 3), (3, 4), (1, 1))}
    assert {(shape.width, shape.height) for shape in source.shapes()} == cells
    for number in range(20):
        for example in draw_group(source, 0, number, 2):
            own = {(i % 3) for i in numbers(example)}
            assert len(own) == 1
            w, h = sizes[own.pop()]
            assert example.grid.shape[0][0] == row_size(w, h, 64)[1]


# --- rows, held-out part ---


def test_pairs_make_grids_of_one_to_three_rows(pairs):
    """1, 2 and 3 rows with p 0.3, 0.4, 0.3, all of different pairs, every pair equally often."""
    source = open_own(str(pairs), RECIPE)
    groups = [draw_group(source, 0, number, 8) for number in range(150)]
    rows = Counter(len(group[0].grid.rows) for group in groups)
    expected = [p * len(groups) for p in ROWS.values()]
    assert chisquare([rows[r] for r in ROWS], expected).pvalue > 1e-4
    queries = Counter()
    for group in groups:
        shown = [numbers(example) for example in group]
        assert all(len(set(each)) == len(each) for each in shown)
        assert len({each[-1] for each in shown}) == len(group)
        queries.update(each[-1] for each in shown)
    assert len(queries) == 36 and chisquare(list(queries.values())).pvalue > 1e-4


def test_rows_of_few_pairs():
    """Where there are less than three pairs the share of more rows goes to what there can be."""
    rng = np.random.default_rng(2)
    assert {draw_rows(rng, 1) for _ in range(50)} == {1}
    drawn = Counter(draw_rows(rng, 2) for _ in range(1000))
    assert chisquare([drawn[1], drawn[2]], [300, 700]).pvalue > 1e-4


@pytest.mark.parametrize("count, share, held", [(100, 0.1, 10), (100, 0.25, 25), (20, 0.1, 4)])
def test_how_much_is_held_out(count, share, held):
    """The share that is asked for, four samples at least, half at most, and none for 0; the same
    ones at every start, and but for one the same where a sample comes or goes."""
    named = SimpleNamespace(key=lambda i: b"%d" % i)
    choose = lambda numbers, share: choose_part(named, np.asarray(numbers), share)  # noqa: E731
    part = choose(range(count), share)
    assert len(part) == held == len(set(part.tolist()))
    np.testing.assert_array_equal(part, choose(range(count), share))
    assert len(choose(range(count), 0.0)) == 0
    assert [len(choose(range(n), 0.1)) for n in (1, 2, 3, 5, 8)] == [0, 1, 1, 2, 4]
    for gone in range(count):
        left = choose([i for i in range(count) if i != gone], share)
        assert len({*left.tolist()} - {*part.tolist()}) <= 1


def test_previews_show_no_training_pair(pairs):
    """No pair is both learnt and shown in previews or validation: neither asked nor as an example.
    A preview asks a question with 0, 1 and 2 examples, its last cell blank, with all text."""
    source = open_own(str(pairs), replace(RECIPE, held_out=0.2))
    held = source.held_out()
    learnt = {i for n in range(20) for e in draw_group(source, 0, n, 8) for i in numbers(e)}
    shown = {i for n in range(20) for e in draw_group(held, 0, n, 8) for i in numbers(e)}
    assert len(learnt) == 32 and len(shown) == 8 and not learnt & shown
    previews = held.previews()
    assert [len(example.grid.rows) for example in previews] == [1, 2, 3, 1, 2, 3]
    assert {i for example in previews for i in numbers(example)} <= shown
    for example in previews:
        assert example.grid.targets == [1]
        assert f"depicts: number {numbers(example)[-1]}" in example.prompt
    assert [e.prompt for e in held.previews()] == [e.prompt for e in previews]


def test_what_is_cut_away_is_told(tmp_path, capfd):
    """All cells of a sample get one shape: where that costs a picture a third or more of itself, as
    an output of another shape than its input, the first look at the data says so."""
    folder = write_pairs(tmp_path / "odd", 6)
    Image.new("RGB", (90, 64)).save(folder / "out" / "000.png")
    open_own(str(folder), RECIPE)
    assert capfd.readouterr().err == ""
    for i in (1, 2):
        Image.new("RGB", (64, 128)).save(folder / "out" / f"{i:03}.png")
    (tmp_path / "odd.sizes.npz").unlink()
    open_own(str(folder), RECIPE)
    told = f"2 samples, as {folder}: 001, hold pictures of quite other shapes than their first"
    assert told in capfd.readouterr().err
    for side in ("in", "out"):
        for i in range(6):
            Image.new("RGB", (256, 64)).save(folder / side / f"{i:03}.png")
    open_own(str(folder), RECIPE)
    assert f"6 samples, as {folder}: 000" in capfd.readouterr().err


# --- samples that change, and odd ones ---


def test_pictures_that_were_replaced_are_measured_anew(tmp_path):
    """Law: other pictures under the same names have their own sizes, not those that were kept."""
    shapes = []
    for size in ((128, 128), (192, 96)):
        folder = write_pairs(tmp_path / "pairs", 40, [size])
        shapes.append({shape[2:] for shape in open_own(str(folder), RECIPE).shapes()})
    assert shapes == [{(64, 64)}, {(32, 80)}]


def test_a_file_may_change_while_it_is_read(pairs):
    """Lines that are written over in place are samples that cannot be read, and end no process."""
    file = pairs.parent / "mine.jsonl"
    line = {"image": [["pairs/in/000.png", "pairs/out/000.png"]]}
    file.write_text("\n".join([json.dumps(line | {"content_prompt": "x" * 4096})] * 200))
    samples = open_own(f"{file}", RECIPE).samples
    file.write_text("{}")
    with pytest.raises(UserError):
        samples[199]


def test_a_mask_may_be_null(pairs):
    """As for sample.py: there is none, also in the last row, whose last cell is then asked."""
    file = pairs.parent / "null.jsonl"
    cells = [[f"pairs/{side}/{i:03}.png" for side in ("in", "out")] for i in range(2)]
    cells[1][0] = {"image": cells[1][0], "mask": None}
    lines = [{"image": rows} for rows in (cells, cells[::-1])]
    file.write_text("\n".join(map(json.dumps, lines)))
    source = open_own(str(file), replace(RECIPE, held_out=0.0, reverse_masking=0.0))
    for example in draw_group(source, 0, 0, 2):
        assert example.grid.query.mask[:, 64:].all() and not example.grid.query.mask[:, :64].any()


# --- what --check shows ---


@pytest.mark.parametrize(
    "count, told", [(12, "held out of 12 (at least 4, at most half)"), (40, "held out\n")]
)
def test_the_share_that_few_samples_give_is_said(tmp_path, count, told):
    """Of few samples more are held out than were asked for; that is no secret."""
    recipe = replace(RECIPE, held_out=0.1)
    assert (
        f"{count - 4} pairs to learn from, 4 {told}"
        in open_own(str(write_pairs(tmp_path / "few", count)), recipe).summary()
    )


def test_unread_texts_are_told(pairs, tmp_path):
    """What the text encoders will not read of a grid's text stands below it."""

    def tokenizers(prompts):
        read = {"t5": 0, "clip": 0}
        unread = {"dropped_tokens": read, "unknown_characters": read}
        return None, None, [unread] * 11 + [unread | {"dropped_tokens": {"t5": 7, "clip": 0}}]

    told = show_source(open_own(str(pairs), RECIPE), RECIPE, tmp_path / "x.png", tokenizers)
    assert told.endswith("\n     the prompt is too long: 7 T5 tokens dropped")
    assert told.count("dropped") == 1


def test_what_there_is_is_shown(pairs, tmp_path):
    """All counts, sizes and tokens are told, and twelve grids drawn as a run draws them, hatched
    where they are masked, and only there."""
    source = open_own(str(pairs), RECIPE)
    told = show_source(source, RECIPE, tmp_path / "new" / "check.png", read_all)
    assert "36 pairs to learn from, 4 held out" in told
    assert "  3 x 2 cells of 64x64: 96 tokens, 36 last rows\n" in told
    for number in range(12):
        (example,) = draw_group(source, RECIPE.seed, number, 1)
        assert f"\n  {number + 1}: {example.prompt or 'none'}" in told
    assert f"{pairs}.sizes.npz: sizes of all pictures, read once; it may be deleted" in told
    sheet = np.asarray(Image.open(tmp_path / "new" / "check.png"))
    assert sheet.shape[1] == 4 * (2 * 64 + 3 * 8 + 8)
    (example,) = draw_group(source, RECIPE.seed, 0, 1)
    grid = example.grid
    y = 14 + 8 + (len(grid.rows) - 1) * 72  # below the number, the gutter, and rows of examples
    query = np.concatenate([sheet[y : y + 64, 8 + 72 * c : 72 + 72 * c] for c in (0, 1)], 1)
    striped = (query != grid.query.pixels).any(-1)
    assert striped.any() and not striped[~grid.query.mask].any()
    assert (query[striped] == MARK).all() and striped.sum() < grid.query.mask.sum() / 3


def test_the_pairs_that_ship():
    """Twenty, small, of one size; each output is what the script makes of its input."""
    folder = ROOT / "examples/pairs"
    assert sum(file.stat().st_size for file in folder.rglob("*.png")) < 150_000
    source = open_own(str(folder), RECIPE)
    assert source.shapes() == [Shape(rows, 2, 64, 64) for rows in (1, 2, 3)]
    assert len(source.samples) == len(ICONS) == 20 and source.count(Shape(1, 2, 64, 64)) == 16
    for sample in source.samples:
        given, made = (Image.open(folder / file) for file in sample.rows[0])
        with given, made:
            np.testing.assert_array_equal(TASKS["tint"](given), made)


# --- size ---

MANY = 20_000
MEASURE = """
import json, resource, sys, time
from dataclasses import replace
from vcloze_jax.config import MINI
from vcloze_jax.data.sources import draw_group, open_source
recipe = replace(MINI.recipe, data=sys.argv[1])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
source = open_source(recipe)
seconds = time.process_time() - start
for number in range(3): draw_group(source, 0, number, 8)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (after - before) / 1024, source.digest()]))
"""


def test_many_lines(tmp_path):
    """20,000 lines start in seconds, the first time and the next, and take little memory: no
    picture of theirs is held."""
    for i in range(10):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
    line = '{"source": "%d.png", "target": "%d.png", "text": "number %d"}\n'
    file = tmp_path / "many.jsonl"
    file.write_text("".join(line % (i % 10, i % 7, i) for i in range(MANY)))
    runs = []
    for _ in range(2):
        command = [sys.executable, "-c", MEASURE, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    (first, memory, digest), (again, _, same) = runs
    assert first < 30 and again < 2 and memory < 60 and digest == same, runs
