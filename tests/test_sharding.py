"""The mesh, XLA readied for it, and the table of PartitionSpecs."""

import math
import os
import subprocess
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import as_users

from vcloze_jax import sharding
from vcloze_jax.config import FLUX_FILL, MINI, UserError
from vcloze_jax.devices import check_xla_flags, make_mesh, parse_mesh, ready_xla
from vcloze_jax.model.layers import Dense
from vcloze_jax.sharding import BATCH, BOTH, batch_sharding, shardings, spec_of
from vcloze_jax.step import make_optimizer
from vcloze_jax.storage import weights

MESHES = ("8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
OF_STATE = ("state=8", "state=4,tensor=2", "data=2,state=2,fsdp=2")


# --- meshes ---


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1", (1, 1, 1, 1)),
        ("8", (1, 1, 8, 1)),
        ("fsdp=8", (1, 1, 8, 1)),
        ("state=8", (1, 8, 1, 1)),
        ("data=2,fsdp=2,tensor=2", (2, 1, 2, 2)),
        ("tensor=4,data=2", (2, 1, 1, 4)),
    ],
)
def test_meshes_that_are_read(text, sizes):
    """A bare number is the fsdp axis; named axes come in any order, the others are 1."""
    assert parse_mesh(text) == dict(zip(("data", "state", "fsdp", "tensor"), sizes, strict=True))


BAD = (
    "",
    "0",
    "-1",
    "8.0",
    "x",
    "8,8",
    "model=2",
    "data=",
    "data",
    "data=2;fsdp=4",
    "fsdp=0",
    "²",
    "fsdp=2,fsdp=4",
)


@pytest.mark.parametrize("text", BAD)
def test_meshes_that_are_refused(text):
    """Anything else is one line that names the flag, what was written, and what can be."""
    with pytest.raises(UserError, match="^--mesh .* write 8, or data=2,fsdp=4$"):
        parse_mesh(text)
    for spelled, fault in (("0", "fsdp has 0 devices"), ("data=2,data=4", "data is there twice")):
        with pytest.raises(UserError, match=fault):  # which is not that of another spelling
            parse_mesh(spelled)


def test_a_platform_that_is_not_here(monkeypatch):
    """What JAX raises where it finds no device of those asked for is the user's one line."""

    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match="JAX has no device here: Unable to .*JAX_PLATFORMS"):
        make_mesh()


def test_a_platform_without_a_reason(monkeypatch):
    """Where JAX says nothing (of a platform that has no plug-in here), neither do we; the variable
    that asks for it is named."""

    def fail():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match="^JAX has no device here; unset JAX_PLATFORMS=cuda, or"):
        make_mesh()


@pytest.mark.parametrize(
    "name, value",
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 7),
    ],
)
def test_a_seed_is_the_same_noise_everywhere(name, value):
    """Whatever the environment says of JAX's random numbers, a mesh is made for ours."""
    ours = jax.random.normal(jax.random.key(7), (4, 64))
    jax.config.update(name, value)
    make_mesh()
    np.testing.assert_array_equal(jax.random.normal(jax.random.key(7), (4, 64)), ours)


@pytest.mark.parametrize("name", ["jax_numpy_rank_promotion", "jax_transfer_guard_host_to_device"])
def test_what_the_environment_forbids_of_jax(name):
    """What an environment set JAX to refuse, for a program of its own, does not end ours."""
    jax.config.update(name, "raise" if "rank" in name else "disallow")
    make_mesh()
    assert (np.ones((2, 3)) + jnp.ones(3)).shape == (2, 3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--nonsense", "XLA_FLAGS=--nonsense: Unknown flag in XLA_FLAGS: --nonsense; unset it"),
        ("--xla_cpu_enable_fast_math=maybe", "value maybe for flag xla_cpu_enable_fast_math"),
    ],
)
def test_flags_that_xla_refuses(flags, message):
    """XLA would end the process for them, with a hundred lines and another exit code."""
    with pytest.raises(UserError, match=message):
        check_xla_flags(flags)


def test_flags_that_xla_takes(monkeypatch):
    """Those that it knows are let through, and for our own no process is started."""
    check_xla_flags("--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("XLA_FLAGS", "")
    ready_xla(1)
    monkeypatch.setattr(subprocess, "run", None)
    check_xla_flags(os.environ["XLA_FLAGS"])


def test_meshes_are_made():
    """Axes have the sizes encoded for; without a wish it is one CPU device."""
    for text in MESHES:
        assert dict(make_mesh(parse_mesh(text)).shape) == parse_mesh(text)
    assert make_mesh().size == 1


# --- XLA, readied ---


def test_a_sum_over_tokens_is_right():
    """The gradient of a gate is a sum over tokens, for a batch of one as for any: jaxlib 0.10.2
    makes it 120 % wrong on CPUs, with these sizes, unless XLA is readied."""
    rng = np.random.default_rng(0)
    shapes = dict(w=(1, 60, 128), h=(1, 60, 640), W=(640, 128), A=(640, 96), B=(96, 128))
    x = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

    @jax.checkpoint
    def gated(gate, w, h, W, A, B):
        return jnp.sum(w * gate[:, None] * (h @ W + (h @ A) @ B))

    grad = jax.jit(jax.grad(gated), compiler_options=as_users())(np.ones((1, 128), np.float32), **x)
    w, h, W, A, B = (np.float64(x[name]) for name in shapes)
    exact = (w * (h @ W + (h @ A) @ B)).sum(1)
    np.testing.assert_allclose(grad, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("jaxlib", "needed"), [((0, 10, 1), 0), ((0, 10, 2), 1), ((0, 11, 0), 0), ((0, 12, 0), 0)]
)
def test_xla_is_readied_for_the_jaxlib_that_needs_it(monkeypatch, jaxlib, needed):
    """YNNPACK is off in some versions only: others may not know the flag and end the process."""
    monkeypatch.setattr("jaxlib.version.__version_info__", jaxlib)
    monkeypatch.setenv("PJRT_NPROC", "")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    ready_xla(8)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_dump_to=/nowhere"
    assert flags.count("--xla_cpu_experimental_ynn_fusion_type=") == needed


def test_flags_of_the_user_win(monkeypatch):
    """What XLA_FLAGS already says of a flag of ours is neither changed nor said again."""
    given = (
        "--xla_cpu_experimental_ynn_fusion_type=INDIVIDUAL_DOT "
        "--xla_cpu_collective_call_terminate_timeout_seconds=9"
    )
    monkeypatch.setattr("jaxlib.version.__version_info__", (0, 10, 2))
    monkeypatch.setenv("PJRT_NPROC", "")
    monkeypatch.setenv("XLA_FLAGS", given)
    ready_xla(8)
    assert os.environ["XLA_FLAGS"] == given


# --- the table ---


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
