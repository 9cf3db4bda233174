"""The tables and their engine: every tensor has its row, and comes through it with every bit."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from folders import FLUX, PRESET, VARIANTS, arrays, key_list, shapes
from safetensors.numpy import load_file, save

from vcloze_jax.config import FLUX_FILL
from vcloze_jax.inputs.papers import FRAMES
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.ports import engine
from vcloze_jax.ports.adapters import check_adapter
from vcloze_jax.ports.diagnose import PortError
from vcloze_jax.ports.tables import Table, find_row, lay_out, mmdit, text, vae
from vcloze_jax.ports.tables.folder import PARTS
from vcloze_jax.storage import weights

NAMINGS = {
    f"{name}, {'diffusers' if n == 0 else 'bfl'}": (field, config, table)
    for name, (field, config) in VARIANTS.items()
    for n, table in enumerate(PARTS[field].tables)
}


@pytest.mark.parametrize("name", NAMINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_identical(tmp_path, name, dtype):
    """Ours, written in a foreign naming and read again, is the same to the last bit."""
    field, config, table = NAMINGS[name]
    mine = arrays(field, config, dtype)
    engine.write_shards(tmp_path, "model", engine.export_arrays(table, mine.items()), dtype)
    source = engine.SafetensorsFile(tmp_path)
    leaves = engine.plan_leaves(table, shapes(field, config), source)
    again = {leaf.path: engine.fetch(leaf, source) for leaf in leaves}
    assert again.keys() == mine.keys()
    for path, array in mine.items():
        assert again[path].dtype == array.dtype and again[path].tobytes() == array.tobytes(), path
    there = load_file(tmp_path / "model.safetensors")
    assert sum(x.size for x in there.values()) == sum(x.size for x in mine.values())


def test_the_librarys_layout(tmp_path):
    """What is written tensor by tensor, in any order, is what the library writes: types in its
    order, then names; beside a header whose order is always the same."""
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}{i}": rng.integers(0, 9, (3, i)).astype(dtype)
        for i in (10, 2, 0)
        for name, dtype in zip("pqrstuvwxy", [*engine.SPELLINGS], strict=False)
    }
    tensors |= {"scalar": np.array(3, np.float32), "ü": np.ones(5, np.int8)}
    theirs, layout = save(tensors), {key: (x.dtype, x.shape) for key, x in tensors.items()}
    shuffled = sorted(tensors.items(), reverse=True)
    engine.stream_tensors(tmp_path / "ours", layout, shuffled, {"b": "2", "a": "1"})
    ours = (tmp_path / "ours").read_bytes()
    headers = []
    for file in (theirs, ours):
        size = int.from_bytes(file[:8], "little")
        assert size % 8 == 0
        headers.append((json.loads(file[8 : 8 + size]), file[8 + size :]))
    (known, numbers), (written, same) = headers
    assert written.pop("__metadata__") == {"a": "1", "b": "2"}
    assert written == known and same == numbers


@pytest.mark.parametrize("name", NAMINGS)
def test_a_cut_is_a_part_of_the_whole(tmp_path, name, monkeypatch):
    """A cut of a leaf holds what a cut of the whole array holds, whatever pieces it crosses, also
    where a piece is copied in many blocks."""
    field, config, table = NAMINGS[name]
    monkeypatch.setattr(engine, "BLOCK", 3)
    mine = arrays(field, config)
    engine.write_shards(tmp_path, "model", engine.export_arrays(table, mine.items()), "float32")
    source, rng = engine.SafetensorsFile(tmp_path), np.random.default_rng(0)
    for leaf in engine.plan_leaves(table, shapes(field, config), source):
        for _ in range(3):
            edges = [sorted(rng.integers(0, n + 1, 2)) for n in leaf.shape]
            cut = tuple(slice(int(a), int(b)) for a, b in edges)
            there = engine.fetch(leaf, source, cut=cut)
            np.testing.assert_array_equal(there, mine[leaf.path][cut], strict=True)


def test_no_more_than_the_cut_is_read(tmp_path):
    """What lies outside of a cut is not looked at: NaN there goes unnoticed, NaN inside does not.
    So that a host reads what its own devices hold."""
    path, mine = "single/linear1/kernel", arrays("flux", FLUX)
    mine[path][0, :, :2] = np.nan
    engine.write_shards(tmp_path, "model", engine.export_arrays(mmdit.BFL, mine.items()), "float32")
    source = engine.SafetensorsFile(tmp_path)
    (leaf,) = (
        leaf
        for leaf in engine.plan_leaves(mmdit.BFL, shapes("flux", FLUX), source)
        if leaf.path == path
    )
    every = [slice(None)] * 4
    for cut in (
        (slice(1, 3), *every[:4]),
        (slice(0, 1), every[0], slice(2, 7), *every[:2]),
        (slice(0, 1), slice(3, 9), slice(2, 4), slice(1, 2), slice(0, 2)),
    ):
        np.testing.assert_array_equal(engine.fetch(leaf, source, cut=cut), mine[path][cut])
    with pytest.raises(PortError, match="single_blocks.0.linear1.weight holds NaN"):
        engine.fetch(leaf, source, cut=(slice(0, 1), every[0], slice(1, 7), *every[:2]))


@pytest.mark.parametrize(
    ("name", "field", "tensors"),
    [
        ("flux", "flux", 1160),
        ("flux_bfl", "flux", 780),
        ("vae", "vae", 244),
        ("vae_bfl", "vae", 244),
        ("t5", "t5", 220),
        ("clip", "clip", 196),
    ],
)
def test_full_size_keys_are_covered(name, field, tensors):
    """Every key of the published models is used once or ignored, every leaf of ours is filled,
    every shape agrees: at full size, by lists of diffusers, transformers and BFL's code."""
    keys = key_list(name)
    assert len(keys) == tensors
    table = PARTS[field].tables[name.endswith("bfl")]
    wanted = shapes(field, getattr(FLUX_FILL, field))
    source = SimpleNamespace(header={key: (shape, "BF16") for key, shape in keys.items()})
    leaves = engine.plan_leaves(table, wanted, source)
    used = [piece.key for leaf in leaves for piece in leaf.pieces]
    assert len(used) == len(set(used)) and len(leaves) == len(wanted)
    ignored = set(keys) - set(used)
    assert ignored == ({"encoder.embed_tokens.weight"} if field == "t5" else set())


