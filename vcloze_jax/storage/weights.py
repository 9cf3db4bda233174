"""Weights from disk to the mesh and back; with preset.py and adapters.py what knows `ports`.

A weights folder is laid out as diffusers': model_index.json, a folder per model with config.json
and safetensors, tokenizers. A model may instead be a single file, as Black Forest Labs and ComfyUI
have them (ports/locate.py).
"""

import json
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
from flax import nnx
from tqdm import tqdm

from vcloze_jax.config import FLUX_FILL, Preset, UserError
from vcloze_jax.hosts import is_first
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.text import CLIPTextEncoder, T5Encoder
from vcloze_jax.model.vae import VAE
from vcloze_jax.placement import FILL, Placement
from vcloze_jax.ports import engine
from vcloze_jax.ports.locate import locate
from vcloze_jax.ports.tables.folder import BASES, INDEX, PARTS, SCHEDULER, SHIFT
from vcloze_jax.sharding import on_host
from vcloze_jax.step import merge_model
from vcloze_jax.storage.folding import split
from vcloze_jax.storage.preset import load_preset, translate_errors

# field of Preset -> module, and its part of a weights folder
MODULES = {"flux": Flux, "vae": VAE, "t5": T5Encoder, "clip": CLIPTextEncoder}
READERS = 4  # threads: one is slower than most disks
SHOWN = 3  # seconds after which loading shows a bar
MODELS = {field: (module, PARTS[field]) for field, module in MODULES.items()}


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


def match_files(module, config, folder):
    """-> the open source of a module's files, shapes of its base, its planned leaves; of an MMDiT
    without what a Placement adds to it, which no base has: models.grow makes it."""
    part = next(part for cls, part in MODELS.values() if cls is module)
    if module is Flux:
        config = replace(config, placement=FILL)
    _, _, base = abstract(module, config)
    with translate_errors(folder):
        source, table = locate(folder, part)
    with translate_errors(source.path):
        return source, base, engine.plan_leaves(table, shapes(base), source)


def checked_preset(folder: Path) -> Preset:
    """The preset of a folder, after everything was checked that can be wrong without reading
    a tensor, but tokenizers. Raises UserError."""
    preset = load_preset(folder)
    for field, (module, _) in MODELS.items():
        match_files(module, getattr(preset, field), folder)
    return preset


def checked_grid_preset(folder: Path, placement: Placement | None = None) -> Preset:
    """`checked_preset` of a model that reads what grids are in this placement, or in the one that
    the folder names."""
    preset = checked_preset(folder)
    placement = placement or preset.flux.placement
    if preset.flux.in_channels != placement.channels:
        who = "grids need" if placement == FILL else f"placement {placement.name} needs"
        wanted = f"{placement.channels}, {BASES[placement.channels]}"
        raise UserError(
            f"{folder}: {preset.flux.in_channels} input channels; {who} a model of {wanted}"
        )
    return replace(preset, flux=replace(preset.flux, placement=placement))


def summary(folder: Path, preset: Preset) -> str:
    """What a checked weights folder is, by its content, in one line."""
    source, base, _ = match_files(Flux, preset.flux, folder)
    layout = "diffusers' layout" if source.path.is_dir() else "BFL's single files"
    channels = preset.flux.in_channels
    name = preset.name
    if name == FLUX_FILL.name:
        name = BASES.get(channels, "of no base that is known")
    size = sum(leaf.size for leaf in jax.tree.leaves(base)) / 1e6
    return f"{folder}: {layout}, {name}, {size:,.1f} M parameters, {channels} input channels"


def load(module: type, config, folder: Path, dtype="float32", sharding=None):
    """A module (Flux, VAE, T5Encoder or CLIPTextEncoder; LoRA rank 0), its weights of `folder`."""
    return build(module, config, read_tree(module, config, folder, dtype, sharding))


def build(module, config, tree):
    """A module of its weights."""
    graphdef, _, _ = abstract(module, config)
    return merge_model(graphdef, tree)


