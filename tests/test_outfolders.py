"""Laws of folders that commands write into: whose they are, what in them is an input, and that a
file is there whole or not at all."""

import json
from dataclasses import replace

import numpy as np
import pytest
from clifolder import make_folder
from picturefiles import pixels, quadrants
from PIL import Image

from vcloze_jax.config import MINI, UserError
from vcloze_jax.inputs import pictures as images
from vcloze_jax.inputs.pictures import save_png, save_text
from vcloze_jax.inputs.runfolder import RunFolder
from vcloze_jax.inputs.specfiles import check_outputs, read_specs


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def test_what_a_system_leaves_in_a_folder(folder):
    """A run may begin where macOS has left a hidden file, and a file server a hidden folder."""
    (folder / "none/.DS_Store").write_bytes(b"Bud1")
    (folder / "none/.snapshot").mkdir()
    (folder / "none/.snapshot/file").write_text("text")
    RunFolder(folder / "none").compare(MINI.recipe)


def test_a_run_that_was_stopped_while_its_cache_was_filled(folder):
    """It has nothing of its own yet, and begins; anything else in its folder is foreign."""
    recipe = replace(MINI.recipe, cache=f"{folder}/run/cache")
    (folder / "run/cache").mkdir(parents=True)
    (folder / "run/cache/rows").write_text("text")
    RunFolder(folder / "run").compare(recipe)
    with pytest.raises(UserError, match="not a run of train.py, and not empty"):
        RunFolder(folder / "run").compare(MINI.recipe)


def test_a_link_hides_no_input(folder):
    """A picture that a spec reads is not painted over by another name of its folder."""
    (folder / "pics").mkdir()
    Image.open(folder / "a.png").save(folder / "pics/a.png")
    (folder / "link").symlink_to(folder / "pics")
    for name in ("pics", "link"):
        (folder / "a.json").write_text(json.dumps({"image": [[f"{name}/a.png", None]]}))
        for out in ("pics", "link"):
            with pytest.raises(UserError, match="a.png is an input; choose another"):
                check_outputs(folder / out, read_specs([folder / "a.json"], MINI))


def test_save_round_trip_leaves_nothing_else(tmp_path):
    """Law: what is saved is read back exactly, replaces the old file, and no temporary stays."""
    array = np.asarray(quadrants())
    for content in (np.zeros_like(array), array):
        save_png(tmp_path / "a.png", content)
    save_text(tmp_path / "a.json", "{}")
    assert np.array_equal(pixels(tmp_path / "a.png"), array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    """Law: a save that dies midway leaves the old file whole and no temporary behind."""
    save_text(tmp_path / "a.json", "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "replace", refuse)
    with pytest.raises(UserError, match="No space left"):
        save_text(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    monkeypatch.setattr(images.Path, "unlink", refuse)  # where clean-up fails, too, it says nothing
    with pytest.raises(UserError, match="No space left"):
        save_text(tmp_path / "a.json", "new")


def test_proof_of_writing_leaves_nothing(tmp_path, monkeypatch):
    """Law: that a file can be written is proved by writing one; nothing of it stays, nor a folder
    that was made for it, and what was there stays."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.png").write_bytes(b"old")
    for folder in ("there", "a/b/c"):
        images.check_writable(tmp_path / folder, "a.png")
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "a.png"]

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    for folder, name, message in (
        ("there/a.png", "x", "--out .*a.png: File exists; choose another folder"),
        ("there", "n" * 250, "--out .*there: File name too long; shorten the name"),
        ("new", "x", "--out .*new: Read-only file system.*; choose another folder"),
    ):
        if folder == "new":
            monkeypatch.setattr(images.Path, "write_bytes", refuse)
        with pytest.raises(UserError, match=message):
            images.check_writable(tmp_path / folder, name)
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "a.png"]
