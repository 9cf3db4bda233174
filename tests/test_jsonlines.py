"""Laws of the user's own files: a line is a sample, or an error that names it."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.jsonlines import SPELLINGS, read_line
from vcloze_jax.data.owndata import ASKED, open_own
from vcloze_jax.data.sources import draw_of_shape

PAIR = {"image": [["0.png", "1.png"], ["0.png", "1.png"]]}
HALF = {"image": "0.png", "mask": "half.png"}
RECIPE = replace(MINI.recipe, held_out=0.0, caption_dropout=0.0)
FIXED = replace(RECIPE, **ASKED)  # nothing but the grid is drawn


@pytest.fixture
def lines(tmp_path):
    """Write records as a JSON-lines file beside four pictures and a mask, and open it."""
    for i, size in enumerate([(64, 64), (64, 64), (96, 48), (96, 48)]):
        Image.new("RGB", size, (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    half = np.repeat([[0, 255]], 64, axis=0).repeat(32, axis=1).astype(np.uint8)
    Image.fromarray(half).save(tmp_path / "half.png")
    Image.fromarray(half * 0).save(tmp_path / "black.png")
    os.mkfifo(tmp_path / "pipe.png")

    def open_lines(*records, recipe=FIXED):
        text = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        (tmp_path / "mine.jsonl").write_bytes(b"\n".join(text))
        return open_own(str(tmp_path / "mine.jsonl"), recipe)

    return open_lines


def only(source):
    """The one grid of a source."""
    (shape,) = source.shapes()
    return draw_of_shape(source, shape)


# --- lines of grids ---


def test_sentences(lines):
    """Sentences are a spec's, named tasks and null included."""
    fox = {"task_prompt": "T", "content_prompt": "a fox", "layout_prompt": ""}
    layout = "A grid layout with 2 rows and 2 columns, displaying 4 images arranged side by side."
    for change, prompt in (
        (fox, "T The last image of the last row depicts: a fox"),
        ({"task_prompt": None}, layout),
        ({"task": "colorization", "layout_prompt": ""}, "In each row, a logical task"),
    ):
        example = only(lines(PAIR | change))
        assert example.prompt.startswith(prompt) and example.kind == (change.get("task") or "")


def test_shapes_come_as_often_as_lines_have_them(lines):
    """A shape is that of its share of the lines."""
    grids = lines(PAIR, PAIR, PAIR, {"image": [["2.png", "3.png"]]}, b"")
    rng = np.random.default_rng(0)
    shapes = [grids.shape(rng) for _ in range(400)]
    # Four deviations of a binomial count.
    assert abs(sum(shape.rows == 2 for shape in shapes) - 300) < 4 * 400**0.5 * 0.433
    assert {(shape.width, shape.height) for shape in shapes} == {(64, 64), (80, 32)}


def test_what_is_learnt(lines):
    """Without a mask it is one cell, with its truth, the last or any; with masks what they say."""
    whole = only(lines(PAIR)).grid
    assert whole.targets == [1] and whole.query.mask[:, 64:].all()
    assert (whole.query.pixels[:, 64:] == [60, 0, 0]).all()
    grids = lines(PAIR, recipe=RECIPE)
    (shape,) = grids.shapes()
    drawn = [grids.example(np.random.default_rng(i), shape, [0]).grid.targets for i in range(40)]
    assert [0] in drawn and drawn.count([1]) > drawn.count([0])
    masked = lines({"image": [["0.png", "1.png"], [HALF, "1.png"]]}, recipe=RECIPE)
    for i in range(10):
        part = masked.example(np.random.default_rng(i), shape, [0]).grid
        assert part.targets == [0]
        assert part.query.mask.sum() == 64 * 32 and part.query.mask[:, 32:64].all()


# --- pairs in others' spellings ---