def test_full_size_parameters():
    """The transformer has 11,902,391,360 numbers in either naming, the autoencoder 83,819,683."""
    for name, total in (("flux", 11_902_391_360), ("vae", 83_819_683)):
        for naming in (name, f"{name}_bfl"):
            assert sum(np.prod(shape) for shape in key_list(naming).values()) == total


def test_every_row_is_used():
    """No row of a table is dead: each is the row of some leaf of the full models, the MMDiT with
    all that a placement adds to it."""
    full = replace(FLUX_FILL, flux=replace(FLUX_FILL.flux, placement=FRAMES))
    tables = [(mmdit.BFL, "flux"), (mmdit.DIFFUSERS, "flux"), (vae.BFL, "vae")]
    tables += [(vae.DIFFUSERS, "vae"), (text.T5.table, "t5"), (text.CLIP.table, "clip")]
    for table, field in tables:
        rest = list(table.rows)
        for path in shapes(field, getattr(full, field)):
            first = next(row for row in table.rows if matches(row, path))
            rest = [row for row in rest if row != first]
        assert not rest


def matches(row, path):
    try:
        return find_row(Table((row,)), path)
    except KeyError:
        return None


def test_meaning_of_the_rows():
    """Fused outputs are q, k, v, mlp in this order; kernels are transposed; only the final
    modulation has its halves swapped; layers are counted along the first axis."""
    mine = arrays("flux", FLUX)
    there, D = dict(engine.export_arrays(mmdit.DIFFUSERS, mine.items())), FLUX.width
    kernel, bias = mine["single/linear1/kernel"], mine["single/linear1/bias"]
    kernel, bias = kernel.reshape(*kernel.shape[:2], -1), bias.reshape(len(bias), -1)
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        span = slice(i * D, (i + 1) * D if i < 3 else None)
        stem = f"single_transformer_blocks.2.{name}"
        np.testing.assert_array_equal(there[f"{stem}.weight"], kernel[2][:, span].T)
        np.testing.assert_array_equal(there[f"{stem}.bias"], bias[2][span])
    shift, scale = np.split(mine["final/mod/kernel"], 2, -1)
    np.testing.assert_array_equal(there["norm_out.linear.weight"], np.hstack([scale, shift]).T)
    mod = mine["double/txt/mod/kernel"][1]
    np.testing.assert_array_equal(there["transformer_blocks.1.norm1_context.linear.weight"], mod.T)
    there = dict(engine.export_arrays(mmdit.BFL, mine.items()))
    np.testing.assert_array_equal(
        there["final_layer.adaLN_modulation.1.bias"], mine["final/mod/bias"]
    )
    np.testing.assert_array_equal(there["single_blocks.2.linear1.weight"], kernel[2].T)
    conv = arrays("vae", PRESET.vae)["decoder/up/0/resize/conv/kernel"]
    ((_, value), *_) = engine.export_arrays(
        vae.DIFFUSERS, [("decoder/up/0/resize/conv/kernel", conv)]
    )
    assert value[3, 5, 1, 2] == conv[1, 2, 5, 3]


