"""Files as ComfyUI saves and reads them: models under a prefix, several in a file, 8 bits."""

import shutil

import folders
import numpy as np
import pytest
from folders import PRESET, SINGLES, refusal
from safetensors.numpy import load_file, save_file
from test_weights import same, tensors

from vcloze_jax.ports import __main__ as ports
from vcloze_jax.ports import engine
from vcloze_jax.ports.tables.folder import PARTS
from vcloze_jax.storage import weights

SECTIONS = {
    "flux": "model.diffusion_model.",
    "vae": "vae.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip": "text_encoders.clip_l.transformer.",
}


def under(prefix, tensors):
    return {f"{prefix}{key}": array for key, array in tensors.items()}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_a_prefix_before_every_key(bfl, tmp_path, prefix):
    """A transformer alone in its file is read whatever stands before all its keys."""
    folder = folders.copy(bfl, tmp_path)
    folders.change(folder / SINGLES["flux"], lambda there: under(prefix, there))
    same(tensors(folder, PRESET), tensors(bfl, PRESET))


def checkpoint(saved, bfl, folder, more=()):
    """All models in one file of `folder`, and beside it what no tensor tells: the configs."""
    unlike = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(saved, folder, ignore=unlike, dirs_exist_ok=True)
    for part in PARTS.values():
        shutil.copy(saved / part.folder / "config.json", folder / part.folder)
    whole = dict.fromkeys(more, np.ones(3, np.float32))
    for field, prefix in SECTIONS.items():
        part = PARTS[field]
        home = bfl / SINGLES.get(field, f"{part.folder}/{part.stem}.safetensors")
        whole |= under(prefix, load_file(home))
    whole["text_encoders.clip_l.logit_scale"] = np.float32([4.6])
    save_file(whole, folder / "flux1-fill-dev-whole.safetensors")


def test_a_whole_checkpoint(saved, bfl, tmp_path):
    """Several models in one file are each read from their part of it."""
    checkpoint(saved, bfl, tmp_path)
    same(tensors(tmp_path, PRESET), tensors(bfl, PRESET))


@pytest.mark.parametrize("key", ["ghost", "vae.ghost", "model.diffusion_model.ghost"])
def test_a_whole_checkpoint_is_read_whole(saved, bfl, tmp_path, key):
    """What is of no model in the file is refused, inside of their parts and outside."""
    checkpoint(saved, bfl, tmp_path, [key])
    assert "ghost [3] is unknown" in refusal(tmp_path)


def test_a_part_that_is_missing(bfl, tmp_path):
    """A file of one model under a prefix is not called what it is not."""
    folder = folders.copy(bfl, tmp_path)
    folders.change(folder / SINGLES["flux"], lambda there: under("model.diffusion_model.", there))
    (folder / SINGLES["vae"]).unlink()
    message = refusal(folder)
    assert "holds no autoencoder" in message
    assert "flux1-fill-dev.safetensors is a transformer in BFL's naming" in message


@pytest.mark.parametrize("field, place", [("flux", "diffusion_models"), ("t5", "clip [v2]")])
def test_a_file_in_a_folder_of_another_name(bfl, tmp_path, field, place):
    """In ComfyUI's own folder single files lie a folder deeper: the one that is missing is named,
    and does what is missing where the message has it moved to."""
    folder = folders.copy(bfl, tmp_path)
    inside = f"{PARTS[field].folder}/{PARTS[field].stem}.safetensors"
    home, there = folder / SINGLES.get(field, inside), folder / place / "model.safetensors"
    there.parent.mkdir()
    (there.parent / "another.safetensors").write_bytes(b"broken")
    home.rename(there)
    message = refusal(folder)
    assert f"holds no {PARTS[field].name}: " in message
    assert f"; {place}/model.safetensors is one: move or link it" in message
    (folder / there.name).symlink_to(there)
    same(tensors(folder, PRESET), tensors(bfl, PRESET))


def eight_bits(tensors, scale):
    """Matrices in float8, times a scale."""
    there = {}
    for key, x in tensors.items():
        there[key] = x
        if x.ndim == 2 and key.endswith("weight"):
            there[key] = (x / scale).astype("float8_e4m3fn")
            there[f"{key.removesuffix('.weight')}.scale_weight"] = np.float32([scale])
    return there


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_scaled_weights_are_rounded_once(bfl, tmp_path, dtype, capsys):
    """ports writes the products of 8 bits and their scales as float32 computes them, or rounded
    from there to --dtype, and counts both; loading reads the same."""
    folder, out = folders.copy(bfl, tmp_path / "eight"), tmp_path / "out"
    file, scale = folder / SINGLES["flux"], np.float32(0.0123)
    there = load_file(file)
    eight = eight_bits(there, scale)
    exact = {
        key: x.astype(np.float32) * (scale if x.dtype.itemsize == 1 else 1)
        for key, x in eight.items()
        if key in there
    }
    save_file(eight, file)
    flags = ["--dtype", dtype] if dtype else []
    assert ports.main([str(folder), "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    scaled = len(eight) - len(there)
    assert f"{scaled} tensors of 8 bits are times their scales, products in float32" in said
    assert ("no tensors were rounded" in said) == (dtype == "float32")

    save_file(exact, file)
    kind = dtype or "float32"
    wanted = {path: x.astype(kind).astype(np.float32) for path, x in read(folder, "flux").items()}
    there = read(out, "flux")
    assert all(x.dtype == kind for path, x in there.items() if path.endswith("/qkv/kernel"))
    for path, x in there.items():
        np.testing.assert_array_equal(x.astype(np.float32), wanted[path], err_msg=path)


def read(folder, field):
    """{path: array} of a model of a folder, in the types of the file."""
    module, config = weights.MODULES[field], getattr(PRESET, field)
    source, _, leaves = weights.match_files(module, config, folder)
    return {leaf.path: engine.fetch(leaf, source) for leaf in leaves}
