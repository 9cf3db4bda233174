"""A spec that is bad is named, with the key or the cell: the table of all that was tried."""

import json
import random

import pytest
from specfolder import GRID, ROW, make_folder, read

from vcloze_jax.config import MINI, UserError
from vcloze_jax.inputs.specfiles import read_specs


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def deep(levels):
    return '{"image": ' + "[" * levels + "]" * levels + "}"


def cell(content):
    return {"image": [["a.png", content]]}


def with_values(key, *values):
    """Bad values of one key; each is named by it."""
    return [({"image": GRID, key: value}, f"{key}: ") for value in values]


BAD_NUMBERS = (True, False, "30", [], {}, -1, 10**30, float("nan"), float("inf"))
BAD_TEXTS = (0, False, ["a"], {"a": 1}, 1.5, "\ud800")


BAD = [
    # the file
    ("", "is empty"),
    (" ", "is empty"),
    ("{", 'not JSON at column 2: a key in "…" should stand there, not the end'),
    ("{'image': []}", 'not JSON at column 2: .* a quote that JSON does not know; write "'),
    ('{"image": [[null]],}', "not JSON at column (19|20): a .*comma.*"),
    ('{"image": [\n [null],\n]}', "not JSON at line [23], column .: a .*comma.*"),
    ('{"image": [[null]]} x', "not JSON at column 21: nothing should stand behind the end"),
    ('{"image": [[null]]}\n{"image": [[null]]}', "not JSON at line 2, column 1: nothing should"),
    ('{"image": [["a\n.png", null]]}', "not JSON at line 1, column 15: a line break or a tab is"),
    (r'{"image": [["C:\data\a.png", null]]}', "not JSON at column 16: a backslash .*; write / in"),
    ('{"image": [[null]] "seed": 1}', "not JSON at column 20: a comma or a closing bracket should"),
    ('{"image": [[null]], // two\n"seed": 1}', "a comment, which JSON does not know; remove it"),
    ('{"image": [[None]]}', "a value should stand there, not a word of Python; write true, false"),
    ('{"image" = [[null]]}', "not JSON at column 10: a colon should stand there, not '='"),
    ('{"image": [["a.png, null]]}', 'not JSON at column 13: a text begins that no " closes'),
    ('{"image": [[null]]}'.encode("utf-16"), "UTF-8"),
    (b'{"image": [["\xff.png", null]]}', "UTF-8"),
    (b"\0" * 64, "holds zero bytes, as UTF-16 and archives do; save it as text in UTF-8"),
    (b"\x1f\x8b\x08\x00\xff", "is compressed by gzip; unpack it"),
    (b"\x89PNG\r\n\x1a\n", "is a picture; give the JSON file"),
    ("[" * 200_000, "too deep"),
    (deep(100_000), "too deep"),
    (" " * (2**22 + 1), "bytes"),
    # the top
    ("null", "an object"),
    ("NaN", "an object"),
    ("3", "an object"),
    ('"a.png"', "an object"),
    ("[]", "empty list"),
    ("[[]]", r"\[0\]: must be an object"),
    ("[null]", r"\[0\]: must be an object"),
    ("{}", "image: missing"),
    ('{"image": [[null]], "image": [[null]]}', "'image': given twice"),
    ('{"image": [[null]], "seed": 1, "seed": 1}', "'seed': given twice"),
    ('{"image": [[{"image": "a.png", "mask": "half.png", "mask": "x"}]]}', "'mask': given twice"),
    ({"images": GRID}, "'images': say image, "),
    ({"image": GRID, "Seed": 1}, "'Seed': unknown key .did you mean 'seed'"),
    ({"image": GRID, "steps": 1}, "'steps': say num_inference_steps"),
    ({"image": GRID, "content": "x"}, "'content': unknown key .did you mean 'content_prompt'"),
    ({"image": GRID, "": 1}, "'': unknown key"),
    ({"image": GRID, "\ud800": 1}, "unknown key"),
    ({"image": GRID, "a\nb": 1}, "unknown key"),
    # the grid
    ({"image": None}, "image: must be a list"),
    ({"image": "a.png"}, "image: must be a list"),
    ({"image": {}}, "image: must be a list"),
    ({"image": 3}, "image: must be a list"),
    ({"image": []}, "image: no cell"),
    ({"image": [[]]}, "image: no cell"),
    ({"image": [[], []]}, "image: no cell"),
    ({"image": ["a.png", None]}, r"image\[0\]: must be a list"),
    ({"image": [None]}, r"image\[0\]: must be a list, .*not null"),
    ({"image": [["a.png"], ["a.png", None]]}, r"image\[1\]: 2 cells"),
    ({"image": [["a.png", "b.png"], []]}, r"image\[1\]: 0 cells"),
    ({"image": ROW}, r"image\[0\]: no target"),
    ({"image": [["a.png", None], ["a.png", None]]}, r"image\[0\]\[1\]: only the last row"),
    ({"image": [["a.png", None], ["a.png", "b.png"]]}, r"image\[0\]\[1\]: only the last row"),
    ({"image": [[None] * 5000]}, "image: the grid has 80000 tokens"),
    ({"image": [["missing.png"]] * 20_000}, "image: 20000 pictures of at most 1024"),
    ([{"image": [["missing.png"]]}] * 20_000, "grid 20000 of at most 1024 at once"),
    # the cells
    (cell(True), r"image\[0\]\[1\]: a cell is"),
    (cell(0), r"image\[0\]\[1\]: a cell is"),
    (cell(float("nan")), r"image\[0\]\[1\]: a cell is"),
    (cell([]), r"image\[0\]\[1\]: a cell is"),
    (cell({}), r"image\[0\]\[1\]: a cell is"),
    (cell({"image": 3}), r"image\[0\]\[1\]: image: must be a string, not 3"),
    (cell({"image": {"image": "a.png"}}), r"image\[0\]\[1\]: image: must be a string, not an"),
    (cell({"mask": "half.png"}), r"image\[0\]\[1\]: a cell is"),
    (cell({"image": "a.png", "mask": "half.png", "x": 1}), r"image\[0\]\[1\]: a cell is"),
    (cell({"image": None, "mask": "half.png"}), r"image\[0\]\[1\]: image: must be a string"),
    (cell({"image": "a.png", "mask": "no.png"}), r"image\[0\]\[1\]: .*no\.png.*No such file"),
    (cell({"image": "a.png", "mask": "text.png"}), r"image\[0\]\[1\]: .*text\.png.*none of PNG"),
    (cell({"image": "a.png", "mask": "black.png"}), r"image\[0\]\[1\]: the mask is all black"),
    (cell({"image": "a.png", "mask": "clear.png"}), r"image\[0\]\[1\]: the mask is all black or"),
    (cell({"image": "a.png", "mask": "dim.png"}), r"image\[0\]\[1\]: mask: .*dim.* grey is 99"),
    (cell({"image": "wide.png", "mask": "half.png"}), r"image\[0\]\[1\]: the mask is 64x64"),
    (cell(""), r"image\[0\]\[1\]: an empty path"),
    (cell("absent.png"), r"image\[0\]\[1\]: .*absent\.png.*No such file"),
    (cell("text.png"), r"image\[0\]\[1\]: .*text\.png.*none of PNG"),
    (cell("pipe.png"), r"image\[0\]\[1\]: .*pipe"),
    (cell("."), r"image\[0\]\[1\]: .*folder"),
    (cell("/dev/zero"), r"image\[0\]\[1\]: .*device"),
    (cell("http://example.org/a.png"), r"image\[0\]\[1\]: .*URL"),
    (cell("a\0.png"), r"image\[0\]\[1\]: .*null"),
    (cell("x" * 5000), r"image\[0\]\[1\]: .*too long"),
    (cell("\ud800.png"), r"image\[0\]\[1\]: .*surrogate"),
    (cell("new\nline.png"), r"image\[0\]\[1\]: "),
    (cell("noise.npy"), r"image\[0\]\[1\]: .*none of PNG"),
    # what says what it is, and what would do
    ({"image": ["a.png", None]}, r"image\[0\]: must be a list, a row .* \[path, null\], not"),
    ({"image": GRID, "seed": "3"}, r'seed: must be an integer in 0 ... 4294967295, not "3"$'),
    ({"image": GRID, "guidance_scale": "3"}, r'guidance_scale: must be a number .*, not "3"$'),
    ({"image": GRID, "mask_image": "a.png"}, "'mask_image': a cell that is masked is {.image"),
    ({"image": GRID, "lora": "x"}, "'lora': give adapters as --lora"),
    ('{"image": [[null]]}'.encode("utf-16-le"), "holds zero bytes, as UTF-16 and archives do"),
    ('{\u00a0"image": []}', r"a key in \"…\" should stand there, not '\\xa0'"),
    ({"nodes": [{"type": "LoadImage"}]}, "'nodes': unknown key"),
    # the values
    *with_values("seed", *BAD_NUMBERS, 1.0, 2**32),
    *with_values("num_inference_steps", *BAD_NUMBERS, 0, 2.5, 1001),
    *with_values("resolution", *BAD_NUMBERS, 0, 15, 64.0, 4097),
    *with_values("guidance_scale", *BAD_NUMBERS, -0.1, 1e300),
    *with_values("task_prompt", *BAD_TEXTS),
    *with_values("content_prompt", *BAD_TEXTS),
    *with_values("layout_prompt", *BAD_TEXTS),
    *with_values("task", *BAD_TEXTS, "", "depth-to-imag", "try-on"),
    *with_values("upsampling", True, 2, "x", []),
    *with_values("latents", 0, True, [], "", "\ud800", "a.png", "absent.npy", "/dev/zero", "."),
    ('{"image": [[null]], "seed": 1e999}', "seed: must be an integer"),
    ('{"image": [[null]], "seed": ' + "9" * 5000 + "}", "seed: must be an integer"),
    ('{"image": [[null]], "guidance_scale": -Infinity}', "guidance_scale: must be a number"),
    ({"image": GRID, "task": "depth-to-image", "task_prompt": "x"}, "task: given beside"),
    ({"image": GRID, "task": "dept-to-image"}, "did you mean 'depth-to-image'"),
    ({"image": GRID, "task": "gray-to-fluent_4d"}, "did you mean 'gray-to-fluent_3d'"),
    ({"image": GRID, "task": "try-on"}, "task: try-on has 3 columns, the grid 2"),
    *(
        ({"image": GRID, "latents": name}, r"latents: .*S = 64 tokens")
        for name in ("short.npy", "empty.npy", "double.npy", "object.npy", "archive.npz", "cut.npy")
    ),
    ({"image": GRID, "latents": "nan.npy"}, "latents: .*finite"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec, message", BAD, ids=range(len(BAD)))
def test_bad_specs_are_named(folder, capfd, spec, message):
    """Law: a bad spec is one UserError of one line that names the file, then the key or cell."""
    with pytest.raises(UserError, match=message) as caught:
        read(folder, spec)
    assert str(caught.value).startswith(f"{folder / 'fox.json'}: ")
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()
    assert capfd.readouterr() == ("", "")


def test_damaged_specs_never_raise_anything_else(folder):
    """Law: a spec with random damage is still a spec, or a UserError of one line."""
    draw = random.Random(0)
    text = json.dumps({"image": GRID, "seed": 3, "content_prompt": "a fox", "latents": None})
    for _ in range(300):
        damaged = bytearray(text.encode())
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.randrange(len(damaged))] = draw.choice(b'"{}[]:,0-9eE.tfn\\\xff a')
        try:
            assert read(folder, bytes(damaged)).grid.targets
        except UserError as error:
            assert len(str(error).splitlines()) == 1


def test_bad_spec_in_a_list_names_its_place(folder):
    """Law: in a list the message names which spec, then the key."""
    with pytest.raises(UserError, match=r"fox\.json: \[1\]: seed: "):
        read(folder, [{"image": GRID}, {"image": GRID, "seed": -1}])


def test_spec_files_that_are_no_files(folder):
    """Law: an absent spec, a folder and a pipe are refused by name and do not hang."""
    for name in ("absent.json", ".", "pipe.png"):
        with pytest.raises(UserError, match="absent|folder|pipe"):
            read_specs([folder / name], MINI)
