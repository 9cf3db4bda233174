"""The four models of a weights folder on a mesh: for painting, each when it is needed; for
training, split into what is learnt and what is frozen.
"""

import shutil
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from vcloze_jax import __version__
from vcloze_jax.config import PRESETS, UserError
from vcloze_jax.devices import (
    HOST,
    copy_to_hosts,
    cpu_mesh,
    describe_virtual,
    kernel_on,
    put,
    waits,
)
from vcloze_jax.inputs.cachefolder import cache_folder
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.inputs.pictures import check_writable
from vcloze_jax.placement import FILL
from vcloze_jax.sharding import compute_dtype, on_host, shardings
from vcloze_jax.step import purpose_key
from vcloze_jax.storage import adapters, checkpoint, places, weights
from vcloze_jax.storage.folding import fold, split
from vcloze_jax.storage.preset import read_config, read_text_length
from vcloze_jax.storage.textreader import TextCache, TextReader, Tokenizers

TEXT_ENCODERS = "t5", "clip"


class LazyModels:
    """The models of a weights folder, each put on the mesh when it is first asked for.

    MMDiT and autoencoder stay there. The text encoders, half as large as the MMDiT and needed for
    a moment, are loaded whenever they are asked for, and live no longer than they are held. With
    `offload` the MMDiT's blocks wait in host memory, from where sharding.fetched fetches them. Of a
    `bank`, {name: adapters}, `select` takes one in place of `loras`: the MMDiT is then loaded anew,
    for folding is not undone without rounding.
    """

    def __init__(self, folder, preset, loras, mesh, offload=False, bank=None):
        self.folder, self.preset, self.mesh, self.offload = folder, preset, mesh, offload
        self.bank, self.selected = {None: loras} | (bank or {}), None

    @property
    def loras(self):
        """The adapters [(file, scale)] that are selected."""
        return self.bank[self.selected]

    def select(self, name):
        """Paint with the adapters of this name, or None, those without."""
        if name != self.selected:
            self.__dict__.pop("flux", None)
            self.selected = name

    @cached_property
    def flux(self):
        """The MMDiT, with the adapters [(file, scale)] folded in: where it lies or, where that is
        not to hold all of it, on the CPU."""
        mesh = cpu_mesh() if self.offload else self.mesh
        tree = load_tree("flux", self.preset, self.folder, compute_dtype(self.mesh), mesh)
        for file, scale in self.loras:
            fold(tree, put(adapters.load(file, self.preset.flux), mesh, "flux/"), scale)
        if self.offload:
            tree = move_offloaded(tree, self.mesh)
        else:
            tree = weights.by_layer(tree, self.preset.flux, mesh)
        return weights.build(weights.Flux, self.preset.flux, tree)

    @cached_property
    def vae(self):
        return self.load("vae")

    def load_encoders(self):
        """T5 and CLIP."""
        return tuple(map(self.load, TEXT_ENCODERS))

    def load(self, name):
        """One model, named by its field of the preset."""
        return load_model(name, self.preset, self.folder, compute_dtype(self.mesh), self.mesh)

    def text_reader(self):
        """A TextReader of these encoders, which remembers on disk what it read."""
        tokenizers = Tokenizers(self.folder, self.preset.t5, self.preset.clip)
        cache = None  # hosts that remember other prompts would wait for each other
        if jax.process_count() == 1:
            cache = TextCache(cache_folder() / "text", self.text_identity())
        return TextReader(tokenizers, self.load_encoders, compute_dtype(self.mesh), cache)

    def text_identity(self):
        """All that an embedding depends on, to its last bit, beside its ids."""
        mesh = dict(self.mesh.shape), self.mesh.devices.flat[0].device_kind
        return repr((self.identity(*TEXT_ENCODERS), mesh, jax.__version__))

    def identity(self, *names):
        """What makes some models say what they say, wherever they run. Files are known by their
        content: times and inodes stay or change with the way in which files are copied."""
        configs = [getattr(self.preset, name) for name in names]
        modules = [weights.MODULES[name] for name in names]
        pairs = zip(modules, configs, strict=True)
        sources = [weights.match_files(*pair, self.folder)[0] for pair in pairs]
        files = [places.digest_files(source.path) for source in sources]
        return repr((files, configs, compute_dtype(self.mesh), __version__))


