"""The tiny models of tests/data/models.safetensors, read as users' weights are, and random ones.

scripts/fixtures_models.py describes the file. TINY is another matter: a whole preset of random
weights, mini's kind but smaller, for the tests of the commands.
"""

import math
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import MINI, FluxConfig, VAEConfig
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.vae import VAE
from vcloze_jax.storage import places, weights

FLUX = FluxConfig(
    width=16,
    heads=2,
    double_blocks=2,
    single_blocks=2,
    text_width=12,
    vec_width=10,
    axes_dim=(2, 2, 4),
    remat="none",
)
GUIDANCE = "time_text_embed.guidance_embedder."
VAE_CONFIG = VAEConfig(channels=(4, 8, 8, 8), layers=1, groups=2, scale=0.5, shift=0.1)


@cache
def stored():
    """{name: array} of the fixture."""
    return load_file(Path(__file__).parent / "data/models.safetensors")


def part(prefix):
    return {k.removeprefix(prefix): x for k, x in stored().items() if k.startswith(prefix)}


@cache
def flux(**changes):
    """The transformer of the fixture; narrower or unguided ones are cut out of its weights."""
    config = replace(FLUX, **changes)
    tensors = part("flux/")
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"][:, : config.in_channels].copy()
    if not config.guidance_embed:
        tensors = {k: x for k, x in tensors.items() if not k.startswith(GUIDANCE)}
    return load(Flux, config, "transformer", tensors)


@cache
def vae():
    """The autoencoder of the fixture."""
    return load(VAE, VAE_CONFIG, "vae", part("vae/"))


def load(cls, config, name, tensors):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name, "diffusion_pytorch_model.safetensors")
        file.parent.mkdir()
        save_file(tensors, file)
        return weights.load(cls, config, Path(folder))


def as_users():
    """Options that undo conftest's: with them a program is compiled as users' programs are."""
    undo = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    return {flag: value for flag, value in undo.items() if flag in os.environ["XLA_FLAGS"]}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def filled(tree, seed=0):
    """Random float32 arrays of a tree's shapes, of gain 1 for matrices and convolutions."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        gain = 1.0 if x.ndim < 2 else fan_in(path, x.shape) ** -0.5
        return jnp.asarray(gain * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def fan_in(path, shape):
    """How many inputs a weight of ours has, by its path; each of a stack, if it is one."""
    if len(shape) == 4 and re.search(r"proj/(kernel|lora_a)$", path) or "linear2/" in path:
        return math.prod(shape[1:-1])
    if re.search(r"(qkv|linear1)/(kernel|lora_b)$", path):
        return shape[1]
    return math.prod(shape[-4:-1]) if len(shape) == 4 else shape[-2]


def filled_module(cls, config, seed=0):
    """A module of random weights, norms and adapter included."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, filled(state, seed))


def relative(x, reference):
    """Relative error in the Euclidean norm, as the fixture measures it."""
    x = np.asarray(jnp.asarray(x, jnp.float32))
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


TINY = replace(
    MINI,
    flux=FluxConfig(
        width=32,
        heads=2,
        double_blocks=1,
        single_blocks=1,
        text_width=16,
        vec_width=16,
        axes_dim=(4, 6, 6),
        remat="none",
    ),
    vae=replace(MINI.vae, channels=(8, 8, 8, 8)),
    t5=replace(MINI.t5, width=16, head_dim=8, heads=2, mlp=32, layers=1, max_length=32),
    clip=replace(MINI.clip, width=16, heads=2, mlp=32, layers=1),
)


# The depth of FLUX.1-Fill, all 57 blocks, and its kinds of layers, at a width of 96.
DEPTH = dict(width=96, heads=4, axes_dim=(4, 10, 10), double_blocks=19, single_blocks=38)
DEEP = replace(TINY, flux=replace(TINY.flux, **DEPTH))


@cache
def random_models(preset, seed):
    """The four networks of a preset's sizes, by name; not to be changed."""
    return {
        name: filled_module(module, getattr(preset, name), seed)
        for name, (module, _) in weights.MODELS.items()
    }


def weights_folder(folder, seed=0, preset=TINY):
    """A weights folder of random models of TINY's sizes, which compile fast, or of a preset's; it
    says it is mini."""
    weights.save_pipeline(folder, preset, random_models(preset, seed), "float32")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(places.MINI_FOLDER / name, folder / name)
    return folder


@contextmanager
def overflowing(folder):
    """Within, the transformer of a weights folder is finite, but what it says is not."""
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    sound = file.read_bytes()
    save_file({key: x * np.float32(1e30) for key, x in load_file(file).items()}, file)
    try:
        yield
    finally:
        file.write_bytes(sound)
