"""What is no folder of shards is refused in one line, and a header that lists a key twice."""

import json
import struct

import folders
import numpy as np
import pytest
from folders import VAE, change, refusal, says
from safetensors.numpy import load_file, save_file

from vcloze_jax.ports import engine


def index(entries):
    """Put this in the place of the autoencoder's index of shards, or change it by a function."""

    def spoil(folder):
        file = folder / f"{VAE}.index.json"
        new = entries(json.loads(file.read_text())["weight_map"]) if callable(entries) else entries
        file.write_text(new if isinstance(new, str) else json.dumps(new))

    return spoil


def shard(folder, n=-1):
    return sorted((folder / "vae").glob("*-of-*.safetensors"))[n]


def doubled(folder):
    first = load_file(shard(folder, 0))
    change(shard(folder), lambda d: d | first)


def variants(folder):
    for variant in ("fp16", "bf16"):
        save_file({"a": np.zeros(1)}, folder / "vae" / f"model.{variant}.safetensors")
    for file in (folder / "vae").glob("diffusion*"):
        file.unlink()


def without_index(folder):
    (folder / f"{VAE}.index.json").unlink()
    shard(folder).unlink()


SHARDS = {
    "two variants": (variants, "holds the variants bf16 and fp16; leave one"),
    "no index, a shard gone": (without_index, "shards and no index; fetch them all"),
    "a key too many": (
        index(lambda where: {"weight_map": where | {"ghost": next(iter(where.values()))}}),
        "the index and its shards disagree about ghost",
    ),
    "a key too few": (
        index(lambda where: {"weight_map": dict(list(where.items())[1:])}),
        "the index and its shards disagree about decoder.conv_in.bias",
    ),
    "a missing shard": (
        lambda folder: shard(folder).unlink(),
        "index.json names diffusion_pytorch_model-.*, which is not there",
    ),
    "a shard elsewhere": (
        index(lambda where: {"weight_map": dict.fromkeys(where, "../../etc/passwd")}),
        "index.json names passwd, which is not there",
    ),
    "no map": (index({"weights": 1}), "index.json is no index of shards"),
    "a list": (index([]), "index.json is no index of shards"),
    "no JSON": (index("{"), "index.json is no index of shards"),
    "a key twice": (doubled, " is in .* and in "),
    "a cut shard": (
        lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-9]),
        "is not a whole safetensors file",
    ),
    "one file besides": (
        lambda folder: save_file({"a": np.zeros(1)}, folder / VAE),
        "remove the one that is old",
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_wrong_shards(saved, tmp_path, kind):
    """Shards that disagree with their index or among each other are one line that says so."""
    folder = folders.copy(saved, tmp_path)
    tensors = load_file(folder / VAE).items()
    engine.write_shards(folder / "vae", "diffusion_pytorch_model", tensors, "float32", 20_000)
    spoil, words = SHARDS[kind]
    spoil(folder)
    message = refusal(folder)
    assert message.startswith(f"{folder}: vae/: ") and says(message, words), message


def test_a_key_twice(saved, tmp_path):
    """A header that lists a key twice, which safetensors would read, is refused by its name."""
    folder = folders.copy(saved, tmp_path)
    whole = (folder / VAE).read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    key = next(iter(header.keys() - {"__metadata__"}))
    text = json.dumps(header)
    text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(header[key])}}}".encode()
    text += b" " * (-len(text) % 8)
    (folder / VAE).write_bytes(struct.pack("<Q", len(text)) + text + whole[-tail(header) :])
    assert f"{key} is there twice" in refusal(folder)


def tail(header):
    return max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
