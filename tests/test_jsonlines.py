"""Laws of the user's own grids: a line is a grid with its truth, or one UserError that names it."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.data.jsonlines import JSONLinesGrids

PAIR = {"image": [["0.png", "1.png"], ["0.png", "1.png"]]}
HALF = {"image": "0.png", "mask": "half.png"}


@pytest.fixture
def lines(tmp_path):
    """Write records as a JSON-lines file beside four pictures and a mask, and open it."""
    for i, size in enumerate([(64, 64), (64, 64), (96, 48), (96, 48)]):
        Image.new("RGB", size, (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    half = np.repeat([[0, 255]], 64, axis=0).repeat(32, axis=1).astype(np.uint8)
    Image.fromarray(half).save(tmp_path / "half.png")
    Image.fromarray(half * 0).save(tmp_path / "black.png")
    os.mkfifo(tmp_path / "pipe.png")

    def open_lines(*records):
        text = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        (tmp_path / "mine.jsonl").write_bytes(b"\n".join(text))
        return JSONLinesGrids(tmp_path / "mine.jsonl", 64)

    return open_lines


def test_sentences(lines):
    """Sentences are a spec's, named tasks and null included."""
    fox = {"task_prompt": "T", "content_prompt": "a fox", "layout_prompt": ""}
    layout = "A grid layout with 2 rows and 2 columns, displaying 4 images arranged side by side."
    for change, prompt in (
        (fox, "T The last image of the last row depicts: a fox"),
        ({"task_prompt": None}, layout),
        ({"task": "colorization", "layout_prompt": ""}, "In each row, a logical task"),
    ):
        ((example,),) = lines(PAIR | change).groups.values()
        assert example.prompt.startswith(prompt)


def test_shapes_come_as_often_as_lines_have_them(lines):
    """A shape is that of its share of the lines; a caption is dropped in one of ten draws. A file
    holds no grid back."""
    grids = lines(PAIR, PAIR, PAIR, {"image": [["2.png", "3.png"]]}, b"")
    assert grids.held_out() is grids
    rng = np.random.default_rng(0)
    shapes = [grids.shape(rng) for _ in range(400)]
    examples = [grids.example(rng, shape) for shape in shapes]
    assert all(e.grid.shape == shape for e, shape in zip(examples, shapes, strict=True))
    # Four deviations of a binomial count.
    assert abs(sum(len(shape) == 2 for shape in shapes) - 300) < 4 * 400**0.5 * 0.433
    assert abs(sum(not e.prompt for e in examples) - 40) < 4 * 400**0.5 * 0.3


def test_what_is_learnt(lines):
    """Without a mask it is the last cell, with its truth; with masks it is what they say."""
    ((whole,),) = lines(PAIR).groups.values()
    assert whole.grid.targets == [1] and whole.grid.query.mask[:, 64:].all()
    assert (whole.grid.query.pixels[:, 64:] == [60, 0, 0]).all()
    ((part,),) = lines({"image": [["0.png", "1.png"], [HALF, "1.png"]]}).groups.values()
    assert part.grid.targets == [0]
    assert part.grid.query.mask.sum() == 64 * 32 and part.grid.query.mask[:, 32:64].all()


BAD = [  # beside what test_spec.py says of JSON and of cells: a line is read by the same functions
    # the line
    (b"{", "is not JSON.*; each line is a JSON object"),
    (b"", "is empty; each line is a JSON object"),
    (b'{"image": [["\xff.png"]]}', "is not UTF-8"),
    (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    (b'{"image": [["0.png"]], "image": [["0.png"]]}', "'image': given twice"),
    (b"[]", "must be an object"),
    (b"NaN", "must be an object"),
    ({"task_prompt": "T"}, "image: missing"),
    ({"image": None}, "image: missing"),
    (PAIR | {"prompt": "x"}, "'prompt': unknown key"),
    (PAIR | {"seed": 1}, "'seed': unknown key"),
    (PAIR | {"task_prompt": 3}, "task_prompt: must be a string"),
    (PAIR | {"task": "colorizatio"}, "task: no task .*did you mean 'colorization'"),
    # the grid
    ({"image": "0.png"}, "image: must be a list"),
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


def test_only_regular_files_are_opened(lines, tmp_path):
    """Neither a pipe nor a folder nor a device is read."""
    lines(PAIR)
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="pipe|folder|device"):
            JSONLinesGrids(path, 64)