def load_model(name, preset, folder, dtype, mesh):
    """One model of a folder in its place on the mesh."""
    tree = load_tree(name, preset, folder, dtype, mesh)
    return weights.build(weights.MODULES[name], getattr(preset, name), tree)


def load_tree(name, preset, folder, dtype, mesh):
    """The weights of one model of a folder in their places on the mesh, a pure dict."""
    place = partial(shardings, mesh=mesh, root=f"{name}/")
    module, config = weights.MODULES[name], getattr(preset, name)
    tree = weights.read_tree(module, config, folder, dtype, place)
    return grow(tree, config, mesh) if name == "flux" else tree


def grow(tree, config, mesh):
    """Weights of an MMDiT as they were loaded, with what the Placement of `config` adds:
    modulations that are, as it begins, those of the image stream, and for clean tokens a vector of
    zeros."""
    for stream in (tree["double"]["img"], tree["single"]):
        stream |= {name: stream["mod"] for name in config.placement.branch}
    if config.placement.embeds:
        zeros = np.zeros((1, config.width), tree["img_in"]["kernel"].dtype)
        tree["cond_in"] = put({"kernel": zeros, "bias": zeros[0]}, mesh, "flux/cond_in/")
    return tree


def move_offloaded(tree, mesh):
    """A tree of the MMDiT, leaf by leaf from the CPU to its place on the mesh: its blocks into the
    devices' hosts' memory, from which copies are fast."""

    def place(path, x, sharding):
        return sharding.with_memory_kind(HOST) if waits(path, x) else sharding

    layout = jax.tree_util.tree_map_with_path(place, tree, shardings(tree, mesh, "flux/"))
    leaves, treedef = jax.tree.flatten(tree)
    tree.clear()
    moved = [jax.device_put(leaves.pop(0), where) for where in jax.tree.leaves(layout)]
    return jax.tree.unflatten(treedef, moved)


def check_mesh(preset, mesh):
    """Raise UserError for an array of a model or its adapter that the mesh cannot divide."""
    for name, module in weights.MODULES.items() if mesh.size > 1 else ():
        _, *trees = weights.abstract(module, getattr(preset, name))
        for tree in trees:
            shardings(tree, mesh, root=f"{name}/")


def checked_training_preset(folder, recipe, mesh):
    """The preset of this recipe and these weights, after everything was checked that can be wrong
    with weights, adapter and mesh without reading a tensor. Raises UserError."""
    preset, placement = PRESETS[recipe.preset], PLACEMENTS[recipe.placement]
    sizes = dict(placement=placement, in_channels=placement.channels)
    preset = replace(preset, flux=replace(preset.flux, **sizes))
    if recipe.weights == "mini" and preset.name != "mini":
        pass  # planned before there are weights
    elif recipe.from_scratch:
        vae, t5 = read_config(folder, "vae", preset.vae), read_text_length(folder, preset.t5)
        preset = replace(preset, vae=vae, t5=t5)
    else:
        preset = weights.checked_grid_preset(folder, placement)
        if preset.name != recipe.preset:
            raise UserError(f"{folder}: its preset is {preset.name}; add --preset {preset.name}")
        print(f"weights: {weights.summary(folder, preset)}")
    if recipe.lora:
        told = adapters.told_placement(Path(recipe.lora))
        if told not in (None, FILL, placement):
            raise UserError(f"{recipe.lora}: of placement {told.name}; add --placement {told.name}")
        rank = adapters.check(Path(recipe.lora), preset.flux)
        if rank != recipe.rank:
            raise UserError(f"{recipe.lora}: its rank is {rank}, not {recipe.rank}; set --rank")
    preset = replace(preset, recipe=recipe)
    check_mesh(preset.learning, mesh)
    if told := describe_virtual(mesh):
        print(told)
    return preset


def describe_origins(folder, preset, data, mesh):
    """What a run learns from, and with what: digests, the compute dtype, the kernel of attention,
    versions."""
    recipe = preset.recipe
    return {
        "weights": places.digest_files(folder),
        "lora": recipe.lora and places.digest_files(recipe.lora),
        "data": data,
        "dtype": compute_dtype(mesh),
        "attention": kernel_on(mesh, preset),
        "vcloze_jax": __version__,
        "jax": jax.__version__,
    }


