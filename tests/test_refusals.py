"""What are no tensors of ours are refused in one line: the table of all that was tried."""

import re

import folders
import ml_dtypes
import numpy as np
import pytest
from folders import FLUX, SINGLES, arrays, change, refusal, says
from safetensors.numpy import load_file, save_file

from vcloze_jax.model.mmdit import Flux
from vcloze_jax.ports import engine
from vcloze_jax.ports.tables import mmdit
from vcloze_jax.storage import weights

FILE = "transformer/diffusion_pytorch_model.safetensors"
X, OUT, KEY = "x_embedder.weight", "proj_out.weight", "transformer_blocks.1.attn.to_k.weight"
QKV = "double_blocks.1.img_attn.qkv.weight"


def rename(old, new):
    return lambda d: {new if key == old else key: x for key, x in d.items()}


def alter(key, f):
    return lambda d: d | {key: np.ascontiguousarray(f(d[key]))}


def drop(key):
    return lambda d: {k: x for k, x in d.items() if k != key}


def put(*keys, shape=(2, 2), dtype=np.float32):
    """Other tensors in the place of all."""
    return lambda d: {key: np.ones(shape, dtype) for key in keys}


def blocks(d):
    """In float8 with a scale for each row, which is not read."""
    scale = np.ones((24, 1), np.float32)
    return d | {KEY: d[KEY].astype(ml_dtypes.float8_e4m3fn), f"{KEY}_scale": scale}


