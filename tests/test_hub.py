"""Weights named by an id of Hugging Face: found in its cache, fetched only when asked."""

import folders
import huggingface_hub
import pytest
from folders import PRESET

import sample
import train
from vcloze_jax.config import UserError
from vcloze_jax.storage import places, weights

ID = "black-forest-labs/FLUX.1-Fill-dev"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""

    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path


@pytest.fixture
def repository(cache, saved):
    """The cache's folder of ID: two snapshots of links to blobs, main's and an older one."""
    home = cache / "models--black-forest-labs--FLUX.1-Fill-dev"
    folders.copy(saved, home / "blobs")
    for file in (home / "blobs").rglob("*.*"):
        if file.is_file():
            link = home / "snapshots/new" / file.relative_to(home / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    (home / "snapshots/old").mkdir()
    (home / "refs").mkdir()
    (home / "refs/main").write_text("new\n")
    return home


def test_an_id_is_its_snapshot(repository):
    """An id, and the cache's folder of it, is the snapshot of its main branch; every door takes it,
    and it loads."""
    there = repository / "snapshots/new"
    assert places.find_weights(ID) == places.find_weights(repository) == there
    assert places.find_weights(there) == there
    assert places.named_model(ID, None)[0] == there
    assert sample.parse(["--grid", "a.json", "--weights", ID]).weights == there
    assert train.parse(["--weights", ID]).weights == there
    assert weights.check(there) == PRESET


def test_snapshots_without_a_main_branch(repository):
    """The only snapshot is taken; of several one must be named."""
    (repository / "refs/main").unlink()
    with pytest.raises(UserError, match="FLUX.1-Fill-dev: holds 2 snapshots; give the folder"):
        places.find_weights(ID)
    (repository / "snapshots/old").rmdir()
    assert places.find_weights(ID) == repository / "snapshots/new"


def test_what_is_not_there_says_how_to_fetch_it(cache, monkeypatch):
    """One line with the command and the licence; a folder of that name comes first, and what cannot
    be an id is a folder that is not there."""
    with pytest.raises(UserError, match=f"no such folder.*licence.*: hf download {ID}$") as error:
        places.find_weights(ID)
    assert "\n" not in str(error.value)
    for name in (cache / "nowhere", "nowhere", "./runs/fox", "../fox", "a/b/c"):
        assert str(places.find_weights(name)) == str(name).removeprefix("./")
    monkeypatch.chdir(cache)
    (cache / ID).mkdir(parents=True)
    assert str(places.find_weights(ID)) == ID


def test_download(cache, monkeypatch):
    """--download fetches an id; what goes wrong there is one line with the licence."""
    argv = ["--grid", "a.json", "--weights", ID, "--download"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: f"{cache}/{name}")
    assert sample.parse(argv).weights == cache / ID

    def fail(name):
        raise OSError("403\n\nCannot access gated repo for url https://…")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="not downloaded .403 Cannot .*licence at .*hf auth login"):
        sample.parse(argv)
