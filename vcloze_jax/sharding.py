"""Where every array lives on the mesh: one table from a path to a PartitionSpec."""

import re
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
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