def test_spellings():
    """A pair is known by its keys, as ControlNet, InstructPix2Pix and others write it: columns in
    order, the target last, and what its text is, a caption or an instruction."""
    for line, row, text in (
        ({"source": "a", "target": "b", "text": "t"}, ["a", "b"], "t"),
        ({"source": "a", "target": "b", "prompt": "t"}, ["a", "b"], "t"),
        ({"target": "b", "source": "a"}, ["a", "b"], None),
        (
            {"cond1": "c", "cond2": "d", "source": "a", "target": "b", "text": "t"},
            ["c", "d", "a", "b"],
            "t",
        ),
        ({"cond1": "c", "target": "b", "text": None}, ["c", "b"], None),
        ({"conditioning_image": "a", "image": "b", "text": "t"}, ["a", "b"], "t"),
        (
            {"input": "a", "output": "b", "prompt": "t"},
            ["a", "b"],
            "The editing instruction in the last row is: t",
        ),
        (
            {"original_image": "a", "edited_image": "b", "edit_prompt": "t"},
            ["a", "b"],
            "The editing instruction in the last row is: t",
        ),
        (
            {
                "task_type": "edit",
                "instruction": "Put <img><|image_2|></img> on it.",
                "input_images": ["a", "b"],
                "output_image": "c",
            },
            ["a", "b", "c"],
            "The editing instruction in the last row is: Put [IMAGE2] on it.",
        ),
        (
            {"source_img": "a", "target_img": "b", "instruction": "t"},
            ["a", "b"],
            "The editing instruction in the last row is: t",
        ),
        (
            {"source_image": "a", "edited_image": "b", "edit_prompt": "t"},
            ["a", "b"],
            "The editing instruction in the last row is: t",
        ),
        ({"control_path": "a", "image_path": "b", "caption": "t"}, ["a", "b"], "t"),
        ({"image": "b", "edit_image": ["a", "c"], "prompt": "t"}, ["a", "c", "b"], "t"),
        ({"source_file_name": "a", "target_file_name": "b", "text": "t"}, ["a", "b"], "t"),
        (
            {"file_name": "b", "edit_image_file_names": ["a", "c"], "text": "t"},
            ["a", "c", "b"],
            "t",
        ),
    ):
        sample = read_line(line)
        assert sample.rows == [row] and sample.texts["content_prompt"] == text, line
        assert len(sample.phrases) == len(row)
    assert {target for target, spelling in SPELLINGS.items() if spelling.conditions} == {*SPELLINGS}


def test_a_pair_is_a_row(lines):
    """Lines of pairs make grids of them; where a line words its task, that is said."""
    pair = {"source": "0.png", "target": "1.png", "text": "a fox", "task_prompt": "Do it."}
    example = only(lines(pair))
    assert example.grid.shape == ((64, 128),) and example.grid.targets == [1]
    assert example.prompt.endswith("Do it. The last image of the last row depicts: a fox")


# --- mistakes ---


BAD = [  # beside what test_spec.py says of JSON and of cells: a line is read by the same functions
    # the line
    (b"{", "is not JSON.*; each line is a JSON object"),
    (b"", "is empty; each line is a JSON object"),
    (b'{"image": [["\xff.png"]]}', "is not UTF-8"),
    (b'{"image": [["0.png"]], "image": [["0.png"]]}', "'image': given twice"),
    (b"[]", "must be an object"),
    (b"NaN", "must be an object"),
    (
        {"task_prompt": "T"},
        "keys task_prompt: neither a grid, .*image.*nor a pair.* target \\+ cond1",
    ),
    ({"image": None}, r"keys \(none\): neither a grid"),
    ({"picture": "0.png", "caption": "x"}, "keys picture, caption: neither a grid.* nor a pair"),
    ({"image": "0.png", "text": "x"}, "keys image, text: neither a grid.* nor a pair"),
    ({"file_name": "0.png", "text": "x"}, "keys file_name, text: neither a grid.* nor a pair"),
    ({"file_name": "0.png", "image": "0.png"}, "file_name: there is another 'image'|image: there"),
    ({"output_image": "0.png", "instruction": "x"}, ".*neither .*output_image \\+ input_images"),
    ({"input_images": [], "output_image": "0.png"}, "input_images: 0 pictures, must be 1 to 3"),
    ({"input_images": ["0.png"], "output_image": "0.png", "x": 1}, "'x': unknown.* input_images"),
    (PAIR | {"prompt": "x"}, "'prompt': unknown key"),
    (
        {"source": {"bytes": None, "path": "0.png"}, "target": "1.png"},
        "source: a picture as `datas",
    ),
    ({"source": "0.png", "target": "1.png", "txt": "x"}, "'txt': unknown key.*'text'"),
    ({"source": "0.png", "target": "1.png", "text": "", "prompt": ""}, "text and prompt: keep one"),
    ({"source": [["0.png"]], "target": "1.png"}, "source: must be a string, not a list"),
    ({"source": 3, "target": "1.png"}, "source: must be a list, not 3"),
    (
        {"source": "0.png", "target": "1.png"},
        r"grids and pairs are mixed \(.*line 1 is of the other",
    ),
    (PAIR | {"seed": 1}, "'seed': unknown key"),
    (PAIR | {"task_prompt": 3}, "task_prompt: must be a string"),
    (PAIR | {"task": "colorizatio"}, "task: no task .*did you mean 'colorization'"),
    # the grid
    ({"image": {}}, "image: must be a list"),
    ({"image": []}, "image: no cell"),
    ({"image": [[], []]}, "image: no cell"),
    ({"image": ["0.png"]}, r"image\[0\]: must be a list"),
    ({"image": [["0.png"], ["0.png", "1.png"]]}, r"image\[1\]: 2 cells"),
    ({"image": [["0.png", "1.png"], []]}, r"image\[1\]: 0 cells"),
    # the cells
    ({"image": [["0.png", None]]}, r"image\[0\]\[1\]: null; to learn it"),
    ({"image": [[None]]}, r"image\[0\]\[0\]: null; to learn it"),
    ({"image": [[3]]}, r"image\[0\]\[0\]: a cell is"),
    ({"image": [["9.png"]]}, r"image\[0\]\[0\]: .*9\.png.*No such file"),
    ({"image": [["pipe.png"]]}, r"image\[0\]\[0\]: .*pipe"),
    ({"image": [[HALF], ["0.png"]]}, r"image\[0\]\[0\]: only the last row"),
    ({"image": [[HALF | {"mask": "black.png"}]]}, r"image\[0\]\[0\]: the mask is all black"),
    ({"image": [[HALF | {"edge": "0.png"}]]}, r"image\[0\]\[0\]: a cell is"),
]


