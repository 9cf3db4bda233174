"""A matrix product that XLA partitions wrongly, and what cures it.

    python benchmarks/wrong_matmul.py

x @ w on a mesh of 2 x 2 x 2, the rows of x split over (data, fsdp) and its columns over tensor, w
over (tensor, fsdp), the product like x. The SPMD partitioner gathers w over fsdp and puts the rows
of x in the order (fsdp, data) by a collective-permute, but gives the product as if it were in the
order (data, fsdp): rows of the devices (0, 1) and (1, 0) are exchanged. So in jaxlib 0.10.0,
0.10.2, 0.11.2 and 0.12.0.1, with Shardy and without (seen on CPU devices). Where the program says
that w is gathered, as layers.Dense does, nothing is reordered and the product is right.
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
ROWS = ("data", "fsdp")


def product(x, w, gather):
    """x @ w on the mesh, and the program that makes it."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    place = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731

    def matmul(x, w):
        return x @ (jax.lax.with_sharding_constraint(w, place("tensor", None)) if gather else w)

    args = jax.device_put((x, w), (place(ROWS, "tensor"), place("tensor", "fsdp")))
    program = jax.jit(matmul, out_shardings=place(ROWS, "tensor")).lower(*args).compile()
    return np.asarray(program(*args)), program.as_text()


def main():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 16)), rng.standard_normal((16, 16))
    x, w = np.float32(x), np.float32(w)
    for gather in (False, True):
        y, program = product(x, w, gather)
        wrong = np.flatnonzero(np.abs(y - x @ w).max(1) > 1e-3).tolist()
        permutes = program.count(" collective-permute(")
        print(f"w gathered over fsdp: {gather}; {permutes} permutes; wrong rows {wrong}")


if __name__ == "__main__":
    main()
