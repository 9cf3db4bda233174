"""Weights folders of random models of the true topology, in every layout that we read."""

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import MINI, CLIPConfig, FluxConfig, T5Config, UserError, VAEConfig
from vcloze_jax.ports import engine
from vcloze_jax.ports.tables.folder import PARTS
from vcloze_jax.storage import weights

DATA = Path(__file__).parent / "data"
VAE = "vae/diffusion_pytorch_model.safetensors"
FLUX = FluxConfig(
    width=24,
    heads=2,
    double_blocks=2,
    single_blocks=3,
    text_width=10,
    vec_width=6,
    axes_dim=(4, 4, 4),
    remat="none",
)
PRESET = replace(
    MINI,
    flux=FLUX,
    vae=VAEConfig(channels=(4, 8, 8, 12), groups=2, scale=0.5, shift=0.1),
    t5=T5Config(vocab=24, width=10, head_dim=4, heads=2, mlp=12, layers=2, max_length=96),
    clip=CLIPConfig(vocab=24, width=6, heads=2, mlp=12, layers=2, eos=23),
)
VARIANTS = {
    "flux": ("flux", FLUX),
    "flux without guidance": ("flux", replace(FLUX, guidance_embed=False)),
    "flux of 64 channels": ("flux", replace(FLUX, in_channels=64)),
    "vae": ("vae", PRESET.vae),
    "t5": ("t5", PRESET.t5),
    "clip": ("clip", PRESET.clip),
}
SINGLES = {"flux": "flux1-fill-dev.safetensors", "vae": "ae.safetensors"}  # BFL's own names


def shapes(field, config):
    return weights.shapes(weights.abstract(weights.MODULES[field], config)[2])


def arrays(field, config, dtype="float32", seed=0):
    """{path: random array} of a model's base."""
    rng = np.random.default_rng(seed)
    draw = {p: 0.2 * rng.standard_normal(s) for p, s in shapes(field, config).items()}
    return {path: array.astype(dtype) for path, array in draw.items()}


def module(field, config, seed=0):
    graphdef, _, base = weights.abstract(weights.MODULES[field], config)
    leaves = map(jnp.asarray, arrays(field, config, seed=seed).values())
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(base), leaves))


def leaves(model):
    """{path: array} of a module."""
    return weights.flat(nnx.to_pure_dict(nnx.state(model)))


def save(folder, preset=PRESET):
    """The models of a preset in diffusers' layout (float32), one tokenizer standing for both."""
    models = {field: module(field, getattr(preset, field)) for field in weights.MODELS}
    weights.save_pipeline(folder, preset, models, "float32")
    weights.write_json(folder / "tokenizer_2/tokenizer_config.json", {"model_max_length": 96})


def save_bfl(source, folder, preset=PRESET):
    """A folder in diffusers' layout with transformer and autoencoder as BFL's single files, which
    leave no other trace but vae/config.json: its groups and scale are in no tensor."""
    unlike = ("transformer", "scheduler", "model_index.json", "diffusion_pytorch_model.safetensors")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*unlike), dirs_exist_ok=True)
    for field, name in SINGLES.items():
        table = PARTS[field].tables[1]
        there = engine.export_arrays(table, arrays(field, getattr(preset, field)).items())
        save_file(dict(there), folder / name)


def copy(source, folder):
    """A copy of a weights folder that a test may spoil."""
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True))


def change(file, f):
    """Put f({key: array}) in the place of a safetensors file's tensors."""
    save_file(f(load_file(file)), file)


def key_list(name):
    """{key: shape} of a list in tests/data; each says in its first line how it was made."""
    first, *lines = (DATA / f"keys_{name}.txt").read_text().splitlines()
    assert first.startswith("# ")
    return {key: tuple(map(int, shape)) for key, *shape in map(str.split, lines)}


def refusal(folder, act=weights.checked_preset):
    """The message of a UserError: one line, that begins with the folder and names ten at most."""
    with pytest.raises(UserError) as error:
        act(folder)
    message = str(error.value)
    assert message.startswith(str(folder)) and "\n" not in message
    assert len(message.split("; ")) <= 12, message
    return message


def says(message, words):
    """Whether a message has these words; .* and | are patterns, all else is as it stands."""
    pattern = re.escape(words).replace(r"\.\*", ".*").replace(r"\|", "|")
    return re.search(pattern, message)


def tensors(folder, preset, dtype="float32", place=None):
    """{field/path: array} of all models of a folder; `place` is as sharding.shardings."""
    found = {}
    for field, (cls, _) in weights.MODELS.items():
        there = place and partial(place, root=f"{field}/")
        model = weights.load(cls, getattr(preset, field), folder, dtype, there)
        found |= {f"{field}/{path}": leaf for path, leaf in leaves(model).items()}
    return found


def same(left, right):
    assert left.keys() == right.keys()
    for path, array in left.items():
        np.testing.assert_array_equal(array, right[path], strict=True, err_msg=path)
