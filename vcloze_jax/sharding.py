"""Where every array lives: the mesh, and one table from a path to a PartitionSpec."""

import os
import re
from typing import NamedTuple

import jax
import jaxlib
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vcloze_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


class Split(NamedTuple):
    """How the tensor axis splits a layer: its weight [in, out], and the last axis of its output.

    That is while it computes. At rest fsdp splits an axis of the weight, too.
    """

    weight: tuple = (None, None)
    output: str | None = None

    @property
    def at_rest(self):
        rows, columns = self.weight
        return P(rows, "fsdp") if rows else P("fsdp", columns)


# Columns, then rows: what is between them stays where it is, and one sum over tensor ends them.
COLUMNS = Split((None, "tensor"), "tensor")
ROWS = Split(("tensor", None))
JOINED = Split((None, "tensor"))  # as columns, but the output, short and soon cut up, is whole
WHOLE = Split()

# Path of one layer's leaf -> its spec; the first match wins, the layer axis is never split.
# The same paths name the adapter, and inside the optimizer state its moments.
TABLE = (
    (r"^vae/", P()),  # 84 M parameters at most, and convolutions of 3 channels
    (r"/(qkv|mlp_in|linear1|mod|q|k|v|wi_0|wi_1|fc1)/kernel$", COLUMNS.at_rest),
    (r"/(proj|mlp_out|linear2|o|wo|fc2)/kernel$", ROWS.at_rest),
    (r"/kernel$", WHOLE.at_rest),
    (r"/lora_a$", P("fsdp", None)),
    (r"/lora_b$", P(None, "fsdp")),
    (r"/embed$", P("fsdp", None)),
    (r"", P()),
)


def parse_mesh(text):
    """'8' or 'data=2,fsdp=2,tensor=2' -> {axis: size}; needs no JAX device. Raises UserError."""
    sizes = dict.fromkeys(AXES, 1)
    parts = [part.partition("=") for part in text.split(",")]
    if len(parts) == 1 and not parts[0][1]:
        parts = [("fsdp", "=", parts[0][0])]
    for axis, _, size in parts:
        once = axis in sizes and text.count(axis) < 2
        if not once or not size.isdecimal() or not 1 <= int(size) <= 65_536:
            raise UserError(
                f"--mesh {text}: '{axis}={size}' is not AXIS=SIZE with an axis of "
                f"{', '.join(AXES)}; write 8, or data=2,fsdp=4"
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes=None):
    """Mesh of the given axis sizes; None takes all accelerators, or one CPU device.

    Without an accelerator as many virtual CPU devices are made as the mesh needs: this must then
    be the first thing a process does with JAX. Raises UserError if there are too few accelerators.
    """
    wanted = 1
    for size in (sizes or {}).values():
        wanted *= size
    ready_xla(wanted)
    if wanted > max(1, jax.config.jax_num_cpu_devices):
        jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    if sizes is None:
        count = 1 if devices[0].platform == "cpu" else len(devices)
        sizes = dict(data=1, fsdp=count, tensor=1)
    elif wanted > len(devices):
        raise UserError(
            f"--mesh: {wanted} devices asked for, {len(devices)} {devices[0].platform} here; "
            f"use --mesh {len(devices)} or fewer"
        )
    count = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count])


def ready_xla(devices):
    """Ready XLA, before its first use, for as many virtual CPU devices on a few cores.

    They can miss its 40 s rendezvous. And a collective holds a thread until all devices have come
    to it, while XLA starts several at once in no fixed order: with its pool of one thread per
    device, some wait in one and some in another for ever. 16 each never waited, and cost no time.

    On CPUs jaxlib 0.10.2 sums some gradients over tokens wrongly, where a device has one sample,
    in what it fuses for its library YNNPACK; 0.11.2 does not. Without it a step takes a tenth to a
    fifth more. A flag that XLA_FLAGS already has stays as it is.
    """
    flags = ["--xla_cpu_collective_call_terminate_timeout_seconds=1200"]
    if (0, 10, 2) <= jaxlib.version.__version_info__ < (0, 11):
        flags.append("--xla_cpu_experimental_ynn_fusion_type=")
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    new = [flag for flag in flags if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(given + new)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(16 * devices))


def spec_of(path):
    """The table's PartitionSpec for a leaf's path, without a layer axis."""
    return next(spec for pattern, spec in TABLE if re.search(pattern, path))


def shardings(tree, mesh, root=""):
    """NamedSharding for every leaf of `tree`, by its path under `root`.

    Raises UserError with path and shape where a dimension does not divide: never a silent copy.
    """

    def of(path, leaf):
        name = root + jax.tree_util.keystr(path, simple=True, separator="/")
        spec = spec_of(name)
        spec = P(*(None,) * (leaf.ndim - len(spec)), *spec)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"--mesh: {name} {leaf.shape}: {size} does not divide over "
                    f"{axis}={mesh.shape[axis]}; choose a power of two"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh):
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def placed(x, *axes):
    """x, its axes split over these of the mesh in use (`jax.set_mesh`), if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def gathered(x):
    """x, whole on every device of the mesh in use."""
    return placed(x, *[None] * x.ndim)


def by_batch(x, last):
    """x [B, ...], B over the batch axes of the mesh in use, its last axis over `last` or whole."""
    return placed(x, *BATCH, *[None] * (x.ndim - 2), last)


def put(tree, mesh, root=""):
    """The tree's arrays, each in its place on the mesh."""
    return jax.device_put(tree, shardings(tree, mesh, root))


def compute_dtype(mesh):
    """float32 on CPU, bfloat16 on accelerators."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
