"""What is wrong with a folder of Graph200K is named, or its item drawn anew."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
from graphfolders import open_graph, write_both

from vcloze_jax.config import Recipe, UserError
from vcloze_jax.data.graph200k_items import open_items
from vcloze_jax.data.sources import draw_group, open_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"arrow", "json"}: the two forms of the tiny dataset."""
    return write_both(tmp_path_factory.mktemp("graph200k"))


@pytest.fixture
def copied(folders, tmp_path):
    """The Arrow form, to be spoilt: its folder."""
    return shutil.copytree(folders["arrow"], tmp_path / "copied")


def rewrite(split, change):
    """Write a split's table again as one new shard, changed; returns it."""
    table, state = change(open_items(split).table), json.loads((split / "state.json").read_text())
    shard = split / f"{len(list(split.iterdir()))}.arrow"  # the others are mapped
    with pa.ipc.new_stream(shard, table.schema) as writer:
        writer.write_table(table)
    state |= {"_data_files": [{"filename": shard.name}]}
    (split / "state.json").write_text(json.dumps(state))
    return shard


def set_picture(column, index, content):
    """A change of a table: other bytes for one picture."""

    def change(table):
        values = table[column].to_pylist()
        values[index] = {"bytes": content, "path": None}
        at = table.column_names.index(column)
        return table.set_column(at, column, pa.array(values, table.schema.field(column).type))

    return change


def test_schema_differences_are_named(copied, capsys):
    """A missing column leaves its tasks out, an unknown one is not used; both are told, with how
    many items have what."""
    rewrite(copied / "train", lambda t: t.drop_columns(["depth"]).append_column("more", [[1] * 8]))
    grids = open_graph(copied)
    told = capsys.readouterr().err.splitlines()
    where = f"--data-dir {copied}: "
    assert told[:2] == [f"{where}no column depth", f"{where}unknown column more, not used"]
    assert told[2].startswith(f"{where}6 tasks are left out, as less than 3 items have all that")
    assert "depth->target" in told[2] and "depth (0)" in told[2] and len(told) == 3
    assert len(grids.selection.shares) == 123
    assert not any("depth" in task.name for task in grids.selection.shares)
    with pytest.raises(UserError, match="no task is left that 3 items could show"):
        open_graph(copied, "depth->target")


def test_what_cannot_be_read_is_refused(copied, tmp_path):
    """No folder, no data in it, pictures as paths, columns of another type, half a shard: a line
    that names the remedy."""
    for folder, message in (
        ("", "^--data graph200k: --data-dir is missing"),
        (tmp_path / "nowhere", "holds no Graph200K; it has shards of save_to_disk"),
    ):
        with pytest.raises(UserError, match=message):
            open_graph(folder)
    with pytest.raises(UserError, match="^--data graph200k:x: no task; python -m vcloze_jax.data"):
        open_graph(copied, "x")
    with pytest.raises(UserError, match="^--held-out 0.5: the items in .*/test are held out"):
        open_source(Recipe(data="graph200k", data_dir=f"{copied}", held_out=0.5))
    with pytest.raises(UserError, match="^--data-dir x: only graph200k lies in one"):
        open_source(Recipe(data="graphemoji", data_dir="x"))
    split, path = copied / "train", {"bytes": None, "path": "a.jpg"}
    original = (split / "state.json").read_bytes()
    rewrite(split, lambda t: t.set_column(1, "target", pa.array([path] * 8, t.schema[1].type)))
    with pytest.raises(UserError, match="column target: 8 pictures are only named by paths; save"):
        open_graph(copied)
    (split / "state.json").write_bytes(original)
    shard = rewrite(split, lambda t: t.set_column(2, "canny", [["text"] * 8]))
    with pytest.raises(UserError, match="column canny holds string, not encoded pictures"):
        open_graph(copied)
    half = shard.read_bytes()[:-3000]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}' cannot be opened"):
        open_graph(copied)
    shard.write_bytes(half)
    with pytest.raises(UserError, match=f"{shard.name}: .*; fetch it again"):
        open_graph(copied)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"description": "a cat"}, "item 1: description is not as published"),
        ({"description": {"item": "cat", "description_0": 3}}, "item 1: description is not"),
        ({"n": 10**5000}, "byte [0-9]+: Exceeds the limit"),
    ],
)
def test_spoilt_items_are_refused(folders, tmp_path, entry, message):
    """Law: an item of a JSON file that is not as it must be is named where the file is opened."""
    file = shutil.copytree(folders["json"], tmp_path / "json") / "train" / "data.json"
    items = json.loads(file.read_text())
    items[1] |= entry
    sys.set_int_max_str_digits(0)
    file.write_text(json.dumps(items))
    sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    with pytest.raises(UserError, match=message):
        open_graph(tmp_path / "json")


