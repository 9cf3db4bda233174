"""Weights folders of every layout: told by their content, filled with the same bits."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import folders
import jax
import numpy as np
import pytest
from flax import nnx
from folders import FLUX, PRESET, SINGLES, arrays, module, same, tensors
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import UserError
from vcloze_jax.devices import make_mesh
from vcloze_jax.pipeline import Pipeline
from vcloze_jax.ports import engine
from vcloze_jax.ports.locate import locate
from vcloze_jax.ports.tables.folder import PARTS
from vcloze_jax.sharding import shardings
from vcloze_jax.storage import weights


@pytest.fixture(scope="module")
def loaded(saved):
    """What every layout of the tiny models must fill our trees with."""
    return tensors(saved, PRESET)


def test_save_and_load_is_the_identity(saved, loaded):
    """A saved folder gives back every array and every size; bfloat16 rounds once."""
    assert weights.checked_preset(saved) == PRESET
    mine = {
        f"{field}/{path}": array
        for field in weights.MODELS
        for path, array in arrays(field, getattr(PRESET, field)).items()
    }
    same(loaded, mine)
    rounded = tensors(saved, PRESET, "bfloat16")
    same(rounded, {path: array.astype("bfloat16") for path, array in mine.items()})


def test_bfls_files_fill_the_same_bits(bfl, loaded):
    """Single files in BFL's naming are the same preset, sizes from their shapes, and the same bits
    in every leaf, as the folder in diffusers' layout."""
    assert weights.checked_preset(bfl) == replace(PRESET, flow=weights.checked_preset(bfl).flow)
    same(tensors(bfl, PRESET), loaded)


def test_names_mean_nothing(bfl, loaded, tmp_path):
    """A single file is told by its keys, whatever its name and whether it lies beside the folders
    or in one; a file of another kind beside it is left alone."""
    folder = folders.copy(bfl, tmp_path)
    (folder / SINGLES["flux"]).rename(folder / "ae.sft")
    (folder / "transformer").mkdir()
    (folder / SINGLES["vae"]).rename(folder / "transformer" / "flux1-dev.safetensors")
    shutil.move(folder / "transformer" / "flux1-dev.safetensors", folder / "vae" / "x.safetensors")
    adapter = {"double_blocks.0.img_attn.qkv.lora_A.weight": np.zeros(1)}
    save_file(adapter, folder / "flux1-fill-dev.safetensors")
    weights.checked_preset(folder)
    same(tensors(folder, PRESET), loaded)


def test_shards_and_one_file_fill_the_same_bits(saved, loaded, tmp_path):
    """Shards with an index, as diffusers and transformers write large models, read as one file."""
    folder = folders.copy(saved, tmp_path)
    for part in PARTS.values():
        file = folder / part.folder / f"{part.stem}.safetensors"
        engine.write_shards(
            folder / part.folder, part.stem, load_file(file).items(), "float32", 5_000
        )
        assert len(list(file.parent.glob("*-of-*.safetensors"))) > 1
    weights.checked_preset(folder)
    same(tensors(folder, PRESET), loaded)


