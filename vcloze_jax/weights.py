"""Weights from disk to the mesh and back: the only room that knows `ports`.

A weights folder is laid out as diffusers': model_index.json, a folder per model with config.json
and safetensors, tokenizers. What those files cannot say, the defaults of sampling and training,
is of the preset that `vcloze.json` names; without that file, of FLUX.1-Fill.
"""

import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from ports import flux, lora, pipeline, read, text, vae
from ports.rows import leaf
from vcloze_jax.cli import named_preset
from vcloze_jax.conditioning import Models
from vcloze_jax.config import FluxConfig, Preset, UserError
from vcloze_jax.lora import fold, split
from vcloze_jax.mmdit import Flux
from vcloze_jax.sharding import put, shardings
from vcloze_jax.text import CLIPTextEncoder, T5Encoder, Tokenizers
from vcloze_jax.vae import VAE

# field of Preset -> module, and its part of a weights folder
MODELS = {
    "flux": (Flux, flux.PART),
    "vae": (VAE, vae.PART),
    "t5": (T5Encoder, text.T5),
    "clip": (CLIPTextEncoder, text.CLIP),
}


@contextmanager
def told(path):
    """Errors of ports and of files become the user's, with the path in front."""
    try:
        yield
    except (read.PortError, OSError) as error:
        raise UserError(f"{path}: {error}") from error


def recognise(path: Path) -> str:
    """What a path holds, by content: "diffusers" (a weights folder) or "peft" (an adapter).

    UserError says what else it is, as far as that can be seen.
    """
    if (path / "transformer" / "config.json").is_file():
        return "diffusers"
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path}: no weights folder: it has no transformer/config.json")
        path = files[0]
    with told(path):
        with open(path, "rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02"):
            raise UserError(f"{path}: a pickle of torch, not yet supported; take safetensors")
        keys = read.read_header(path)
    kinds = (kind for sign, kind in pipeline.KINDS if any(re.fullmatch(sign, key) for key in keys))
    kind = next(kinds, "neither weights nor an adapter of FLUX")
    if kind != "peft":
        raise UserError(f"{path}: {kind}, not yet supported; take the files in diffusers' layout")
    return kind


def load_preset(folder: Path) -> Preset:
    """The preset that a weights folder names, with all sizes that its JSON files give. UserError if
    it is no weights folder of a kind that we read, or a file or entry cannot be ours."""
    if recognise(folder) != "diffusers":
        raise UserError(f"{folder}: an adapter, not a weights folder")
    preset = named_preset(folder)
    configs = {field: read_config(folder, field, getattr(preset, field)) for field in MODELS}
    file, limit = folder / "tokenizer_2" / "tokenizer_config.json", preset.t5.max_length
    length = typed(file, "model_max_length", read_json(file).get("model_max_length", limit), limit)
    configs["t5"] = replace(configs["t5"], max_length=min(length, limit))
    file = folder / "scheduler" / "scheduler_config.json"
    shift = read_fields(file, pipeline.SHIFT, preset.flow)
    return replace(preset, flow=replace(preset.flow, **shift), **configs)


def read_config(folder, field, default):
    """One model's config.json as our dataclass; an entry that is absent keeps the default."""
    part = MODELS[field][1]
    file = folder / part.folder / "config.json"
    entries = read_json(file)
    for name, value in part.fixed.items():
        if entries.get(name, value) != value:
            raise UserError(f"{file}: {name} is {entries[name]!r}, but only {value!r} is supported")
    ours = read_fields(file, part.config, default)
    if field == "flux":
        ours.setdefault("out_channels", ours.get("in_channels", default.in_channels))
        head_dim = ours.pop("head_dim", default.head_dim)
        ours["width"] = head_dim * ours.get("heads", default.heads)
    if field == "clip" and ours.get("eos") == 2:  # transformers: then it pools at the highest id
        ours["eos"] = ours.get("vocab", default.vocab) - 1
    try:
        return replace(default, **ours)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def read_fields(file, names, default):
    """The entries of a JSON file that `names` pairs with our fields, as {field: value}."""
    entries = read_json(file)
    return {
        field: typed(file, name, entries[name], getattr(default, field))
        for name, field in names.items()
        if entries.get(name) is not None
    }


def read_json(file):
    """A JSON object, or UserError."""
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file}: holds no JSON object")
    return entries


def typed(file, name, value, example):
    """`value` as the type of `example` (positive where that is an integer), or UserError."""
    if isinstance(example, tuple) and isinstance(value, list):
        return tuple(typed(file, name, item, example[0]) for item in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, int) and value > 0,
        float: number and math.isfinite(value),
    }
    if not fits.get(type(example), False):
        raise UserError(f"{file}: {name} cannot be {value!r}; {example!r} is one that can")
    return type(example)(value)


@cache
def abstract(module, config):
    """graphdef, adapter and base of a module, as shapes only (not to be changed)."""
    return split(jax.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))


def flat(tree):
    """{path: leaf}, in the order of the tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes(tree):
    return {path: leaf.shape for path, leaf in flat(tree).items()}


def plan(module, config, folder):
    """-> the open source of a module's files, graphdef, shapes of its base, its planned leaves."""
    part = next(part for cls, part in MODELS.values() if cls is module)
    graphdef, _, base = abstract(module, config)
    with told(folder / part.folder):
        source = read.Source(folder / part.folder)
        return source, graphdef, base, read.plan(part.table, shapes(base), source)


