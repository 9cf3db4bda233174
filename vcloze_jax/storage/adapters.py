"""Adapters from disk to trees of ours and back; beside weights.py, which does it for models."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vcloze_jax.config import FluxConfig, UserError
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.placement import FILL, Placement
from vcloze_jax.ports import export
from vcloze_jax.ports.adapters import Adapter, open_adapter, read_arrays
from vcloze_jax.ports.engine import SafetensorsFile
from vcloze_jax.ports.locate import OPENED
from vcloze_jax.ports.loraconfig import find_adapter
from vcloze_jax.ports.tables import mmdit
from vcloze_jax.ports.tables.namings import NAMINGS
from vcloze_jax.storage import places
from vcloze_jax.storage.preset import translate_errors
from vcloze_jax.storage.weights import abstract, shapes


def open_for(config: FluxConfig, file: Path) -> Adapter:
    """The adapter of a file or folder, its keys and shapes checked against this config's base."""
    _, _, base = abstract(Flux, replace(config, rank=0))
    return open_adapter(file, shapes(base))


def told_placement(file: Path) -> Placement | None:
    """The placement that an adapter of ours was trained in, by its header, which says nothing of
    FILL; None for files of others. Raises UserError for one that is not known."""
    with translate_errors(file):
        file = find_adapter(file)
        if file.suffix not in OPENED or not file.is_file():
            return None
        told = SafetensorsFile(file).metadata
    is_ours = {"step", "weights"} <= told.keys() or file.resolve() == places.MINI_LORA
    name = told.get("placement", FILL.name if is_ours else None)
    if name and name not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise UserError(f"{file}: of placement {name!r}, which is none of {known}")
    return PLACEMENTS.get(name)


def agreed_placement(files: list[Path]) -> Placement | None:
    """The placement of all adapters that say one. Raises UserError where they say several."""
    told = {file: placement for file in files if (placement := told_placement(file))}
    if len(set(told.values())) > 1:
        each = ", ".join(f"{file} of {placement.name}" for file, placement in told.items())
        raise UserError(f"--lora: adapters of one placement, please: {each}")
    return next(iter(told.values()), None)


def check(file: Path, config: FluxConfig) -> int:
    """Everything that can be wrong with an adapter for this model without reading a tensor -> its
    rank, the largest of its layers'. Says so where it was made for another base, or may have been
    meant weaker or stronger."""
    if not file.exists():
        raise UserError(f"{file}: there is no such adapter{places.suggest_adapter(file)}")
    with translate_errors(file):
        adapter = open_for(config, file)
    if adapter.narrow:
        others = f"with zeros for the other {config.in_channels - mmdit.LATENT}"
        print(f"lora: {file}: made for FLUX.1-dev, of {mmdit.LATENT} input channels; {others}")
    if adapter.doubt:
        print(f"lora: {file}: {adapter.doubt}")
    keys = (factors.keys[0] for _, found in adapter.linear for factors in found)
    return max((adapter.source.header[key][0][0] for key in keys), default=0)  # A is [r, in]


def load(file: Path, config: FluxConfig) -> dict:
    """An adapter of any naming as a tree of ours, float32 on the host, of scale 1: to `fold`, or
    where `fit` agrees, to go on training. It holds only the layers that the file changes; one that
    changes nothing is said to."""
    _, ours, _ = abstract(Flux, replace(config, rank=1))
    ours = shapes(ours)
    with translate_errors(file):
        arrays = dict(read_arrays(open_for(config, file)))
    if not any(x.any() for path, x in arrays.items() if not path.endswith("/lora_a")):
        print(f"lora: {file}: every B, or its alpha, is 0, so that it changes nothing")
    return unflatten_dict({path: give_axes(path, x, ours) for path, x in arrays.items()}, sep="/")


def give_axes(path, array, ours):
    """An array of an adapter whose inputs and outputs are flat, in our shape: that of `ours`, an
    adapter of rank 1, with the array's own rank. Norms stay."""
    if path.endswith("/lora_a"):
        return array.reshape(*ours[path][:-1], array.shape[-1])
    if path.endswith("/lora_b"):
        return array.reshape(*array.shape[:-1], *ours[path][array.ndim - 1 :])
    return array.reshape(ours.get(path, array.shape))


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


def save(file: Path, adapter: dict, dtype="float32", note: dict[str, str] | None = None):
    """Write an adapter tree, all of which this host has, for `load_lora_weights` of diffusers:
    alpha = rank, biases on B; with a `note` of ours in the header. What devices hold is fetched
    layer by layer."""
    arrays = flatten_dict(adapter, sep="/")
    fetch = lambda path: to_host(arrays[path]).astype(dtype, copy=False)  # noqa: E731
    norms = {path: fetch(path) for path in arrays if path.endswith("/scale")}
    read = partial(export.to_branches, arrays, fetch)
    export.write_adapter(file, NAMINGS["diffusers"], read, norms, note)


def to_host(array):
    """The array in NumPy. A JAX array would hold on to its copy on the host, so the copy is made of
    another array object over the same shards, which is dropped."""
    if not isinstance(array, jax.Array):
        return array
    shards = [shard.data for shard in array.addressable_shards]
    passing = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
    return np.asarray(passing)