def nf4(d):
    x = d.pop(KEY)
    d |= {KEY: np.zeros((x.size // 2, 1), np.uint8), f"{KEY}.absmax": np.zeros(9, np.float32)}
    return d | {f"{KEY}.quant_state.bitsandbytes__nf4": np.zeros(5, np.uint8)}


def adapter(d):
    return {f"transformer.{KEY[:-7]}.lora_{x}.weight": np.ones((2, 24), np.float32) for x in "AB"}


# What a transformer's file holds in the place of the right tensors -> what the error says.
TENSORS = {
    "missing": (drop(KEY), f"{KEY} [24, 24] is missing"),
    "missing layer": (drop("single_transformer_blocks.2.proj_mlp.bias"), "2.proj_mlp.bias [96]"),
    "extra": (lambda d: d | {"more.weight": d[X]}, "more.weight [24, 384] is unknown"),
    "extra layer": (
        lambda d: d | {KEY.replace("1", "2"): d[KEY]},
        f"{KEY.replace('1', '2')} [24, 24] is unknown",
    ),
    "renamed": (rename(X, "x_embed.weight"), f"{X} [24, 384] is missing; x_embed.weight [24, 384]"),
    "prefixed": (
        lambda d: {f"odd.{key}": x for key, x in d.items()},
        "transformer_blocks.0.attn.norm_k.weight [12] is missing; .* more",
    ),
    "transposed": (alter(X, np.transpose), f"{X} is [384, 24], expected [24, 384]"),
    "mis-shaped": (alter(KEY, lambda x: x[:-1]), f"{KEY} is [23, 24], expected [24, 24]"),
    "flattened": (alter(OUT, np.ravel), f"{OUT} is [1536], expected [64, 24]"),
    "a dimension of 0": (alter(KEY, lambda x: x[:0]), f"{KEY} is [0, 24], expected [24, 24]"),
    "another base": (alter(X, lambda x: x[:, :64]), f"{X} is [24, 64], .*FLUX.1-dev.*FLUX.1-Fill"),
    "integers": (alter(X, lambda x: x.astype(np.int32)), f"{X} is of type I32, not F32 or F16 or"),
    "doubles": (alter(X, lambda x: x.astype(np.float64)), f"{X} is of type F64"),
    "fp8 in blocks": (
        blocks,
        f"seems to be quantised to 8 bits: {KEY}_scale [24, 1] is unknown; take the file in bfloat",
    ),
    "int8": (
        alter(KEY, lambda x: x.astype(np.int8)),
        f"to 8 bits: {KEY} is of type I8, .*; take the file in bfloat16",
    ),
    "nf4": (nf4, f"seems to be quantised by bitsandbytes .*: {KEY} is [288, 1], expected [24, 24]"),
    "empty": (lambda d: {}, "is missing; .* more"),
    "Stable Diffusion 3": (
        put("pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.weight"),
        "seems to be of Stable Diffusion 3: .*pos_embed.proj.weight|.* more",
    ),
    "Stable Diffusion XL": (put("down_blocks.0.resnets.0.conv1.weight"), "seems to be a U-Net"),
    "FLUX.2": (
        put("double_stream_modulation_img.lin.weight", "double_blocks.0.img_mlp.0.weight"),
        "seems to be of FLUX.2: ",
    ),
    "Chroma": (put("distilled_guidance_layer.in_proj.weight", QKV), "seems to be of Chroma: "),
    "Stable Diffusion 1 of ComfyUI": (
        put("model.diffusion_model.input_blocks.0.0.weight"),
        "seems to be a U-Net",
    ),
    "an adapter": (adapter, "seems to be an adapter, for --lora: .*more"),
    "T5": (
        put("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        "seems to be a T5 encoder: .* is missing",
    ),
    "CLIP": (put("text_model.encoder.layers.0.self_attn.q_proj.weight"), "a CLIP text encoder: "),
    "autoencoder": (put("encoder.down.0.block.0.conv1.weight"), "an autoencoder in BFL's naming: "),
}


def test_a_fault_is_told_once(saved, tmp_path):
    """Of tensors that are all of one wrong type the first is named, and how many there are."""
    folder = folders.copy(saved, tmp_path)
    change(folder / FILE, lambda d: {key: x.astype(np.float64) for key, x in d.items()})
    count = len(load_file(folder / FILE))
    assert says(refusal(folder), f"is of type F64, not .*, and {count - 1} others likewise")


# What wrappers leave in the keys of a transformer.
WRAPPED = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "compiled block by block": lambda key: re.sub(r"(blocks\.\d+)", r"\1._orig_mod", key),
    "DDP": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: re.sub(r"(blocks\.\d+)", r"\1._fsdp_wrapped_module", key),
    "PEFT, fused": lambda key: re.sub(r"(to_[qkv])", r"\1.base_layer", f"base_model.model.{key}"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_keys(saved, tmp_path, kind):
    """What wraps a model is no part of its keys, in one file and in shards with an index."""
    wrap, folder = WRAPPED[kind], folders.copy(saved, tmp_path)
    before = folders.leaves(weights.load(Flux, FLUX, folder))
    tensors = {wrap(key): x for key, x in load_file(folder / FILE).items()}
    assert len(set(tensors) - set(load_file(folder / FILE)))
    for size in (10**9, 20_000):
        stem = "diffusion_pytorch_model"
        engine.write_shards(folder / "transformer", stem, tensors.items(), None, size)
        after = folders.leaves(weights.load(Flux, FLUX, folder))
        for path, array in before.items():
            np.testing.assert_array_equal(after[path], array, err_msg=path)


def test_wrapped_keys_that_clash(saved, tmp_path):
    """Two keys that are one, and base layers beside an adapter that may be in them or not, are
    errors."""
    folder = folders.copy(saved, tmp_path)
    good = load_file(folder / FILE)
    save_file(good | {f"_orig_mod.{X}": good[X]}, folder / FILE)
    assert says(refusal(folder), f"{X} are both {X}; leave one|and _orig_mod.{X} are both {X}")
    halves = {f"x_embedder.lora_{half}.default.weight": good[X] for half in "AB"}
    save_file(good | halves | {"x_embedder.base_layer.weight": good.pop(X)}, folder / FILE)
    assert "may or may not be fused into them" in refusal(folder)


@pytest.mark.parametrize("kind", TENSORS)
def test_wrong_tensors(saved, tmp_path, kind):
    """A transformer that does not fit is one line that names up to ten keys, what they are and
    should be and what the file seems to be, and that before a tensor is read."""
    spoil, words = TENSORS[kind]
    folder = folders.copy(saved, tmp_path)
    change(folder / FILE, spoil)
    message = refusal(folder)
    assert message.startswith(f"{folder}/transformer: ") and says(message, words), message


def bfl(f):
    """Change the tensors of BFL's single file of the transformer."""
    return lambda folder: change(folder / SINGLES["flux"], f)


def bytes_of(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    file = folder / SINGLES["vae"]
    file.write_bytes(file.read_bytes()[:-100])


def another(folder):
    tensors = dict(engine.export_arrays(mmdit.BFL, arrays("flux", FLUX).items()))
    save_file(tensors, folder / "flux1-dev.safetensors")


def gguf(folder):
    (folder / SINGLES["flux"]).unlink()
    (folder / "flux1-fill-dev-Q4.gguf").write_bytes(b"GGUF" + bytes(60))


# What is done to a folder of BFL's single files -> what the error says.
FILES = {
    "missing": (bfl(drop(QKV)), f"{SINGLES['flux']}: {QKV} [72, 24] is missing"),
    "missing size": (bfl(drop("img_in.weight")), "img_in.weight is missing; the model's sizes"),
    "missing layer": (
        bfl(lambda d: {k: x for k, x in d.items() if "single_blocks.1." not in k}),
        "single_blocks.1.linear1.weight [168, 24] is missing",
    ),
    "gap": (
        bfl(lambda d: d | {"single_blocks.7.linear1.weight": d[QKV]}),
        "single_blocks.3.*is missing",
    ),
    "no heads": (
        bfl(alter("double_blocks.0.img_attn.norm.query_norm.scale", lambda x: x[:0])),
        "query_norm.scale is [0]; the model's sizes",
    ),
    "odd heads": (
        bfl(alter("double_blocks.0.img_attn.norm.query_norm.scale", lambda x: x[:7])),
        "query_norm.scale is [7], which does not divide the width 24",
    ),
    "split": (
        bfl(alter(QKV, lambda x: x[:24])),
        f"{QKV} is [24, 24], expected [72, 24]",
    ),
    "int8": (bfl(alter(QKV, lambda x: x.astype(np.int8))), "seems to be quantised to 8 bits: "),
    "cut": (cut, "ae.safetensors is not a whole safetensors file"),
    "nothing": (bytes_of(SINGLES["vae"], b""), "ae.safetensors is not a whole safetensors file"),
    "garbage": (bytes_of(SINGLES["vae"], b"\xff" * 99), "ae.safetensors is not a whole"),
    "pickle": (bytes_of(SINGLES["vae"], b"PK\x03\x04" + bytes(60)), "ae.safetensors is a pickle"),
    "git-lfs": (
        bytes_of(SINGLES["vae"], b"version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of git-lfs, not the file itself: run git lfs pull",
    ),
    "web page": (bytes_of(SINGLES["vae"], b"<!doctype html>"), "is a web page"),
    "gguf": (gguf, "holds no transformer: .*flux1-fill-dev-Q4.gguf is a GGUF file, of quantised"),
    "gone": (lambda folder: (folder / SINGLES["vae"]).unlink(), "holds no autoencoder: no vae/"),
    "two": (
        another,
        "more than one transformer: flux1-dev.safetensors; flux1-fill-dev.safetensors; leave one",
    ),
    "older autoencoder": (
        lambda folder: change(
            folder / SINGLES["vae"], lambda d: d | {"quant_conv.bias": np.ones(8, np.float32)}
        ),
        "seems to be an older autoencoder: quant_conv.bias [8] is unknown",
    ),
    "groups": (
        lambda folder: (folder / "vcloze.json").unlink() or (folder / "vae/config.json").unlink(),
        "channels (4, 8, 8, 12) are not divisible by 32 groups; the autoencoder's config.json",
    ),
    "levels": (
        lambda folder: (
            change(folder / SINGLES["vae"], drop("encoder.down.3.block.0.conv1.bias"))
            or (folder / "vae/config.json").unlink()
        ),
        "channels (4, 8, 8) must be 4",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_wrong_single_files(bfl, tmp_path, kind):
    """BFL's files that do not fit, or are no such files, are one line that says so."""
    spoil, words = FILES[kind]
    folder = folders.copy(bfl, tmp_path)
    spoil(folder)
    message = refusal(folder)
    assert says(message, words), message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_tensors(saved, tmp_path, value):
    """NaN and infinity are refused by name when tensors are read, and only then."""
    folder = folders.copy(saved, tmp_path)
    change(folder / FILE, lambda d: d | {KEY: np.full_like(d[KEY], value)})
    weights.checked_preset(folder)
    message = refusal(folder, lambda folder: weights.load(Flux, FLUX, folder))
    assert f"transformer: {KEY} holds NaN or infinity" in message
