"""Weights named by an id of Hugging Face: found in its cache, fetched only when asked."""

import json
import shutil
from pathlib import Path

import folders
import huggingface_hub.constants
import pytest
from folders import PRESET
from transformers import CLIPTokenizer

import sample
import train
from vcloze_jax import evaluate
from vcloze_jax.config import UserError
from vcloze_jax.inputs import cli
from vcloze_jax.storage import places, weights
from vcloze_jax.storage.textreader import load_tokenizer

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
    assert places.find_weights(f"{ID}/") == there
    assert places.named_model(ID, None)[0] == there
    assert sample.parse(["--grid", "a.json", "--weights", ID]).weights == there
    assert train.parse(["--weights", ID]).weights == there
    assert weights.checked_preset(there) == PRESET


@pytest.mark.parametrize(
    "name", [f"https://huggingface.co/{ID}", f"hf://{ID}", "file:///weights", f"{ID}@main"]
)
def test_addresses_and_revisions_are_refused(cache, name):
    """What is neither a folder nor an id says what to give instead, also once it is a Path."""
    for spelled in (name, Path(name)):
        with pytest.raises(UserError, match="is not read; give a folder, or the id OWNER/NAME"):
            places.find_weights(spelled)


def test_a_file_of_a_folder_is_not_called_broken(saved):
    """A JSON file given for its folder is told so, not that it is a broken file of tensors."""
    with pytest.raises(UserError, match="a JSON file; give the folder that holds"):
        weights.checked_preset(saved / "model_index.json")


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
        found = places.find_weights(name)
        assert found == places.find_weights(found) and found.absolute() == Path(name).absolute()
    monkeypatch.chdir(cache)
    (cache / ID).mkdir(parents=True)
    assert str(places.find_weights(ID)) == ID


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_download_that_was_broken_off(repository, part):
    """What a snapshot lacks is named with the command that completes it; elsewhere it is not."""
    (link,) = (repository / "snapshots/new" / part).glob("*.safetensors")
    link.unlink()
    with pytest.raises(UserError, match=f"holds no .* hf download {ID}, or --weights"):
        weights.checked_preset(places.find_weights(ID))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    link.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"is not there; .* hf download {ID}, or --weights"):
        weights.checked_preset(places.find_weights(ID))
    shutil.rmtree(repository / "snapshots/new/tokenizer", ignore_errors=True)
    with pytest.raises(UserError, match=f"tokenizer: no .* hf download {ID}, or --weights"):
        load_tokenizer(CLIPTokenizer, places.find_weights(ID) / "tokenizer", 24)
    folder = Path(shutil.move(repository / "snapshots/new", repository.parent / "moved"))
    with pytest.raises(UserError, match="is not there$"):
        weights.checked_preset(folder)


ASKED = ["--weights", ID, "--download"]


def test_download(cache, monkeypatch):
    """--download fetches an id, also where an older or broken snapshot is here; what goes wrong
    there is one line with the licence."""
    args = sample.parse(["--grid", "a.json", *ASKED])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: f"{cache}/{name}")
    assert cli.fetch_weights(args) == cache / ID
    (cache / "models--black-forest-labs--FLUX.1-Fill-dev/snapshots/old").mkdir(parents=True)
    assert cli.fetch_weights(sample.parse(["--grid", "a.json", *ASKED])) == cache / ID

    def fail(name):
        raise OSError("403\n\nCannot access gated repo for url https://…")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="not downloaded .403 Cannot .*licence at .*hf auth login"):
        cli.fetch_weights(args)


@pytest.mark.parametrize(
    "main, argv, message",
    [
        (sample.main, "--grid bad.json", "bad.json: image.0..0.: .*a.png"),
        (sample.main, "--grid bad.json --plan", "bad.json: image.0..0.: .*a.png"),
        (sample.main, "--grid good.json --out /proc/none", "--out /proc/none: No such file"),
        (train.main, "--data bad.json", "bad.json: line 1: image.0..0.: .*a.png"),
        (train.main, "--steps 0", "--steps 0: must be at least 1"),
        (evaluate.main, "--subjects 0", "--subjects 0: 1 to 128 are held out"),
    ],
)
def test_nothing_is_fetched_for_a_mistake(cache, monkeypatch, main, argv, message):
    """Flags, specs, pictures and data are right before the network is asked for anything."""
    monkeypatch.chdir(cache)
    Path("bad.json").write_text('{"image": [["a.png", null]]}')
    Path("good.json").write_text('{"image": [[null]]}')
    with pytest.raises(UserError, match=message):
        main([*argv.split(), *ASKED])


def test_what_is_fetched_is_what_it_was_taken_for(cache, monkeypatch):
    """Specs were read for FLUX.1-Fill: weights that turn out to be mini's are not painted with."""
    copied = folders.copy(places.MINI_FOLDER, cache / "fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(copied))
    with pytest.raises(UserError, match="give the same command again, without --download"):
        cli.fetch_weights(sample.parse(["--grid", "a.json", *ASKED]))
