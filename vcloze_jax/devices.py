"""The devices of this machine as the mesh that a flag asks for."""

import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import cache

import jax
import jaxlib
from jax.sharding import AxisType, SingleDeviceSharding

from vcloze_jax import hosts
from vcloze_jax.config import UserError
from vcloze_jax.inputs.checks import describe_error, flag, shorten
from vcloze_jax.inputs.cluster import count_processes
from vcloze_jax.model.ops import choose_kernel
from vcloze_jax.sharding import AXES, compute_dtype, count_shards, shardings

MOST = 65_536  # devices, and on an axis
THREADS = 4096  # of XLA's pool at most: a system allows a process only so many
HOST = "pinned_host"  # memory of a host that devices write by themselves
BLOCKS = "double", "single", "blocks"  # of the MMDiT, and of a text encoder
SETTINGS = {  # of JAX, which variables of the environment may have set otherwise
    "jax_default_prng_impl": "threefry2x32",  # with these a seed would mean another noise
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_rank_promotion": "allow",  # with these our programs would not run
    "jax_transfer_guard": "allow",
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
}
TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"
FUSION = "--xla_cpu_experimental_ynn_fusion_type"


def parse_mesh(text):
    """'8' or 'data=2,fsdp=2,tensor=2' -> {axis: size}; needs no JAX device. Raises UserError."""
    sizes = dict.fromkeys(AXES, 1)
    parts = [part.partition("=") for part in text.split(",")]
    if len(parts) == 1 and not parts[0][1]:
        parts = [("fsdp", "=", parts[0][0])]
    for axis, _, size in parts:
        fault = ""
        if axis not in sizes or not size.isdecimal():
            fault = f"'{axis}={size}' is not AXIS=SIZE with an axis of {', '.join(AXES)}"
        elif text.count(axis) > 1:
            fault = f"{axis} is there twice"
        elif not 1 <= int(size) <= MOST:
            fault = f"{axis} has {size} devices, not 1 to {MOST}"
        if fault:
            raise UserError(f"--mesh {text}: {fault}; write 8, or data=2,fsdp=4")
        sizes[axis] = int(size)
    if (count := math.prod(sizes.values())) > MOST:
        raise UserError(
            f"--mesh {text}: {count} devices, not 1 to {MOST}; write 8, or data=2,fsdp=4"
        )
    return sizes