def check(folder: Path) -> Preset:
    """Everything of a weights folder that can be wrong without reading a tensor, but tokenizers."""
    preset = load_preset(folder)
    for field, (module, _) in MODELS.items():
        plan(module, getattr(preset, field), folder)
    return preset


def load(module: type, config, folder: Path, dtype="float32", sharding=None):
    """A module (Flux, VAE, T5Encoder or CLIPTextEncoder; LoRA rank 0) with its weights of `folder`.

    Leaf by leaf, so that the host never holds more than the largest; nothing is initialised.
    `sharding` maps the tree of shapes to one of Shardings; None: the default device. Raises
    UserError as `check` does, and for NaN.
    """
    source, graphdef, base, leaves = plan(module, config, folder)
    with told(source.path):
        places = jax.tree.leaves(sharding(base)) if sharding else [None] * len(leaves)
        arrays = [
            jax.device_put(read.fetch(leaf, source, dtype), place)
            for leaf, place in zip(leaves, places, strict=True)
        ]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(base), arrays))


def compute_dtype(mesh):
    """float32 on CPU, bfloat16 on accelerators."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"


def load_models(folder: Path, preset: Preset, loras: list, mesh):
    """-> preset, all models on the mesh with the adapters [(file, scale)] folded in, tokenizers."""
    trees = {}
    for name, (module, _) in MODELS.items():
        place = partial(shardings, mesh=mesh, root=f"{name}/")
        model = load(module, getattr(preset, name), folder, compute_dtype(mesh), place)
        trees[name] = nnx.to_pure_dict(nnx.state(model))
    for file, scale in loras:
        adapter = put(read_lora(file, preset.flux), mesh, "flux/")
        trees["flux"] = fold(trees["flux"], adapter, scale)
    models = jax.eval_shape(lambda: Models(preset, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(models)
    return preset, nnx.merge(graphdef, trees), Tokenizers(folder, preset.t5, preset.clip)


def save_pipeline(folder: Path, preset: Preset, models: dict, dtype="bfloat16", max_bytes=10**10):
    """Write `models` (field of Preset -> module of LoRA rank 0) as a weights folder that diffusers
    and transformers load too. Tokenizers are the caller's. A file of tensors holds at most
    `max_bytes` of them."""
    flow = preset.flow
    shift = {theirs: getattr(flow, ours) for theirs, ours in pipeline.SHIFT.items()}
    for field, model in models.items():
        part, config = MODELS[field][1], getattr(preset, field)
        arrays = flat(nnx.to_pure_dict(nnx.state(model))).items()
        tensors = read.export(part.table, ((path, np.asarray(array)) for path, array in arrays))
        read.write(folder / part.folder, part.stem, tensors, dtype, max_bytes)
        entries = {theirs: getattr(config, ours) for theirs, ours in part.config.items()}
        entries |= part.fixed | part.written(entries)
        write_json(folder / part.folder / "config.json", entries)
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.SCHEDULER | shift)
    write_json(folder / "vcloze.json", {"preset": preset.name})
    write_json(folder / "model_index.json", pipeline.INDEX)


def write_json(file, entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


def plan_lora(file, config):
    """-> the open source of an adapter file, its planned layers."""
    if recognise(file) != "peft":
        raise UserError(f"{file}: a weights folder, not an adapter")
    _, _, base = abstract(Flux, replace(config, rank=0))
    kernels = shapes(base).items()
    kernels = {p.removesuffix("/kernel"): s for p, s in kernels if p.endswith("/kernel")}
    source = read.Source(file)
    return source, lora.plan_adapter(kernels, source)


def check_lora(file: Path, config: FluxConfig):
    """Everything that can be wrong with an adapter for this model without reading a tensor."""
    with told(file):
        plan_lora(file, config)


def read_lora(file: Path, config: FluxConfig) -> dict:
    """An adapter in PEFT's naming as a tree of ours, float32 on the host, of scale 1: to `fold`, or
    where `fit_lora` agrees, to go on training. It holds only the layers that the file changes."""
    tree = {}
    with told(file):
        source, planned = plan_lora(file, config)
        for path, array in lora.fetch_adapter(planned, source):
            *names, last = path.split("/")
            node = tree
            for name in names:
                node = node.setdefault(name, {})
            node[last] = array
    return tree


def fit_lora(file: Path, adapter: dict, config: FluxConfig) -> FluxConfig:
    """The config of the model that this adapter is the whole trainable part of, or UserError."""
    ours = shapes(adapter)
    rank = max(shape[-1] for path, shape in ours.items() if path.endswith("/lora_a"))
    config = replace(config, rank=rank)
    _, wanted, _ = abstract(Flux, config)
    odd = [p for p, shape in shapes(wanted).items() if ours.get(p) != shape]
    if odd:
        raise UserError(
            f"{file}: cannot be trained on: {len(odd)} of its arrays, as {odd[0]}, are not those "
            f"of one rank {rank} in every layer; it can be sampled with"
        )
    return config


def write_lora(file: Path, adapter: dict, dtype="float32"):
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
    save_file(tensors, part, metadata=lora.metadata(ranks))
    os.replace(part, file)
