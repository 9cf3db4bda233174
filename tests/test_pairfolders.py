"""Laws of the user's own folders of pairs: a pair is a sample with its text, or an error."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.owndata import ASKED, open_own
from vcloze_jax.data.pairfolders import INSTRUCTION, SIDES, FolderSamples

FIXED = replace(MINI.recipe, held_out=0.0, **ASKED)


@pytest.mark.parametrize("form", ["{side}/{name}.png", "{name}_{side}.jpg"])
@pytest.mark.parametrize("sides", SIDES)
def test_folders(tmp_path, form, sides):
    """Both forms of a folder, by name, with the texts that there are; other files do not matter."""
    if form.startswith("{name}") and sides[0].endswith(f"_{sides[1]}"):
        pytest.skip("one is an end of the other")
    for side, level in zip(sides, (0, 200), strict=True):
        for i, name in enumerate(("b", "a.x")):
            file = tmp_path / form.format(side=side, name=name)
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), (60 * i, level, 0)).save(file, quality=100)
    (tmp_path / "a.x.txt").write_text(" an\n apple ")
    (tmp_path / "notes.md").write_text("nothing")
    (tmp_path / f".hidden_{sides[0]}.png").write_text("nothing")
    samples = FolderSamples(tmp_path)
    assert [samples.name(i) for i in range(len(samples))] == [
        f"{tmp_path}: {n}" for n in ("a.x", "b")
    ]
    assert [sample.texts["content_prompt"] for sample in samples] == ["an apple", None]
    source = open_own(str(tmp_path), FIXED)
    assert [shape.rows for shape in source.shapes()] == [1, 2] and source.pairs
    query = source.example(np.random.default_rng(0), source.shapes()[0], [0]).grid.query
    assert abs(query.pixels[0, 0].astype(int) - [60, 0, 0]).max() < 4
    assert abs(query.pixels[0, -1].astype(int) - [60, 200, 0]).max() < 4


@pytest.mark.parametrize("form", ["{side}/{name}.png", "{name}_{side}.png"])
def test_folders_as_systems_make_them(tmp_path, form):
    """Whatever the case of the two names, and the Unicode form of a picture's: macOS decomposes
    accents. Folders lie in folders; what a system leaves beside pictures is none; kohya's texts
    end in .caption; Windows has a byte order mark before them."""
    for side, code in (("In", "NFD"), ("OUT", "NFC")):
        for name in ("caf\u00e9", "more/b.x"):
            file = tmp_path / form.format(side=side, name=unicodedata.normalize(code, name))
            for place in (
                file,
                file.parent / "@eaDir" / file.name,
                file.with_name(f"._{file.name}"),
            ):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            file.with_suffix(".caption").write_text(f"\ufeff{name}", "utf-8")
    (tmp_path / "out").touch()
    if "_" in form:  # beside the target's picture, as beside the other, it is that of NAME
        for file in list(tmp_path.rglob("*.caption")):
            file.rename(file.with_name(file.name.replace("_OUT", "").replace("_In", "")))
    samples = FolderSamples(tmp_path)
    assert [pair[0] for pair in samples.pairs] == ["caf\u00e9", "more/b.x"]
    assert [sample.texts["content_prompt"] for sample in samples] == ["caf\u00e9", "more/b.x"]


def test_wrong_folders_are_named(tmp_path):
    """What has no partner, what has two, and a folder without pairs are one line of an error."""
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no pair in it: neither in/NAME.png"):
        FolderSamples(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("in/a.png", "in/b.png", "out/a.jpg"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="b: there is its 'in' picture alone; add 'out'"):
        FolderSamples(tmp_path)
    (tmp_path / "out" / "B.jpg").touch()
    with pytest.raises(UserError, match="out/B.jpg and in/b.png: write their names alike"):
        FolderSamples(tmp_path)
    (tmp_path / "in" / "a.webp").touch()
    with pytest.raises(UserError, match="in/a.webp: in/a.png has the same name; remove one"):
        FolderSamples(tmp_path)
    (tmp_path / "in" / "a.webp").unlink()
    (tmp_path / "out" / "B.jpg").rename(tmp_path / "out" / "b.jpg")
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(UserError, match="metadata.jsonl: its texts are not read beside pairs"):
        FolderSamples(tmp_path)


@pytest.mark.parametrize("place", [".", "in", "more/of"])
@pytest.mark.parametrize("name", ["prompt.json", "metadata.jsonl", "pairs.jsonl"])
def test_texts_are_not_lost_beside_pairs(tmp_path, place, name):
    """A file that says something of pairs, whatever its name and wherever it lies in the folder
    (ControlNet's fill50k, `datasets`), is named with what reads it; one that says nothing is not
    in the way, nor is what is beside each picture."""
    for side in ("in", "out", place):
        (tmp_path / side).mkdir(parents=True, exist_ok=True)
    for file in ("in/a.png", "out/a.png"):
        (tmp_path / file).touch()
        (tmp_path / file).with_suffix(".json").write_text(json.dumps({"caption": "a fox"}))
    (tmp_path / "config.json").write_text(json.dumps({"steps": 3}, indent=1))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"source": "in/a.png", "target": "out/a.png"}))
    assert len(FolderSamples(tmp_path)) == 1

    told = {"source": "in/a.png", "target": "out/a.png", "prompt": "a fox"}
    (tmp_path / place / name).write_text("\n".join([json.dumps(told)] * 2))
    where = str(Path(place) / name)
    with pytest.raises(UserError, match=f"{where}: its texts are not read.*; give that file as"):
        FolderSamples(tmp_path)
    (tmp_path / place / name).rename(tmp_path / place / "metadata.csv")
    with pytest.raises(UserError, match="metadata.csv: its texts are not read.* into NAME.txt"):
        FolderSamples(tmp_path)


@pytest.mark.parametrize("sides", ["", "conditioning_images images"])
@pytest.mark.parametrize("text", [None, "a fox"])
def test_a_file_that_names_the_pairs_is_named(tmp_path, sides, text):
    """Law: where a file's lines are the pairs and the pictures do not pair by name (an imagefolder
    of `datasets`), the remedy is to give that file, with texts or none, and never to write others;
    so it is where the first line alone has no text."""
    a, b = [f"{side}/{name}" for side, name in zip(sides.split() or "..", ("0c", "0"), strict=True)]
    for file in (a, b):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.png").touch()
    lines = [{"source_file_name": f"{a}.png", "target_file_name": f"{b}.png", "text": None}] * 2
    lines[1] = lines[1] | {"text": text}
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="metadata.jsonl: .*; give that file as --data"):
        FolderSamples(tmp_path)
    if not sides:
        file.write_text(json.dumps({"left_file_name": "0c.png", "right_file_name": "0.png"}))
        for name in ("metadata.jsonl", "metadata.csv"):
            file = file.rename(tmp_path / name)
            message = f"no pair in it: .*; if {name} names its pairs, give that file as --data"
            with pytest.raises(UserError, match=message):
                FolderSamples(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A pair in folders and, in another folder, one by the ends of names."""
    for name in ("in/a.png", "out/a.png", "flat/a_in.png", "flat/a_out.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def say(file, said):
    file.parent.mkdir(exist_ok=True)
    file.write_text(said if isinstance(said, str) else json.dumps(said))


SAID = {  # what a text file of a pair holds -> what is said of its target
    "img2dataset": ({"caption": "a fox", "url": "http://x/a.png", "status": "success"}, "a fox"),
    "a prompt": ({"prompt": "a fox", "seed": 3, "negative_prompt": "bad"}, "a fox"),
    "an instruction": ({"edit": "make it red", "output": "a red fox"}, f"{INSTRUCTION}make it red"),
    "nothing": ({"width": 64, "caption": None}, None),
    "a list": ([{"label": "fox"}], None),
    "large": ({"imageData": "A" * 2**17, "shapes": []}, None),
}


@pytest.mark.parametrize("kind", SAID)
def test_captions_in_json(folder, kind):
    """NAME.json beside a picture is read as NAME.txt is, whatever tool wrote it, and where it says
    nothing of a picture, the next text does."""
    said, wanted = SAID[kind]
    say(folder / "in" / "a.json", said)
    assert FolderSamples(folder)[0].texts["content_prompt"] == wanted
    say(folder / "out" / "a.txt", "the target")
    assert FolderSamples(folder)[0].texts["content_prompt"] == "the target"


@pytest.mark.parametrize(
    "said, message",
    [
        ("{", "not JSON at column 2"),
        ({"caption": "a", "prompt": "b"}, "caption and prompt: keep one"),
        ({"caption": ["a", "b"]}, "caption: must be a string, not a list"),
    ],
)
def test_captions_in_json_that_are_none(folder, said, message):
    """What stands there and cannot be read as the one text is an error that names the file."""
    say(folder / "out" / "a.json", said)
    with pytest.raises(UserError, match=rf"out/a\.json'?: .*{message}"):
        FolderSamples(folder)[0]


@pytest.mark.parametrize("name", ["a.txt", "a_out.txt", "a_out.caption", "a_out.json"])
def test_texts_have_the_name_of_the_pair_or_of_its_target(folder, name):
    """kohya's is that of the picture, which ends in the side where there are no folders of it."""
    say(folder / "flat" / name, {"text": "a fox"} if name.endswith("json") else "a fox")
    assert FolderSamples(folder / "flat")[0].texts["content_prompt"] == "a fox"


@pytest.mark.parametrize(
    "table",
    [
        {"in/a": {"caption": "a fox", "tags": "fox"}},
        {"a.png": {"p": "a fox", "se": 3}},
        {"a.png": "a fox"},
        {"a": ["a fox"]},
    ],
)
def test_tables_of_texts_are_not_lost(folder, table):
    """kohya's meta_cap.json, DiffusionDB's part.json: an object that names pictures of the folder
    is refused with what would be read."""
    say(folder / "meta_cap.json", table)
    with pytest.raises(UserError, match="meta_cap.json: its texts are not read.*into NAME.txt"):
        FolderSamples(folder)


@pytest.mark.parametrize("name", ["captions/a.txt", "flat/a.caption"])
def test_texts_elsewhere_are_not_lost(folder, name):
    """A text of a pair's name in another folder is refused; one of another name is not in the
    way."""
    say(folder / "captions" / "licence.txt", "free")
    assert FolderSamples(folder)[0].texts["content_prompt"] is None
    say(folder / name, "a fox")
    with pytest.raises(UserError, match=f"{name}: its text is not read there; put it beside"):
        FolderSamples(folder)


@pytest.mark.parametrize("suffix", ["TXT", "Json"])
def test_texts_in_capitals_are_not_lost(folder, suffix):
    """A text whose suffix is not read, beside a picture, whose suffix is read in any case."""
    (folder / f"out/a.{suffix}").write_text("a fox")
    told = f"out/a.{suffix}: its text is not read; its suffix is .{suffix.lower()}, in small"
    with pytest.raises(UserError, match=told):
        FolderSamples(folder)


@pytest.mark.parametrize("suffix", [".heic", ".AVIF", ".npy", ".mp4"])
def test_pictures_that_are_not_read_are_named(folder, suffix):
    """Law: a pair is never left out without a word because of the kind of its files."""
    for side in ("in", "out"):
        (folder / side / f"b{suffix}").touch()
    with pytest.raises(UserError, match=f"in/b{suffix}: pictures of that kind are not read; conv"):
        FolderSamples(folder)


def test_links_to_folders_are_followed(folder):
    """Law: nor because its folders are links; one that leads back is passed over, and a pipe that
    looks like a file of texts is not waited for."""
    for side in ("in", "out"):
        (folder / "else" / side).mkdir(parents=True)
        (folder / "else" / side / "b.png").touch()
        (folder / side / "more").symlink_to(f"../else/{side}")
    (folder / "in" / "loop").symlink_to("..")
    os.mkfifo(folder / "meta.json")
    assert [pair[0] for pair in FolderSamples(folder).pairs] == ["a", "more/b"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("train/in/a.png", "give the folder in it that has both, .*/train$"),
        ("data/train-0.parquet", "data/train-0.parquet is not read: unpack it, or write lines"),
        ("0001.tar", "0001.tar is not read: unpack it"),
    ],
)
def test_a_folder_without_pairs_says_what_it_is(tmp_path, name, message):
    """Where the pairs are one folder deeper, or the data is in other files, the line says so."""
    for file in (tmp_path / name, tmp_path / "train/out/a.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.raises(UserError, match=f"no pair in it: .*{message}"):
        FolderSamples(tmp_path)