def make_mesh(sizes=None):
    """Mesh of the given axis sizes; None takes all accelerators, or one CPU device of each host.

    Without an accelerator as many virtual CPU devices are made as the mesh needs: this must then
    be the first thing a process does with JAX. Raises UserError if there are too few accelerators,
    JAX finds none of those that the environment asks for, or there are several hosts and not all of
    their devices are taken.
    """
    wanted = math.prod((sizes or {}).values())
    own = math.ceil(wanted / max(1, count_processes()))
    check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    ready_xla(own)
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    if own > max(1, jax.config.jax_num_cpu_devices):
        with suppress(RuntimeError):  # JAX has started, and its devices are as they are
            jax.config.update("jax_num_cpu_devices", own)
    hosts.join_hosts()
    try:
        devices = jax.devices()
    except (AssertionError, RuntimeError) as error:
        said = str(error) and f": {describe_error(error)}"
        variable = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}".removesuffix("=")
        remedy = f"unset {variable}, or mend its driver"
        raise UserError(f"JAX has no device here{said}; {remedy}") from error
    hosts.let_first_speak()
    if sizes is None:
        alone = devices[0].platform == "cpu" and jax.process_count() == 1
        sizes = dict(fsdp=1 if alone else len(devices))
    elif wanted > len(devices):
        remedy = f"use --mesh {len(devices)} or fewer"
        if devices[0].platform == "cpu":
            remedy = f"JAX had started: make this mesh first, or set JAX_NUM_CPU_DEVICES={wanted}"
        raise UserError(
            f"--mesh: {wanted} devices asked for, {len(devices)} {devices[0].platform} here; "
            f"{remedy}"
        )
    elif wanted < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"--mesh: {wanted} devices asked for; {jax.process_count()} hosts use all that they "
            f"have, {len(devices)}"
        )
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = devices[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def cpu_mesh():
    """A mesh of one CPU device, beside whatever else there is. Raises UserError."""
    try:
        devices = jax.devices("cpu")
    except RuntimeError as error:
        named = os.environ["JAX_PLATFORMS"]
        raise UserError(
            f"JAX_PLATFORMS={named}: --offload needs the CPU, too; {named},cpu will do"
        ) from error
    return jax.make_mesh((1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:1])


def describe_virtual(mesh):
    """That a mesh has several devices which `are_virtual`, in a line; "" where it has not."""
    told = mesh.size > 1 and are_virtual(mesh)
    return f"devices: {mesh.size} virtual ones, of this machine's CPU" if told else ""


def are_virtual(mesh):
    """Whether the devices of a mesh share the cores of one machine."""
    return mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1


def painting_mesh(mesh):
    """Where a mesh paints a few grids: all of it or, of virtual devices, which share the cores of
    one machine, the first alone. Each of the others would paint a copy."""
    return cpu_mesh() if are_virtual(mesh) else mesh


def kernel_on(mesh, preset):
    """What computes the MMDiT's attention on a mesh, by name."""
    platform = mesh.devices.flat[0].platform
    return choose_kernel(platform, compute_dtype(mesh), preset.flux.head_dim)


def put(tree, mesh, root=""):
    """The tree's host arrays, each in its place on the mesh."""
    place = lambda x, where: jax.make_array_from_callback(x.shape, where, x.__getitem__)  # noqa: E731
    return jax.tree.map(place, tree, shardings(tree, mesh, root))


def waits(path, x):
    """Whether a model's array, by its path, waits in host memory where its blocks do: if it holds a
    matrix of every layer. Vectors stay: they are small, and no TPU reads one of a stack there."""
    return path[0].key in BLOCKS and x.ndim > 2


def copy_to_hosts(tree):
    """The arrays of a tree as they are now, split as they are, in the memory of their devices'
    hosts. Nobody waits for it: a device copies an array before it changes it."""

    def copy(x):
        memory = lambda device: SingleDeviceSharding(device, memory_kind=HOST)  # noqa: E731
        shards = [jax.device_put(s.data, memory(s.device)) for s in x.addressable_shards]
        where = x.sharding.with_memory_kind(HOST)
        return jax.make_array_from_single_device_arrays(x.shape, where, shards)

    return jax.tree.map(lambda x: copy(x) if isinstance(x, jax.Array) else x, tree)


def micro_size(recipe, mesh):
    """Grids of a micro-batch: at most --micro-batch, some on each device that splits the batch, and
    a part of a group, so that what a step is does not depend on it. Raises UserError."""
    shards = count_shards(mesh)
    for name in ("batch", "micro_batch", "group"):
        if getattr(recipe, name) % shards:
            raise UserError(
                f"{flag(name)} {getattr(recipe, name)}: a multiple of {shards}, please, which all "
                "axes of --mesh but tensor share; or put devices on that, which have the same grids"
            )
    sizes = [n for n in range(shards, recipe.group + 1, shards) if recipe.group % n == 0]
    return max(n for n in sizes if n <= max(shards, recipe.micro_batch))


@cache
def check_xla_flags(given):
    """Raise UserError where these XLA_FLAGS hold what XLA would end the process for, with a hundred
    lines: it is asked in another one, which takes a second, once, only for flags not of ours."""
    if all(flag.startswith((TIMEOUT, FUSION)) for flag in given.split()):
        return
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": given}
    told = subprocess.run(command, env=environment, capture_output=True)
    lines = told.stderr.decode(errors="replace")
    fault = re.search(r"^[EF]\d+ .*?\] (.*flag.*)", lines, re.MULTILINE | re.IGNORECASE)
    if told.returncode and fault:
        raise UserError(f"XLA_FLAGS={given}: {shorten(fault[1])}; unset it, or correct it")


def ready_xla(devices):
    """Ready XLA, before its first use, for as many virtual CPU devices on a few cores.

    They can miss its 40 s rendezvous. And a collective holds a thread until all devices have come
    to it, while XLA starts several at once in no fixed order: with its pool of one thread per
    device, some wait in one and some in another for ever. 16 each never waited, and cost no time.

    On CPUs jaxlib 0.10.2 sums some gradients over tokens wrongly, where a device has one sample,
    in what it fuses for its library YNNPACK; 0.11.2 does not. Without it a step takes a tenth to a
    fifth more. A flag that XLA_FLAGS already has stays as it is.

    JAX would leave a quarter of a GPU's memory alone; what others need of it is less than a tenth.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    flags = [f"{TIMEOUT}=1200"]
    if (0, 10, 2) <= jaxlib.version.__version_info__ < (0, 11):
        flags.append(f"{FUSION}=")
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    new = [flag for flag in flags if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(given + new)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(min(16 * devices, THREADS)))
