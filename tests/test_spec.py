"""Laws of spec.py and prompts.py: a good spec becomes one grid and prompt, a bad one is named."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vcloze_jax.config import FLUX_FILL, MINI, UserError
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.spec import KEYS
from vcloze_jax.inputs.specfiles import IMAGES, read_specs, write_spec
from vcloze_jax.inputs.tasks import find_task, list_tasks

ROW = [["a.png", "b.png"]]
GRID = [["a.png", "b.png"], ["b.png", None]]
LAYOUT = "A grid layout with 2 rows and 2 columns, displaying 4 images arranged side by side."
TOKENS = 64  # of GRID at resolution 64: four cells of 4 x 4


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures a, b (64 x 64), wide (100 x 50), masks white, half, black, and noise."""
    draw = np.random.default_rng(0)
    for name, (h, w) in {"a": (64, 64), "b": (64, 64), "wide": (50, 100)}.items():
        Image.fromarray(draw.integers(0, 256, (h, w, 3), np.uint8)).save(tmp_path / f"{name}.png")
    half = np.repeat([[0, 255]], 64, axis=0).repeat(32, axis=1).astype(np.uint8)
    for name, mask in {"half": half, "white": half | 255, "black": half & 0}.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    Image.new("L", (64, 64), 99).save(tmp_path / "dim.png")
    Image.new("LA", (64, 64), (255, 0)).save(tmp_path / "clear.png")
    strokes = np.stack([half | 255, half], axis=-1)  # white, and clear where `half` is black
    Image.fromarray(strokes, "LA").save(tmp_path / "strokes.png")
    noise = draw.standard_normal((TOKENS, 64)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    np.save(tmp_path / "short.npy", noise[1:])
    np.save(tmp_path / "empty.npy", noise[:0])
    np.save(tmp_path / "double.npy", noise.astype(np.float64))
    np.save(tmp_path / "nan.npy", np.where(noise > 3, np.nan, noise))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", noise)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "noise.npy").read_bytes()[:-4])
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


def read(folder, spec, preset=MINI, name="fox.json"):
    """Write `spec` (an object, or the text of a file) and read it back as one Spec."""
    text = spec if isinstance(spec, str | bytes) else json.dumps(spec)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_specs([folder / name], preset)[0]


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


# --- what is wrong, and where ---


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


# --- prompts ---


def test_templates_are_ten_each_and_distinct():
    """Law: ten layouts, ten task sentences, ten prefixes; a layout says rows, columns, count."""
    for templates in (prompts.LAYOUTS, prompts.TASK_SENTENCES, prompts.CONTENT_PREFIXES):
        assert len(templates) == len(set(templates)) == 10
    for i in range(10):
        said = prompts.layout_prompt(2, 3, i)
        assert all(number in said for number in "236") and "{" not in said
        said = prompts.task_prompt(["fog", "sun"], i)
        assert "[IMAGE1] fog" in said and "[IMAGE2] sun" in said and "{" not in said


@pytest.mark.parametrize("prefix", prompts.CONTENT_PREFIXES + prompts.EDITING_PREFIXES)
def test_prefixes_are_added_once_and_stripped(prefix):
    """Law: a content that has a prefix gets no second one; stripping gives the bare content."""
    assert prompts.content_sentence(prefix + "a fox") == prefix + "a fox"
    assert prompts.strip_prefix(prefix + "a fox") == "a fox"
    assert prompts.strip_prefix(prompts.content_sentence("a fox")) == "a fox"
    assert prompts.content_sentence(" ") == ""


def test_named_tasks():
    """Law: every demo of the authors has a name, whose sentence speaks of every column once."""
    tasks = list_tasks(FLUX_FILL)
    assert {"image-to-depth-normal-and-hed", "depth-to-image-and-relighting"} < tasks.keys()
    for name, task in tasks.items():
        assert find_task(name) == task
        numbers = [task.prompt.count(f"[IMAGE{i}] ") for i in range(1, task.columns + 1)]
        assert numbers == [1] * task.columns, name
        assert f"[IMAGE{task.columns + 1}]" not in task.prompt
    assert tasks["image-to-depth-normal-and-hed"].columns == 4
    assert len({task.prompt for task in tasks.values()}) == len(tasks)


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
