"""Laws of the doors: what is meant well is read, and what cannot be is refused with what would do.

Beside the files of pictures, specs, adapters and weights, each of which has tests of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lorafiles
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import FLUX_FILL, MINI, UserError
from vcloze_jax.data.sources import open_source
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.storage import adapters, places
from vcloze_jax.storage.preset import load_preset

ROOT = Path(__file__).parents[1]
SPEC = {"image": [["a.png", "a.png"], ["a.png", None]]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds a picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("a.png")
    return tmp_path


def spec(name, content):
    Path(name).write_text(json.dumps(content))
    return [name]


# --- what is no file ---

ADDRESS = "download it first, and give its path"
ELSEWHERE = {
    "https://a.org/mine.jsonl": ADDRESS,
    "s3://bucket/mine": ADDRESS,
    "-": "what another program says is not read; save it",
    "/dev/stdin": "what another program says; save it",
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("flag", ["--grid", "--data", "--lora", "a cell"])
def test_what_is_no_file(folder, flag, name):
    """An address and another program's output are told as such, whatever they stand for."""
    if (flag, name) == ("--lora", "/dev/stdin"):
        pytest.skip("it is there, and no adapter")
    act = {
        "--grid": lambda: read_specs([Path(name)], MINI),
        "--data": lambda: open_source(replace(MINI.recipe, data=name)),
        "--lora": lambda: adapters.check(Path(name), MINI.flux),
        "a cell": lambda: read_specs(spec("fox.json", {"image": [[name, None]]}), MINI),
    }[flag]
    with pytest.raises(UserError, match=re.escape(ELSEWHERE[name])):
        act()


def test_data_of_a_hub(folder):
    """The id of a data set is told with what fetches it."""
    with pytest.raises(UserError, match="hf download fox/pairs --repo-type dataset --local-dir p"):
        open_source(replace(MINI.recipe, data="fox/pairs"))


def test_a_side_of_a_folder_of_pairs(folder):
    """One of the two folders of pairs is told with the one that holds both."""
    for side in ("in", "out"):
        Path(f"pairs/{side}").mkdir(parents=True)
        shutil.copy("a.png", f"pairs/{side}/a.png")
    with pytest.raises(
        UserError, match="pairs/in: no pair in it.*; give the folder above it, pairs"
    ):
        open_source(replace(MINI.recipe, data="pairs/in"))


# --- specs ---


@pytest.mark.parametrize("cell", [{"image": "a.png"}, {"image": "a.png", "mask": None}])
def test_no_mask_is_none(folder, cell):
    """A cell whose mask is null, or left away, is its picture; one without a picture is blank."""
    plain, masked, blank = (
        read_specs(spec("fox.json", {"image": [["a.png", one], ["a.png", last]]}), MINI)[0]
        for one, last in (("a.png", None), (cell, None), (cell, dict.fromkeys(cell)))
    )
    for other in (masked, blank):
        assert other.resolved == plain.resolved
        assert (other.grid.rows[0].pixels == plain.grid.rows[0].pixels).all()
        assert other.grid.targets == plain.grid.targets