def load_for_training(preset, folder, mesh):
    """All models on the mesh, by name: graphdefs, trainable and frozen trees (dicts; by_layer).

    Trainable, in float32: the adapter; with rank 0 the MMDiT; from scratch the text encoders too.
    The rest is frozen, in the compute dtype, and comes from the weights folder; with a cache the
    text encoders have done their work, and stay there; with --offload their blocks wait in host
    memory, from where the program that reads fetches one at a time. Raises UserError.
    """
    recipe = preset.recipe
    adapter = recipe.lora and load_start(preset)  # first, since it may be refused
    learnt = ("flux", *TEXT_ENCODERS) if recipe.from_scratch else () if recipe.rank else ("flux",)
    graphdefs, trainable, frozen = {}, {}, {}
    for name, module in weights.MODULES.items():
        graphdefs[name], _, _ = weights.abstract(module, getattr(preset.learning, name))
        if recipe.cache and name in TEXT_ENCODERS:
            continue
        if recipe.from_scratch and name in learnt:
            trainable[name] = draw_weights(name, preset.learning, mesh)
            continue
        dtype = "float32" if name in learnt else compute_dtype(mesh)
        tree = load_tree(name, preset, folder, dtype, mesh)
        if recipe.offload and name in TEXT_ENCODERS:
            move = lambda path, x: copy_to_hosts(x) if waits(path, x) else x  # noqa: E731
            tree = jax.tree_util.tree_map_with_path(move, tree)
        if name == "flux" and name not in learnt:
            tree = weights.by_layer(tree, preset.learning.flux, mesh)
        (trainable if name in learnt else frozen)[name] = tree
    if adapter:
        trainable["flux"] = put(adapter, mesh, "flux/")
    elif recipe.rank:
        trainable["flux"] = draw_weights("flux", preset.learning, mesh)
    return graphdefs, trainable, frozen


def draw_weights(name, preset, mesh):
    """New weights of a model, drawn on the mesh: its adapter's, or where it has none all."""

    def draw(key):
        _, adapter, base = split(weights.MODULES[name](config, rngs=nnx.Rngs(params=key)))
        return adapter or base

    config = getattr(preset, name)
    number = list(weights.MODULES).index(name)
    key = jax.random.fold_in(purpose_key(preset.recipe.seed, "init"), number)
    layout = shardings(jax.eval_shape(draw, key), mesh, root=f"{name}/")
    return jax.jit(draw, out_shardings=layout)(key)


def load_start(preset):
    """The adapter that training goes on from, as a tree on the host. Raises UserError."""
    file = Path(preset.recipe.lora)
    adapter = adapters.load(file, preset.flux)
    adapters.fit(file, adapter, preset.flux)
    return adapter


def check_loading(preset, folder, checkpoints):
    """Raise UserError for what training would refuse when it loads: the newest of a run's
    checkpoints, tokenizers, the adapter that it goes on from, a cache that cannot be written.
    Returns the Tokenizers."""
    checkpoint.check_newest(checkpoints)
    if preset.recipe.cache:
        check_writable(Path(preset.recipe.cache), "rows", "--cache")
    if preset.recipe.lora:
        load_start(preset)
    return Tokenizers(folder, preset.t5, preset.clip)


def ready_export(run, trainer, state, folder):
    """What writes RUN/lora.safetensors of a Trainer's `state` on the host, at any later time; with
    rank 0 RUN/weights is written now, at the end of the run, with the tokenizers of `folder`. All
    hosts call it: one of them writes, but each has only a part of what is to be written."""
    recipe = trainer.recipe
    if not recipe.rank and trainer.step == recipe.steps:
        models, out = trainer.models(), run.path / "weights"
        how = trainer.preset, folder, trainer.dtype, trainer.mesh
        parts = {name: getattr(models, name) or load_model(name, *how) for name in weights.MODULES}
        weights.save_pipeline(out, trainer.preset, parts)
        for name in ("tokenizer", "tokenizer_2") if run.writes else ():
            shutil.copytree(folder / name, out / name, dirs_exist_ok=True)
    if not recipe.rank:
        return lambda: None
    adapter = (state.average or state.trainable)["flux"]
    if jax.process_count() > 1:
        adapter = jax.tree.map(on_host, trainer.learnt["flux"])
    if not run.writes:
        return lambda: None
    what = f"average {recipe.ema:g}" if recipe.ema else "last"
    note = {"step": str(trainer.step), "weights": what}
    note |= weights.describe_placement(PLACEMENTS[recipe.placement])
    return partial(adapters.save, run.path / "lora.safetensors", adapter, note=note)
