"""What saving costs a run, and what resuming takes: `python benchmarks/saving.py --gigabytes 15`.

A state as that of an adapter: weights and two moments, float32, stacked over layers, on a mesh of
all devices. Its step multiplies matrices, so that the devices are at work as they are in training,
and changes all of the state in its place. Measured are steps alone, the one in which a save begins,
those beside it until it is whole, and what both lose to steps alone, as a share of the steps from
one save to the next (--save-every, 500); then, in a process of its own, taking the state up again:
what the host holds at most, and the device. Linux only. 15 GB are rank 256 on FLUX.1-Fill. On a CPU
the threads that save take the cores of the step, which those of an accelerator's host do not.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from load_memory import resident  # noqa: E402

from vcloze_jax.config import Recipe  # noqa: E402
from vcloze_jax.devices import copy_to_hosts, make_mesh, parse_mesh  # noqa: E402
from vcloze_jax.sharding import shardings  # noqa: E402
from vcloze_jax.storage import checkpoint  # noqa: E402

LAYERS, RANK = 38, 256
SIZE = 4096  # of the matrices that a step multiplies
GB = 1e9


def make_state(size, mesh):
    """Shapes of a state of about so many bytes, in three parts, and where they lie."""
    width = int(size / 3 / 4 / LAYERS / RANK / 8) // 8 * 8
    layer = {f"{i}/linear/lora_b": (LAYERS, RANK, width) for i in range(8)}
    part = {name: jax.ShapeDtypeStruct(shape, "f4") for name, shape in layer.items()}
    tree = {name: part for name in ("trainable", "mu", "nu")}
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, tree, shardings(tree, mesh))


def make_step(like, products):
    """state, matrix -> both, changed: so many products, and a pass over the state."""

    def step(state, matrix):
        matrix = jax.lax.fori_loop(0, products, lambda _, x: x @ matrix / SIZE, matrix)
        state = jax.tree.map(lambda x: x * 0.999 + matrix.astype("f4")[0, 0] * 1e-9, state)
        return state, matrix

    layout = jax.tree.map(lambda x: x.sharding, like), None
    return jax.jit(step, donate_argnums=0, out_shardings=layout)


def timed(step, state, matrix):
    """The state after a step, and the seconds that it took."""
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, matrix))
    return state, time.perf_counter() - start


def save(folder, like, products):
    """Steps alone, then beside two saves, the first of which gets its memory: seconds."""
    layout = jax.tree.map(lambda x: x.sharding, like)
    draw = lambda x: jax.random.normal(jax.random.key(0), x.shape)  # noqa: E731 (noise is not packed)
    state = jax.jit(lambda: jax.tree.map(draw, like), out_shardings=layout)()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    matrix, step = jnp.ones((SIZE, SIZE), dtype), make_step(like, products)
    state, _ = timed(step, state, matrix)
    checkpoint.save(folder, 0, copy_to_hosts({"a": matrix}))  # what is done once is done
    found, alone = {}, []
    for _ in range(4):
        state, seconds = timed(step, state, matrix)
        alone.append(seconds)
    found["step alone"] = usual = statistics.median(alone)
    for number in (1, 2):
        before, start, beside = resident("VmRSS"), time.perf_counter(), []
        copy = copy_to_hosts(state)
        copied = time.perf_counter() - start
        saving = checkpoint.begin(folder, number, copy)
        found[f"save {number}: copy"] = copied
        found[f"save {number}: copy, begin"] = begun = time.perf_counter() - start
        while not saving.done() or not beside:
            state, seconds = timed(step, state, matrix)
            beside.append(seconds)
        found[f"save {number}: step beside"] = statistics.median(beside)
        found[f"save {number}: slowest"] = max(beside)
        found[f"save {number}: whole after"] = time.perf_counter() - start
        found[f"save {number}: lost"] = lost = begun + sum(beside) - usual * len(beside)
        found[f"save {number}: lost, %"] = 100 * lost / (usual * Recipe().save_every)
        found[f"save {number}: host rise GB"] = (resident("VmHWM") - before) / GB
        saving.result()
        del saving, copy
    return found


def resume(folder, like):
    """Take the state up: seconds, and by how much memory rose at most."""
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)  # noqa: E731
    state = jax.jit(zeros, out_shardings=jax.tree.map(lambda x: x.sharding, like))()
    jax.block_until_ready(state)
    before, start = resident("VmRSS"), time.perf_counter()
    _, state = checkpoint.resume(folder, state)
    jax.block_until_ready(state)
    found = {"resume": time.perf_counter() - start}
    found["resume host rise GB"] = (resident("VmHWM") - before) / GB
    stats = jax.devices()[0].memory_stats() or {}
    found["resume device peak GB"] = stats.get("peak_bytes_in_use", 0) / GB
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--products", type=int, default=2, help="of a step")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--part", choices=("save", "resume"), help="in this process")
    args = parser.parse_args()
    if args.part:
        mesh = make_mesh(parse_mesh(args.mesh) if args.mesh else None)
        like = make_state(args.gigabytes * GB, mesh)
        size = sum(x.size * 4 for x in jax.tree.leaves(like)) / GB
        device = f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
        if args.part == "save":
            print(f"{size:.2f} GB on {device}")
            found = save(Path(args.folder), like, args.products)
        else:
            found = resume(Path(args.folder), like)
        for name, value in found.items():
            print(f"{name:26} {value:8.3f}")
        return
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        for part in ("save", "resume"):
            subprocess.run([sys.executable, *sys.argv, f"--part={part}", f"--folder={folder}"])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
