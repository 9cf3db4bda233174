"""Where every array lives on the mesh: one table from a path to a PartitionSpec."""

import math
import re
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vcloze_jax.config import UserError

# All but tensor split the batch. fsdp splits all weights, too, and layers gather them for use.
# state splits what is learnt, and modulations, which need no gathering; the base stays whole.
AXES = ("data", "state", "fsdp", "tensor")
BATCH, BOTH = P(AXES[:3]), ("state", "fsdp")


class Split(NamedTuple):
    """How the mesh splits a layer while it computes: an entry for each axis of its inputs and of
    its outputs, and that of the batch. Weights at rest are split over fsdp, too."""

    inputs: tuple = (None,)
    outputs: tuple = (None,)
    batch: tuple = BATCH


# Columns, then rows: what is between them stays where it is, and one sum over tensor ends them.
# Heads are columns, too; q, k, v and the parts of an MLP beside them are an axis of their own.
COLUMNS = Split(outputs=("tensor",))
ROWS = Split(inputs=("tensor",))
TO_HEADS = Split(outputs=(None, "tensor", None))
OF_HEADS = Split(inputs=("tensor", None))
OF_PARTS = Split(inputs=(None, "tensor", None))
# Of a vector, for all layers at once: weights, too many to be gathered, stay as they are at rest.
VECTOR = Split(outputs=(("tensor", *BOTH),), batch=(None,))
WHOLE = Split()

# Path of one layer's leaf -> its spec; the first match wins, the layer axis is never split.
# The same paths name the adapter, and inside the optimizer state its moments.
TABLE = (
    (r"^vae/", P()),  # 84 M parameters at most, and convolutions of 3 channels
    (r"/(qkv|linear1)/kernel$", P("fsdp", None, "tensor", None)),
    (r"/(qkv|linear1)/lora_b$", P(None, None, "tensor", BOTH)),
    (r"/proj/kernel$", P("tensor", None, "fsdp")),
    (r"/proj/lora_a$", P("tensor", BOTH, None)),
    (r"/linear2/kernel$", P(None, "tensor", None, "fsdp")),
    (r"/linear2/lora_a$", P(None, "tensor", BOTH, None)),
    (r"mod/kernel$", P(None, ("tensor", *BOTH))),
    (r"/(mlp_in|q|k|v|wi_0|wi_1|fc1)/kernel$", P("fsdp", "tensor")),
    (r"/(mlp_in|mod|cond_mod)/lora_b$", P(None, ("tensor", *BOTH))),
    (r"/(mlp_out|o|wo|fc2)/kernel$", P("tensor", "fsdp")),
    (r"/mlp_out/lora_a$", P(("tensor", *BOTH), None)),
    (r"/(kernel|embed)$", P("fsdp", None)),
    (r"/lora_a$", P(BOTH, None)),
    (r"/lora_b$", P(None, BOTH)),
    (r"", P()),
)
SMALL = 2**28  # numbers, half a gigabyte of bfloat16; most kernels of FLUX's blocks are larger
on_host = partial(multihost_utils.process_allgather, tiled=True)  # arrays -> NumPy's, each whole


def spec_of(path):
    """The table's PartitionSpec for a leaf's path, without a layer axis."""
    return next(spec for pattern, spec in TABLE if re.search(pattern, path))


def shardings(tree, mesh, root=""):
    """NamedSharding for every leaf of `tree`, by its path under `root`.

    What does not divide over fsdp or state is whole there, if small; else UserError, with its path.
    """

    def of(path, leaf):
        name = root + jax.tree_util.keystr(path, simple=True, separator="/")
        spec = spec_of(name)
        places = [None] * (leaf.ndim - len(spec)) + list(spec)
        for i, size in enumerate(leaf.shape):
            over = {a: n for a, n in mesh.shape.items() if n > 1 and a in (places[i] or ())}
            if size % math.prod(over.values()) == 0:
                continue
            if leaf.size >= SMALL or "tensor" in places[i]:
                axes = " and ".join(f"{axis}={n}" for axis, n in over.items())
                where = f"--mesh: {name} {leaf.shape}"
                raise UserError(f"{where}: {size} does not divide over {axes}; divisors of it do")
            places[i] = None
        return NamedSharding(mesh, P(*places))

    return jax.tree_util.tree_map_with_path(of, tree)


def count_shards(mesh):
    """Into how many parts a mesh splits the batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH[0])


def batch_sharding(mesh):
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def held_here(count, mesh):
    """Which of a batch's `count` samples the devices of this host hold, counted from 0."""
    cuts = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({i for (cut,) in cuts for i in range(count)[cut]})


def placed(x, *axes):
    """x, its axes split over these of the mesh in use (`jax.set_mesh`), if there is one."""
    empty = jax.sharding.get_abstract_mesh().empty
    return x if empty else jax.lax.with_sharding_constraint(x, P(*axes))


def gathered(x):
    """x, whole on every device of the mesh in use."""
    return placed(x, *[None] * x.ndim)


def by_batch(x):
    """x [B, ...], B over the batch axes of the mesh in use."""
    return placed(x, *BATCH, *[None] * (x.ndim - 1))


def fetched(layer):
    """A layer, on the devices: weights that wait in host memory (--offload) come, split as they lie
    there. Without a barrier XLA would gather them before, from host to host."""
    device, barrier = jax.memory.Space.Device, jax.lax.optimization_barrier
    is_here = lambda x: jax.typeof(x).memory_space == device  # noqa: E731
    return jax.tree.map(lambda x: x if is_here(x) else barrier(jax.device_put(x, device)), layer)


def spread(rows, mesh):
    """Host arrays, one a sample -> an array over the batch axes. Of a sample that only devices of
    other hosts hold, None will do: each host brings its own."""
    shape = len(rows), *next(row for row in rows if row is not None).shape
    return jax.make_array_from_callback(shape, batch_sharding(mesh), lambda i: np.stack(rows[i[0]]))


def compute_dtype(mesh):
    """float32 on CPU, bfloat16 on accelerators."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
