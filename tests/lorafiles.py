"""Adapter files of the tiny transformer in every naming, for the tests of adapters."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.ops import rope_table
from vcloze_jax.ports import export, torchfile
from vcloze_jax.ports.tables import namings
from vcloze_jax.storage import adapters, folding, weights

PLAIN = tiny.FLUX
RANKED = replace(PLAIN, rank=11)  # between the widths 10 and 12 of two layers: ranks are mixed
NAMINGS = {  # of ports/tables/namings.py -> a file's name
    "diffusers": "diffusers.safetensors",
    "kohya": "kohya.safetensors",
    "visualcloze": "visualcloze.pth",
}
LORA = "lora_adapter_metadata"
Q, V = (f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qv")
K = "lora_unet_double_blocks_0_img_attn_qkv"


def base(seed=1):
    """A random base as a tree, of integers / 8, so that sums of few products are exact."""
    return integers(weights.abstract(Flux, PLAIN)[2], seed)


def adapter(bias=True, seed=0):
    """A random adapter in every layer as a tree; integers / 8. Without a bias, it is 0."""
    tree = integers(weights.abstract(Flux, RANKED)[1], seed)
    keep = lambda path, x: x * (bias or "lora_bias" not in str(path[-1]))  # noqa: E731
    return jax.tree_util.tree_map_with_path(keep, tree)


def integers(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.integers(-8, 9, x.shape) / 8), tree)


def written(folder, tree, bias=True):
    """The adapter as diffusers' file; without a bias, no tensor of one is in it."""
    file = folder / NAMINGS["diffusers"]
    adapters.save(file, tree)
    if not bias:
        edited(file, lambda d: {key: x for key, x in d.items() if not key.endswith(".bias")})
    return file


def edited(file, change, **header):
    """Rewrite a safetensors file with other tensors, and a LoraConfig as its header."""
    header = {LORA: json.dumps({f"transformer.{k}": v for k, v in header.items()})}
    save_file(change(load_file(file)), file, metadata=header)
    return file


def renamed(file, to):
    """A file in another naming, beside it."""
    out = file.with_name(NAMINGS[to])
    export.convert_adapter(file, namings.NAMINGS[to], out)
    return out


def tensors(file):
    """{key: array} of a file of either kind."""
    if file.suffix == ".pth":
        source = torchfile.TorchFile(file)
        return {key: source.read(key) for key in source.header}
    return load_file(file)


def metadata(file):
    """The LoraConfig of a safetensors file's header."""
    with safe_open(file, "numpy") as opened:
        return json.loads(opened.metadata()[LORA])


def same_tensors(left, right):
    """Equal keys, shapes, types and bits."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype and left[key].shape == right[key].shape, key
        assert left[key].tobytes() == right[key].tobytes(), key


def same_trees(left, right):
    """Equal paths and values; 0 and -0 are equal."""
    left, right = weights.flat(left), weights.flat(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def inputs(c):
    """What a transformer of config c reads of two grids: (img, txt, vec), ids [9, 3]."""
    rng = np.random.default_rng(1)
    ids = np.zeros((9, 3))
    ids[5:, 0], ids[5:, 2] = 1, np.arange(4)
    shapes = (2, 4, c.in_channels), (2, 5, c.text_width), (2, c.vec_width)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes], ids


@jax.jit
def velocity(model):
    """The model's answer to those inputs."""
    (img, txt, vec), ids = inputs(model.config)
    t, guidance = jnp.float32([0.3, 0.9]), jnp.float32([1.0, 3.5])
    pe = rope_table(ids[None], model.config.axes_dim, model.config.theta)
    return model(jnp.asarray(img), jnp.asarray(txt), model.modulation(t, guidance, vec), pe)


def folded(tree, adapter, scale=1.0):
    """A tree with an adapter folded in; the one given stays as it is, and its arrays are shared."""
    tree = jax.tree.map(lambda x: x, tree)
    folding.fold(tree, adapter, scale)
    return tree