@pytest.mark.parametrize("record, message", BAD, ids=range(len(BAD)))
def test_wrong_lines_are_named(lines, record, message):
    """A line that is no grid is one line of an error: file, number of the line, key."""
    with pytest.raises(UserError, match=f"mine.jsonl: line 2: {message}") as caught:
        lines(PAIR, record, PAIR)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_file_is_refused(lines):
    """A file without a grid is an error, not an endless wait."""
    with pytest.raises(UserError, match="is empty"):
        lines()
    with pytest.raises(UserError, match="no grid in it; write one JSON object a line"):
        lines(b"", b"  ")


def test_blank_lines_at_the_end(lines):
    """They are what editors leave, and hold no grid: the same data, of the same digest."""
    assert lines(PAIR, PAIR, b"", b" ").digest() == lines(PAIR, PAIR).digest()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PAR1\x15\x04", "is a file of Parquet"),
        ("{}".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_data_that_is_no_lines(tmp_path, content, message):
    """Data in another format says so."""
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"line 1: (is )?{message}"):
        open_own(str(tmp_path / "mine.jsonl"), FIXED)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_list_is_as_good_as_lines(lines, tmp_path, indent, start):
    """A file that is one JSON list holds the samples that lines of its items would, whatever its
    lines are, and names an item; so does a file that begins with a byte order mark."""
    records = [PAIR, PAIR | {"content_prompt": "Füchse [1], {"}]
    wanted, file = [*lines(*records).samples], tmp_path / "mine.jsonl"
    whole = json.dumps(records, ensure_ascii=False, indent=indent)
    for text in (whole, "\n".join(json.dumps(record) for record in records)):
        file.write_text(start + text, "utf-8")
        assert [*open_own(str(file), FIXED).samples] == wanted
    file.write_text(json.dumps([PAIR, {"image": []}], indent=indent))
    with pytest.raises(UserError, match="mine.jsonl: item 2: image: no cell"):
        open_own(str(file), FIXED)
    file.write_text("[]")
    with pytest.raises(UserError, match="no grid in it"):
        open_own(str(file), FIXED)


@pytest.mark.parametrize("suffix", ["csv", "TSV"])
def test_a_table_is_refused_by_name(tmp_path, suffix):
    """What a spreadsheet writes is told as what it is, with what writes the lines."""
    (tmp_path / f"mine.{suffix}").write_text("source,target\n0.png,1.png\n")
    with pytest.raises(UserError, match=rf"mine.{suffix}: is a table; .*orient='records'"):
        open_own(str(tmp_path / f"mine.{suffix}"), FIXED)


@pytest.mark.parametrize("orient", ["columns", "index"])
def test_a_table_in_one_object_is_refused_by_name(lines, orient):
    """What pandas' to_json writes unless told otherwise is a table, too, and no pair with a fault
    in one of its keys."""
    rows = {"source": ["0.png", "1.png"], "target": ["1.png", "0.png"]}
    table = {key: dict(enumerate(column)) for key, column in rows.items()}
    if orient == "index":
        table = {i: {key: column[i] for key, column in rows.items()} for i in range(2)}
    with pytest.raises(UserError, match="line 1: is a table; .*orient='records'"):
        lines(table)


def test_only_regular_files_are_opened(lines, tmp_path):
    """Neither a pipe nor a device is read."""
    lines(PAIR)
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UserError, match="pipe|device"):
            open_own(str(path), FIXED)
