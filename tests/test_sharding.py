"""The table of PartitionSpecs."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vcloze_jax import sharding
from vcloze_jax.config import FLUX_FILL, MINI, UserError
from vcloze_jax.devices import make_mesh, parse_mesh
from vcloze_jax.model.layers import Dense
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.sharding import BATCH, BOTH, batch_sharding, shardings, spec_of
from vcloze_jax.storage import weights

MESHES = ("8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
OF_STATE = ("state=8", "state=4,tensor=2", "data=2,state=2,fsdp=2")


MODULES = tuple(weights.MODULES.items())


@cache
def abstract(preset):
    """Shapes of adapter and base of a preset's four models."""
    parts = {name: weights.abstract(cls, getattr(preset, name)) for name, cls in MODULES}
    return {"flux": parts["flux"][1]}, {name: base for name, (_, _, base) in parts.items()}


PRESETS = {
    preset.name: replace(preset, flux=replace(preset.flux, rank=preset.recipe.rank))
    for preset in (MINI, FLUX_FILL)
}


@pytest.mark.parametrize("mesh", (*MESHES, *OF_STATE))
@pytest.mark.parametrize("name", PRESETS)
def test_every_leaf_of_every_preset_divides(name, mesh):
    """Base, adapter and optimizer state of mini and of FLUX.1-Fill (rank 256) can be placed on 8
    devices in six ways. At full size no device holds more than 4 % above its share, which is of
    the base what fsdp and tensor split, of the rest also what state does: biases, norms and the
    autoencoder are copies."""
    mesh = make_mesh(parse_mesh(mesh))
    adapter, base = abstract(PRESETS[name])
    state = jax.eval_shape(make_optimizer(2.0).init, adapter)
    split, both = mesh.shape["fsdp"], mesh.shape["fsdp"] * mesh.shape["state"]
    for tree, parts in ((base, split), (adapter, both), (state, both)):
        leaves, places = jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh))
        each = [math.prod(p.shard_shape(x.shape)) for x, p in zip(leaves, places, strict=True)]
        if name == "flux-fill":
            assert sum(each) <= 1.04 * sum(x.size for x in leaves) / parts


EXPECTED = {
    "flux/double/img/qkv/kernel": P(None, "fsdp", None, "tensor", None),
    "flux/double/txt/proj/kernel": P(None, "tensor", None, "fsdp"),
    "flux/double/txt/mod/kernel": P(None, None, ("tensor", *BOTH)),
    "flux/double/txt/mlp_out/kernel": P(None, "tensor", "fsdp"),
    "flux/single/linear2/kernel": P(None, None, "tensor", None, "fsdp"),
    "flux/single/linear1/bias": P(None, None, None, None),
    "flux/single/linear1/lora_a": P(None, BOTH, None),
    "flux/single/linear1/lora_b": P(None, None, None, "tensor", BOTH),
    "flux/single/linear2/lora_a": P(None, None, "tensor", BOTH, None),
    "flux/double/img/mlp_in/lora_b": P(None, None, ("tensor", *BOTH)),
    "flux/double/img/q_norm/scale": P(None, None),
    "flux/img_in/kernel": P("fsdp", None),
    "t5/embed": P("fsdp", None),
    "t5/blocks/wo/kernel": P(None, "tensor", "fsdp"),
    "clip/blocks/q/kernel": P(None, "fsdp", "tensor"),
    "vae/encoder/mid/attn/q/kernel": P(None, None),
    "vae/encoder/conv_in/kernel": P(None, None, None, None),
}


@pytest.mark.parametrize("text", OF_STATE)
def test_state_is_split_where_the_base_is_whole(text):
    """All of the adapter that any axis splits `state` does, and so of its moments; of the base only
    the kernels of modulations, and the rest lies as where these devices are on data."""
    sizes = parse_mesh(text)
    mesh, (adapter, base) = make_mesh(sizes), abstract(PRESETS["mini"])
    for path, place in weights.flat(shardings(adapter, mesh)).items():
        axes = {axis for entry in place.spec for axis in np.atleast_1d(entry)}
        assert ("state" in axes) == (not path.endswith("lora_bias")), path
    sizes |= dict(state=1, data=sizes["data"] * sizes["state"])
    there = weights.flat(shardings(base, make_mesh(sizes)))
    for path, place in weights.flat(shardings(base, mesh)).items():
        of_vector = path.endswith("mod/kernel")
        assert ("state" in str(place.spec)) == of_vector, path
        assert of_vector or place.spec == there[path].spec, path


