"""The tiny models of tests/data/models.safetensors, read as users' weights are, and random ones.

scripts/fixtures_models.py describes the file.
"""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from vcloze_jax import weights
from vcloze_jax.config import FluxConfig, VAEConfig
from vcloze_jax.mmdit import Flux
from vcloze_jax.vae import VAE

FLUX = FluxConfig(
    width=16,
    heads=2,
    double_blocks=2,
    single_blocks=2,
    text_width=12,
    vec_width=10,
    axes_dim=(2, 2, 4),
    remat=False,
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


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def filled(tree, seed=0):
    """Random float32 arrays of a tree's shapes, of gain 1 for matrices and convolutions."""
    rng = np.random.default_rng(seed)

    def draw(x):
        gain = (
            1.0 if x.ndim < 2 else np.prod(x.shape[-4:-1] if x.ndim == 4 else x.shape[-2]) ** -0.5
        )
        return jnp.asarray(gain * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree.map(draw, tree)


def filled_module(cls, config, seed=0):
    """A module of random weights, norms and adapter included."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, filled(state, seed))


def relative(x, reference):
    """Relative error in the Euclidean norm, as the fixture measures it."""
    x = np.asarray(jnp.asarray(x, jnp.float32))
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)