def test_meaning_of_bfls_autoencoder():
    """BFL's decoder counts its levels from the last, and its attention is made of 1x1 convs."""
    mine = arrays("vae", PRESET.vae)
    there = dict(engine.export_arrays(vae.BFL, mine.items()))
    np.testing.assert_array_equal(
        there["decoder.up.3.block.0.conv1.bias"], mine["decoder/up/0/res/0/conv1/bias"]
    )
    np.testing.assert_array_equal(
        there["encoder.down.3.block.0.conv1.bias"], mine["encoder/down/3/res/0/conv1/bias"]
    )
    assert "decoder.up.3.upsample.conv.weight" in there
    assert "decoder.up.0.upsample.conv.weight" not in there
    for name in ("q", "k", "v", "proj"):
        conv = there[f"decoder.mid.attn_1.{'proj_out' if name == 'proj' else name}.weight"]
        assert conv.shape == (12, 12, 1, 1)
        kernel = mine[f"decoder/mid/attn/{name}/kernel"]
        np.testing.assert_array_equal(conv[:, :, 0, 0], kernel.T)


def test_shards(tmp_path):
    """Shards respect the limit, their index names every key, and they read as one file does."""
    mine = arrays("vae", PRESET.vae)
    engine.write_shards(
        tmp_path, "model", engine.export_arrays(vae.DIFFUSERS, mine.items()), "float32", 20_000
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (
        len(files) > 3 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    )
    assert all(sum(x.nbytes for x in load_file(file).values()) <= 20_000 for file in files)
    source = engine.SafetensorsFile(tmp_path)
    for leaf in engine.plan_leaves(vae.DIFFUSERS, shapes("vae", PRESET.vae), source):
        np.testing.assert_array_equal(engine.fetch(leaf, source), mine[leaf.path])
    engine.write_shards(
        tmp_path, "model", engine.export_arrays(vae.DIFFUSERS, mine.items()), "float32"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_not_left_full(tmp_path, monkeypatch):
    """Of shards that could not all be written none is left."""
    save = engine.save_tensors

    def save_one(file, *rest):
        save(file, *rest)
        if file.name == "model.1.part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine, "save_tensors", save_one)
    tensors = ((f"{i}", np.ones(8, np.float32)) for i in range(4))
    with pytest.raises(OSError, match="No space"):
        engine.write_shards(tmp_path, "model", tensors, max_bytes=32)
    assert not [*tmp_path.iterdir()]


def test_full_size_key_list():
    """The authors' adapter at full size: 942 tensors, 1,241,012,288 numbers: A, B and a bias on B
    of every linear layer of BFL's transformer. Each is used once, and without a base its own
    tensors tell the shapes of FLUX.1-Fill."""
    keys = key_list("visualcloze")
    assert len(keys) == 942 and sum(np.prod(shape) for shape in keys.values()) == 1_241_012_288
    linear = {
        key.removesuffix(".weight"): shape
        for key, shape in key_list("flux_bfl").items()
        if key.endswith(".weight") and len(shape) == 2
    }
    for module, (fan_out, fan_in) in linear.items():
        rank = 64 if module == "final_layer.linear" else 256
        assert keys[f"{module}.lora_A.weight"] == (rank, fan_in)
        assert keys[f"{module}.lora_B.weight"] == (fan_out, rank)
        assert keys[f"{module}.lora_B.bias"] == (fan_out,)
    assert len(keys) == 3 * len(linear)
    header = {key: (shape, "BF16") for key, shape in keys.items()}
    base = weights.shapes(weights.abstract(Flux, FLUX_FILL.flux)[2])
    kernels = {path: shape for path, shape in base.items() if path.endswith("/kernel")}
    kernels = {path: lay_out(mmdit.BFL, path, shape).matrix for path, shape in kernels.items()}
    for known in (base, None):
        found = check_adapter(SimpleNamespace(path=Path("a"), header=header, metadata={}), known)
        assert {leaf.path: leaf.shape for leaf, _ in found.linear} == kernels
        used = [
            key
            for _, factors in found.linear
            for one in factors
            for key in one.keys
            if key in header
        ]
        assert sorted(used) == sorted(keys)
