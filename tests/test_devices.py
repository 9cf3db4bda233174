"""The mesh, and XLA readied for it."""

import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import as_users

from vcloze_jax.config import UserError
from vcloze_jax.devices import check_xla_flags, make_mesh, parse_mesh, ready_xla

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


def test_a_gpu_of_80_gb_gives_80(monkeypatch):
    """Of the 81,559 MiB that an H100 has JAX takes 80 GB, where the user says nothing else."""
    variable = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for said in (None, ".5"):
        monkeypatch.setenv("XLA_FLAGS", "")
        monkeypatch.setenv(variable, said or "")
        if not said:
            monkeypatch.delenv(variable)
        ready_xla(1)
        assert os.environ[variable] == (said or "0.95")
    assert 0.95 * 81_559 * 2**20 >= 80e9


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