def test_the_table_says_where():
    """Columns of what fans out and rows of what fans in are split over tensor, by heads where there
    are heads, the other side over fsdp; the layer axis and the autoencoder never are; Adam's
    moments lie where their weights do."""
    mesh = make_mesh(parse_mesh(MESHES[2]))
    adapter, base = abstract(PRESETS["mini"])
    places = weights.flat(shardings(base, mesh)) | weights.flat(shardings(adapter, mesh))
    for path, spec in EXPECTED.items():
        ndim = len(weights.flat(base).get(path, weights.flat(adapter).get(path)).shape)
        assert P(*places[path].spec, *[None] * (ndim - len(places[path].spec))) == spec, path
    state = jax.eval_shape(make_optimizer(2.0).init, adapter)
    for path, place in weights.flat(shardings(state, mesh)).items():
        if "/mu/" in path or "/nu/" in path:
            assert place.spec == places[path.split("u/", 1)[1]].spec, path


@pytest.mark.parametrize("preset", (MINI, FLUX_FILL), ids=lambda preset: preset.name)
def test_the_table_knows_what_a_layer_says(preset):
    """Kernel, A and B are split over tensor at rest as their layer wants them at work, so that
    nothing of them is gathered over it; those of a vector lie as they are wanted."""
    over_tensor = lambda spec: [axes is not None and "tensor" in axes for axes in spec]  # noqa: E731
    for name in ("flux", "t5", "clip"):
        cls, config = weights.MODULES[name], getattr(PRESETS[preset.name], name)
        model = jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))  # noqa: B023
        for path, layer in nnx.iter_modules(model):
            path = "/".join(map(str, (name, *path)))
            if isinstance(layer, Dense):
                inputs, outputs, batch = layer.split
                at_work = dict(kernel=(*inputs, *outputs))
                if layer.rank:
                    at_work |= dict(lora_a=(*inputs, None), lora_b=(None, *outputs))
                for leaf, spec in at_work.items():
                    at_rest = spec_of(f"{path}/{leaf}")
                    assert over_tensor(at_rest) == over_tensor(spec), (path, leaf)
                    if batch != BATCH and leaf != "lora_a":
                        assert tuple(at_rest) == spec, (path, leaf)


def test_what_does_not_divide(monkeypatch):
    """What fsdp alone does not divide is whole on it if it is small, and split over tensor all the
    same; what is large, or what tensor does not divide, is an error with path and shape."""
    kernel = {"qkv": {"kernel": jax.ShapeDtypeStruct((12, 3, 2, 9), jnp.float32)}}
    place = lambda text: shardings(kernel, make_mesh(parse_mesh(text)), root="flux/")  # noqa: E731
    assert place("fsdp=4,tensor=2")["qkv"]["kernel"].spec == P("fsdp", None, "tensor", None)
    assert place("8")["qkv"]["kernel"].spec == P(None, None, "tensor", None)
    where = r"^--mesh: flux/qkv/kernel \(12, 3, 2, 9\): "
    with pytest.raises(UserError, match=where + "2 does not divide over tensor=4; divisors of it"):
        place("tensor=4")
    tree, mesh = {"mod": {"lora_b": jnp.zeros((4, 12))}}, make_mesh(parse_mesh("fsdp=4,tensor=2"))
    with pytest.raises(UserError, match="12 does not divide over fsdp=4 and tensor=2; divisors"):
        shardings(tree, mesh, root="flux/")
    monkeypatch.setattr(sharding, "SMALL", 0)
    with pytest.raises(UserError, match=where + "12 does not divide over fsdp=8"):
        place("8")


def test_the_batch_is_split_over_all_but_tensor():
    """Each device holds its part of the micro-batch; a tensor axis repeats it."""
    for text, share in zip((*MESHES, *OF_STATE), (1, 1, 2, 1, 2, 1), strict=True):
        x = jax.device_put(np.zeros((8, 3)), batch_sharding(make_mesh(parse_mesh(text))))
        assert x.sharding.spec == BATCH and x.addressable_shards[0].data.shape == (share, 3)