class OnGPU:
    """As torch's tensor there."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")


def test_pictures_of_a_program(folder):
    """What a program gives is a picture, one axis of a channel more or less, or a UserError that
    names the cell."""
    red = Image.open("a.png")
    grey = np.full((64, 64, 1), 90, np.uint8)
    (spec_,) = read_specs([{"image": [[grey, red], [red, None]]}], MINI)
    assert (spec_.grid.rows[0].pixels[:, :64] == 90).all()
    for cell, words in ((Image.new("RGB", (0, 9)), "has no pixels"), (OnGPU(), "Tensor.cpu")):
        with pytest.raises(UserError, match=rf"image\[0\]\[0\]: .*{words}"):
            read_specs([{"image": [[cell, red], [red, None]]}], MINI)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key, more", [("data", {}), ("grids", {"version": 1})])
def test_a_list_within_an_object(folder, key, more, indent):
    """Specs, or grids to learn from, that a program has wrapped are told with the key, and that the
    list alone would do."""
    Path("mine.json").write_text(json.dumps(more | {key: [SPEC]}, indent=indent))
    for act in (
        lambda: read_specs(["mine.json"], MINI),
        lambda: open_source(replace(MINI.recipe, data="mine.json")),
    ):
        with pytest.raises(UserError, match=f"mine.json: '{key}': a list of objects within an"):
            act()
    with pytest.raises(UserError, match="'spec': holds the spec; give what stands under it"):
        read_specs(spec("mine.json", {"spec": SPEC}), MINI)


# --- weights and adapters ---


def test_mini_saved_again_is_mini(tmp_path):
    """diffusers' save_pretrained leaves vcloze.json behind: the transformer's sizes tell it."""
    config = json.loads((places.MINI_FOLDER / "transformer/config.json").read_text())
    file = tmp_path / "transformer/config.json"
    file.parent.mkdir()
    for entries, preset in (
        (config | {"_diffusers_version": "0.42.1"}, MINI),
        (config | {"num_layers": 3}, FLUX_FILL),
        ([], FLUX_FILL),
    ):
        file.write_text(json.dumps(entries))
        assert places.named_preset(tmp_path) is preset


@pytest.mark.parametrize("prefix", ["unet.", "dit.", "pipe.dit.", "diffusion_model.model."])
def test_adapters_of_other_holders(tmp_path, prefix):
    """Whatever a trainer calls what holds the transformer, its adapter is the same; a name that is
    not known is told with the one that would do."""
    file = lorafiles.written(tmp_path, lorafiles.adapter())
    wanted = adapters.load(file, lorafiles.PLAIN)
    bare = {key.removeprefix("transformer."): x for key, x in load_file(file).items()}
    save_file({prefix + key: x for key, x in bare.items()}, file)
    lorafiles.same_trees(adapters.load(file, lorafiles.PLAIN), wanted)
    save_file({f"odd.{prefix}{key}": x for key, x in bare.items()}, file)
    words = f"calls the transformer odd.{prefix[:-1]}; rename its keys to begin with transformer."
    with pytest.raises(UserError, match=words):
        adapters.check(file, lorafiles.PLAIN)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "lora.safetensors is a pipe; save what comes out of it"),
        (b"output/lora".ljust(257, b"\0") + b"ustar" + bytes(250), "is an archive: unpack it"),
        (b"\x1f\x8b\x08" + bytes(99), "is an archive: unpack it"),
        (b'{"r": 16}', "is a JSON file"),
    ],
)
def test_what_is_no_adapter_says_what_it_is(tmp_path, content, words):
    """A pipe is not waited for, and Replicate's archive is no file to fetch again."""
    file = tmp_path / "lora.safetensors"
    os.mkfifo(file) if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        adapters.check(file, lorafiles.PLAIN)


def test_weights_that_are_elsewhere(folder):
    """The folder of one model of a pipeline, and a hub's page, are told with what would do."""
    shutil.copytree(places.MINI_FOLDER / "transformer", folder / "mini/transformer")
    (folder / "mini/vae").mkdir()
    (folder / "mini/vae/diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(
        UserError, match="holds no autoencoder.*; give the folder above it, .*mini$"
    ):
        load_preset(folder / "mini/transformer")
    with pytest.raises(UserError, match="an address is not read; give .* the id OWNER/NAME alone"):
        places.find_weights("huggingface.co/fox/FLUX")


# --- the environment ---


@pytest.mark.parametrize("name", ["JAX_NO_EXECUTION", "JAX_REMAT3", "TQDM_MININTERVAL"])
def test_variables_that_make_libraries_fail(monkeypatch, capfd, name):
    """A variable that makes a library fail at work is told in one line, whatever it does; one that
    only says where to compute, or is off, hides no traceback."""

    def main(argv):
        raise NotImplementedError("for vmap support\nimplement `batch`")

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for value, code in (("0", 1), ("1", 2)):
        monkeypatch.setenv(name, value)
        assert cli.exit_code(main) == code
        error = capfd.readouterr().err
        assert ("Traceback" in error) == (code == 1)
    reason = r"unset it \(NotImplementedError: for vmap support implement `batch`\)"
    assert re.fullmatch(f"error: {name}=1: a variable of the .*; {reason}\n", error)


def test_a_variable_that_changes_jax_in_a_command(folder):
    """So it is where JAX itself fails."""
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--grid", *spec("fox.json", SPEC), "--check"],
        env=os.environ | {"JAX_NO_TRACING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_NO_TRACING=1: a variable")
    assert len(done.stderr.splitlines()) == 1