# How diffusers and transformers, now and before, spell a shard of a variant and its index.
SPELLINGS = {
    "now": ("{stem}.fp16-{n}-of-{all}.safetensors", "{stem}.safetensors.index.fp16.json"),
    "before": ("{stem}-{n}-of-{all}.fp16.safetensors", "{stem}.safetensors.index.fp16.json"),
    "inside": ("{stem}-{n}-of-{all}.fp16.safetensors", "{stem}.fp16.safetensors.index.json"),
    "without index": ("{stem}-{n}-of-{all}.safetensors", None),
    "one file": ("{stem}.fp16.safetensors", None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_variants_fill_the_same_bits(saved, loaded, tmp_path, spelling):
    """A variant, sharded or one file, is read under each of its names; beside weights without a
    variant it is left alone."""
    name, index = SPELLINGS[spelling]
    folder = folders.copy(saved, tmp_path)
    for part in PARTS.values():
        inside, size = folder / part.folder, 10**9 if spelling == "one file" else 5_000
        there = load_file(inside / f"{part.stem}.safetensors")
        engine.write_shards(inside, part.stem, there.items(), "float32", size)
        shards, renamed = sorted(inside.glob("*.safetensors")), {}
        for n, file in enumerate(shards, 1):
            new = name.format(stem=part.stem, n=f"{n:05}", all=f"{len(shards):05}")
            renamed[file.name] = file.rename(inside / new).name
        for file in inside.glob("*.index.json"):
            where = json.loads(file.read_text())["weight_map"]
            where = {key: renamed[old] for key, old in where.items()}
            file.unlink()
            if index:
                new = inside / index.format(stem=part.stem)
                new.write_text(json.dumps({"weight_map": where}))
    weights.checked_preset(folder)
    same(tensors(folder, PRESET), loaded)
    if "fp16" in name:
        save_file(there, folder / "text_encoder/model.safetensors")
        source, _ = locate(folder, PARTS["clip"])
        assert {file.name for file, _ in source.home.values()} == {"model.safetensors"}


def test_single_text_encoders(saved, loaded, tmp_path):
    """T5 and CLIP as single files beside their tokenizers, as ComfyUI has them, told by content and
    with sizes by shapes: with what FLUX does not read of CLIP, and with T5's embedding under the
    name that it is tied to."""
    folder = folders.copy(saved, tmp_path)
    clip = load_file(folder / "text_encoder/model.safetensors")
    clip |= {"text_projection.weight": np.ones((6, 6)), "logit_scale": np.ones(())}
    clip |= {"vision_model.embeddings.patch_embedding.weight": np.ones((2, 3, 4, 4))}
    save_file(clip, folder / "clip_l.safetensors")
    t5 = load_file(folder / "text_encoder_2/model.safetensors")
    t5["encoder.embed_tokens.weight"] = t5.pop("shared.weight")
    save_file(t5, folder / "t5xxl_fp16.safetensors")
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(folder / name)
    assert weights.checked_preset(folder) == PRESET
    same(tensors(folder, PRESET), loaded)


def test_halves_of_whole_models(saved, loaded, tmp_path):
    """CLIP with the half that reads pictures and T5 with the half that writes, as their makers save
    them, are the text encoders that they hold: sizes nested in a config, weights beside others."""
    folder = folders.copy(saved, tmp_path)
    file = folder / "text_encoder/config.json"
    both = {"model_type": "clip", "text_config": json.loads(file.read_text()), "vision_config": {}}
    file.write_text(json.dumps(both))
    file = folder / "text_encoder_2/model.safetensors"
    t5 = load_file(file)
    t5 |= {key.replace("encoder.", "decoder."): x for key, x in t5.items() if "block" in key}
    save_file(t5 | {"lm_head.weight": t5["shared.weight"]}, file)
    assert weights.checked_preset(folder) == PRESET
    same(tensors(folder, PRESET), loaded)


def test_what_lies_beside(bfl, loaded, tmp_path):
    """What macOS leaves beside each file, a download that broke off and a dangling link are no
    second model, and are not named while the models are there."""
    folder = folders.copy(bfl, tmp_path)
    for file in [*folder.rglob("*.safetensors")]:
        shutil.copy(file, file.with_name(f"._{file.name}"))
    (folder / "old.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    whole = (folder / SINGLES["flux"]).read_bytes()
    (folder / "flux1-dev.safetensors").write_bytes(whole[:-1])
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    weights.checked_preset(folder)
    same(tensors(folder, PRESET), loaded)


SCALES = [None, (".scale_weight", ()), (".weight_scale", (1,))]


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits(saved, tmp_path, kind, scale):
    """Weights in float8, with no scale or with one per tensor, are their numbers, times the scale,
    in float32; what else is said of products in 8 bits does not matter."""
    folders.copy(saved, tmp_path / "8")
    folders.copy(saved, tmp_path / "16")
    for part in PARTS.values():
        file = f"{part.folder}/{part.stem}.safetensors"
        there = load_file(saved / file)
        eight, wide = dict(there), dict(there)
        for key, x in there.items():
            if x.ndim == 2 and key.endswith("weight"):
                eight[key], factor = x.astype(kind), np.float32(1)
                if scale:
                    factor = np.float32(x.std() + 0.1)
                    eight[key] = (x / factor).astype(kind)
                    eight[key.removesuffix(".weight") + scale[0]] = np.full(scale[1], factor)
                wide[key] = eight[key].astype(np.float32) * factor
        eight |= {"scaled_fp8": np.zeros(2, kind), "a.scale_input": np.ones(1)}
        save_file(eight, tmp_path / "8" / file)
        save_file(wide, tmp_path / "16" / file)
    weights.checked_preset(tmp_path / "8")
    same(tensors(tmp_path / "8", PRESET), tensors(tmp_path / "16", PRESET))


def test_shards_of_the_mesh(bfl, loaded):
    """On a mesh every leaf lies as the table of shardings says and holds the same bits; a shard is
    read once for all devices that hold it, and never more than one shard at a time."""
    mesh, asked, fetch = make_mesh(dict(data=2, fsdp=2, tensor=2)), [], engine.fetch

    def watched(leaf, source, dtype, cut):
        asked.append((leaf.path, tuple(str(span) for span in cut)))
        return fetch(leaf, source, dtype, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "fetch", watched)
        there = tensors(bfl, PRESET, place=partial(shardings, mesh=mesh))
    same(there, loaded)
    for (path, array), leaf in zip(there.items(), loaded.values(), strict=True):
        assert array.sharding == shardings({path: leaf}, mesh)[path], path
    counts = {path: sum(1 for name, _ in asked if f"flux/{name}" == path) for path in there}
    assert counts["flux/single/linear1/kernel"] == 4 and counts["flux/img_in/bias"] == 1


def test_summary(saved, bfl):
    """One line says what a folder is: layout, base, size, input channels."""
    line = weights.summary(saved, weights.checked_preset(saved))
    assert re.fullmatch(r".*: diffusers' layout, mini, 0\.\d M parameters, 384 input chan.*", line)
    fill = replace(PRESET, name="flux-fill")
    assert "BFL's single files, FLUX.1-Fill, " in weights.summary(bfl, fill)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clip_with_and_without_prefix(saved, tmp_path, prefix):
    """CLIP files of transformers 4 (with a prefix, and position ids) and 5 (without) both load."""
    folder = folders.copy(saved, tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    good = {key.removeprefix("text_model."): x for key, x in load_file(file).items()}
    good["embeddings.position_ids"] = np.arange(77)[None]
    save_file({prefix + key: x for key, x in good.items()}, file)
    weights.checked_preset(folder)


def test_flux_dev(saved, tmp_path):
    """FLUX.1-dev, of 64 input channels, loads from either layout and says what it is; it cannot
    paint grids, and says so."""
    dev = replace(PRESET, name="flux-fill", flux=replace(FLUX, in_channels=64))
    folder = folders.copy(saved, tmp_path / "diffusers")
    weights.save_pipeline(folder, dev, {"flux": module("flux", dev.flux)}, "float32")
    folders.save_bfl(folder, tmp_path / "bfl", dev)
    for path, layout in ((folder, "diffusers' layout"), (tmp_path / "bfl", "BFL's single files")):
        assert weights.checked_preset(path).flux.in_channels == 64
        assert f"{layout}, FLUX.1-dev, " in weights.summary(path, weights.checked_preset(path))
        with pytest.raises(UserError, match="64 input channels; grids need a model of 384"):
            Pipeline.load(path)


def test_no_weights_folder(saved, tmp_path):
    """What is no folder of weights at all says what it is."""
    file = saved / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="an autoencoder in diffusers' naming; give the folder"):
        weights.checked_preset(file)
    with pytest.raises(UserError, match="holds no transformer: .* and no single file"):
        weights.checked_preset(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        weights.checked_preset(tmp_path / "nowhere")
    for name in ("big", [], 3):
        folder = folders.copy(saved, tmp_path / "folder")
        weights.write_json(folder / "vcloze.json", {"preset": name})
        with pytest.raises(UserError, match="with a name of mini, flux-fill"):
            weights.checked_preset(folder)


def test_default_device(saved):
    """Without a sharding a leaf lies on the first device."""
    model = weights.load(weights.MODULES["vae"], PRESET.vae, saved)
    assert {x.device for x in jax.tree.leaves(nnx.state(model))} == {jax.devices()[0]}