def test_descriptions_in_another_form_are_refused(copied):
    """A column of descriptions that are plain text is named before anything is drawn."""
    at = open_items(copied / "train").table.column_names.index("description")
    rewrite(copied / "train", lambda t: t.set_column(at, "description", [["a cat"] * 8]))
    with pytest.raises(UserError, match="column description holds string, not fields as item"):
        open_graph(copied)


def test_pictures_that_moved_are_told_at_once(folders, tmp_path):
    """Where the list stayed and its pictures went, that is told when it is opened, in one line."""
    file = shutil.copytree(folders["json"], tmp_path / "json") / "train" / "data.json"
    items = json.loads(file.read_text())
    for item in items[1:]:  # the first of some that are tried is there
        item["condition"]["target"] = "gone.jpg"
    file.write_text(json.dumps(items))
    open_graph(tmp_path / "json")
    items[0]["condition"]["target"] = "gone.jpg"
    file.write_text(json.dumps(items))
    with pytest.raises(
        UserError, match="train/data.json: item .*target.*; nor can those of others"
    ):
        open_graph(tmp_path / "json")


def test_texts_are_utf8(folders, tmp_path):
    """An item whose bytes are Latin-1 is refused by number and remedy, not by a codec's words."""
    file = shutil.copytree(folders["json"], tmp_path / "json") / "train" / "data.json"
    items = json.loads(file.read_text())
    items[2]["description"] = {"item": "café"}
    file.write_bytes(json.dumps(items, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="item 2: is not UTF-8; save it as UTF-8"):
        open_items(file).describe(2)


def test_what_nothing_held_out_can_show_is_told(copied, capsys):
    """Where previews and validation have to show trained items, that is said."""
    rewrite(copied / "test", lambda t: t.drop_columns(["depth"]))
    assert open_graph(copied).reserve and not capsys.readouterr().err
    assert open_graph(copied, "depth->target").reserve is None
    told = "nothing held out can show these tasks: previews and their losses are of trained items"
    assert capsys.readouterr().err == f"--data-dir {copied}: {told}\n"


def test_broken_items_are_drawn_anew(copied, capsys):
    """A picture that cannot be decoded costs its item, never the task: named once, counted, the
    same in every run; more of them than are allowed stop it."""
    rewrite(copied / "train", lambda table: pa.concat_tables([table] * 13))
    rewrite(copied / "train", set_picture("canny", 2, b"no picture"))
    grids = open_graph(copied, "canny->target")
    whole = [example for number in range(12) for example in draw_group(grids, 0, number, 12)]
    assert {example.kind for example in whole} == {"conditional-generation"}
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"skipped: {copied}/train: item 2: canny is none of PNG, JPEG")
    assert told.endswith("(1 of 104 samples broken, 1 allowed)")
    again = draw_group(open_graph(copied, "canny->target"), 0, 11, 12)
    for a, b in zip(whole[-12:], again, strict=True):
        assert a.prompt == b.prompt
        np.testing.assert_array_equal(a.grid.query.pixels, b.grid.query.pixels)
    rewrite(copied / "train", set_picture("canny", 4, b"broken, too"))
    grids = open_graph(copied, "canny->target")
    with pytest.raises(UserError, match=r"item \d: canny .*\(2 of 104 samples broken, 1 allowed"):
        for number in range(12):
            draw_group(grids, 0, number, 12)
