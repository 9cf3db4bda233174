"""Adapters from disk to trees of ours and back; beside weights.py, which does it for models."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ports import lora, read
from ports.rows import leaf
from vcloze_jax.config import FluxConfig, UserError
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage.preset import told
from vcloze_jax.storage.weights import abstract, flat, shapes


def opened(file: Path, config: FluxConfig):
    """The adapter file, its keys and shapes checked against the base of this config."""
    if file.is_dir():
        raise UserError(f"{file}: a folder, not an adapter file")
    _, _, base = abstract(Flux, replace(config, rank=0))
    return lora.opened(file, shapes(base))


def check(file: Path, config: FluxConfig):
    """Everything that can be wrong with an adapter for this model without reading a tensor."""
    with told(file):
        opened(file, config)


def load(file: Path, config: FluxConfig) -> dict:
    """An adapter of any naming as a tree of ours, float32 on the host, of scale 1: to `fold`, or
    where `fit` agrees, to go on training. It holds only the layers that the file changes."""
    tree = {}
    with told(file):
        for path, array in lora.arrays(opened(file, config)):
            *names, last = path.split("/")
            node = tree
            for name in names:
                node = node.setdefault(name, {})
            node[last] = array
    return tree


def fit(file: Path, adapter: dict, config: FluxConfig) -> FluxConfig:
    """The config of the model that this adapter is the whole trainable part of, or UserError."""
    ours = shapes(adapter)
    rank = max(shape[-1] for path, shape in ours.items() if path.endswith("/lora_a"))
    config = replace(config, rank=rank)
    _, wanted, _ = abstract(Flux, config)
    wanted = shapes(wanted)
    odd = [path for path in wanted | ours if ours.get(path) != wanted.get(path)]
    if odd:
        raise UserError(
            f"{file}: cannot be trained on: {len(odd)} of its arrays, as {odd[0]}, are not those "
            f"of one rank {rank} in every layer; it can be sampled with"
        )
    return config


def save(file: Path, adapter: dict, dtype="float32"):
    """Write an adapter tree for `load_lora_weights` of diffusers: alpha = rank, biases on B."""
    arrays = {path: np.asarray(array) for path, array in flat(adapter).items()}
    tensors = {key: x.astype(dtype) for key, x in read.export(lora.PEFT, arrays.items())}
    ranks = {
        piece.key.removeprefix(lora.PEFT.prefix).removesuffix(".lora_A.weight"): array.shape[-1]
        for path, array in arrays.items()
        if path.endswith("/lora_a")
        for piece in leaf(lora.PEFT, path, array.shape).pieces
    }
    part = file.with_name(file.name + ".part")
    modules = {name: (rank, rank) for name, rank in ranks.items()}
    save_file(tensors, part, metadata=lora.metadata(modules))
    os.replace(part, file)