cut_layers = jax.jit(partial(jax.tree.map, list))


def by_layer(flux, config, mesh):
    """The MMDiT's tree as a program on one CPU runs fastest: where Flux.scan unrolls its loop, each
    stacked weight of the blocks becomes a list of its layers. For a moment both are in memory.
    Programs alone take such lists: `shardings` and weight files know stacked weights only."""
    if config.remat != "none" or mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return flux
    return flux | cut_layers({name: flux[name] for name in ("double", "single")})


def read_tree(module, config, folder, dtype="float32", sharding=None):
    """The weights of a module in `folder`, a pure dict.

    Shard by shard from mapped files, several at a time, so that the host never holds more than
    READERS shards, and reads only what its own devices are given; nothing is initialised.
    `sharding` maps the tree of shapes to one of Shardings; None: the default device. Raises
    UserError as `checked_preset` does, and for NaN.
    """
    source, base, leaves = match_files(module, config, folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = jax.tree.leaves(sharding(base)) if sharding else [one] * len(leaves)
    bar = dict(unit="array", leave=False, delay=SHOWN, disable=not is_first())
    readers = ThreadPoolExecutor(READERS)
    try:
        with translate_errors(source.path):
            arrays = readers.map(partial(stream, source, dtype), leaves, layout)
            arrays = list(tqdm(arrays, f"loading {source.path.name}", len(leaves), **bar))
    finally:
        readers.shutdown(cancel_futures=True)
    return jax.tree.unflatten(jax.tree.structure(base), arrays)


def stream(source, dtype, leaf, sharding):
    """One leaf from its file into its shards; those that are equal are read once."""
    devices = defaultdict(list)
    for device, cut in sharding.addressable_devices_indices_map(leaf.shape).items():
        devices[tuple((span.start, span.stop) for span in cut)].append(device)
    shards = []
    for cut, homes in devices.items():
        array = engine.fetch(leaf, source, dtype, [slice(*span) for span in cut])
        shards += jax.block_until_ready([jax.device_put(array, home) for home in homes])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def save_pipeline(folder: Path, preset: Preset, models: dict, dtype="bfloat16", max_bytes=10**10):
    """Write `models` (field of Preset -> module of LoRA rank 0) as a weights folder that diffusers
    and transformers load too. Tokenizers are the caller's. A file of tensors holds at most
    `max_bytes` of them."""
    for field, model in models.items():
        part = MODELS[field][1]
        arrays = flat(nnx.to_pure_dict(nnx.state(model))).items()
        tensors = engine.export_arrays(part.table, ((path, on_host(x)) for path, x in arrays))
        if not is_first():
            deque(tensors, 0)  # it takes all hosts to bring them together
            continue
        engine.write_shards(folder / part.folder, part.stem, tensors, dtype, max_bytes)
    for file, entries in described(preset, models).items() if is_first() else ():
        write_json(folder / file, entries)


def described(preset: Preset, fields) -> dict:
    """The JSON files of a weights folder of ours, {path in it: entries}, with the config.json of
    the models of some fields of Preset."""
    flow = {theirs: getattr(preset.flow, ours) for theirs, ours in SHIFT.items()}
    files = {
        "scheduler/scheduler_config.json": SCHEDULER | flow,
        "vcloze.json": {"preset": preset.name} | describe_placement(preset.flux.placement),
        "model_index.json": INDEX,
    }
    for field in fields:
        part, config = MODELS[field][1], getattr(preset, field)
        entries = {theirs: getattr(config, ours) for theirs, ours in part.config.items()}
        fixed = {name: value for name, value in part.fixed.items() if value is not None}
        files[f"{part.folder}/config.json"] = entries | fixed | part.written(entries)
    return files


def describe_placement(placement: Placement) -> dict[str, str]:
    """What a file of ours says of it: nothing, where it is that of all files before there were
    others."""
    return {} if placement == FILL else {"placement": placement.name}


def write_json(file, entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
