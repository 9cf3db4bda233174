"""The MMDiT on a CPU against diffusers' with peft's adapter: same weights, float32.

    pip install '.[parity]'
    python benchmarks/cpu.py                  # 82 M parameters, 704 tokens, one thread
    python benchmarks/cpu.py --small --rounds 1
    python benchmarks/cpu.py --plot growth.png  # five sizes: a table, and a plot

Ours writes a weights folder, which diffusers loads; each framework has processes of its own, in
turns, and what counts is the least CPU time of a call: with one thread on one core it holds within
a few per cent under load. (With more threads give it a quiet machine: torch's spin.) Beside the
ratios stand both rates of a matrix product of 2048², since these depend on the maker of the CPU and
the ratios follow them; above the table, what was measured, where and when.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from case import GUIDANCE, TIME, Case, measure, tell  # noqa: E402

CASE = Case(768, 6, 2, 4, 256, 768, text=128, rows=2, columns=2, side=192, rank=16)
SMALL = Case(128, 1, 1, 1, 64, 64, text=16, rows=1, columns=2, side=64, rank=4)
GROWTH = [(1, 2, 1), (2, 2, 1), (3, 3, 1), (1, 2, 2), (1, 2, 4)]  # rows, columns, batch
WHAT = ("forward", "gradient", "product")


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--small", action="store_true", help="a tiny model")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=3, help="processes of each framework")
    add("--repeats", type=int, default=5, help="calls in a process")
    add("--plot", type=Path, metavar="PNG", help="how time grows with tokens and with the batch")
    add("--child", nargs=3, metavar=("WHO", "FOLDER", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def hold_threads(count):
    """Before any library starts: so many threads, one of them on a core of its own."""
    os.environ |= {"OMP_NUM_THREADS": str(count), "JAX_PLATFORMS": "cpu"}
    if count == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def write(folder, case):
    """A weights folder of ours, normal weights of deviation 0.02."""
    import jax
    from flax import nnx

    from vcloze_jax.storage import weights

    preset, rng = case.preset("none"), np.random.default_rng(1)
    graphdef, _, base = weights.abstract(weights.MODULES["flux"], preset.flux)
    base = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), base)
    models = {"flux": nnx.merge(graphdef, base)}
    weights.save_pipeline(folder, preset, models, dtype="float32")


def ours(folder, case, repeats):
    from functools import partial

    import jax
    import jax.numpy as jnp

    from vcloze_jax.devices import make_mesh, ready_xla
    from vcloze_jax.model.ops import rope_table
    from vcloze_jax.step import merge_model
    from vcloze_jax.storage import weights

    ready_xla(1)
    config, module = case.preset("none").flux, weights.MODULES["flux"]
    tree = weights.by_layer(weights.read_tree(module, config, folder), config, make_mesh())
    model = weights.build(module, config, tree)
    img, txt, pooled, ids = case.inputs()
    ids = np.concatenate([np.zeros((case.text, 3), np.float32), ids])
    pe = rope_table(ids[None], config.axes_dim, config.theta)
    t, guidance = (jnp.full(case.batch, value) for value in (TIME, GUIDANCE))

    def velocity(model):
        return model(img, txt, model.modulation(t, guidance, pooled), pe)

    forward = jax.jit(velocity)
    check = float(jnp.abs(forward(model)).mean())
    wait = lambda call: jax.block_until_ready(call())  # noqa: E731
    tell("ours", "forward", measure(partial(wait, lambda: forward(model)), repeats), check=check)

    graphdef, adapter, _ = weights.abstract(module, replace(config, rank=case.rank))
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), adapter
    )
    loss = lambda *trees: jnp.square(velocity(merge_model(graphdef, *trees))).mean()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    tell("ours", "gradient", measure(partial(wait, lambda: gradient(adapter, tree)), repeats))
    a, b = (jnp.asarray(rng.standard_normal((2048, 2048), np.float32)) for _ in range(2))
    multiply = jax.jit(jnp.matmul)
    tell("ours", "product", measure(partial(wait, lambda: multiply(a, b)), repeats), 2 * 2048**3)


def theirs(folder, case, repeats):
    import peer
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    model = peer.load(Path(folder, "transformer"))
    inputs = peer.arguments(case, torch.float32, "cpu")
    with torch.no_grad():
        check = float(model(**inputs)[0].abs().mean())
        tell("diffusers", "forward", measure(lambda: model(**inputs), repeats), check=check)
    learnt = peer.add_adapter(model, case.rank)
    times = measure(lambda: peer.gradient(model, learnt, inputs), repeats)
    tell("diffusers", "gradient", times)
    multiply = peer.multiply(2048, torch.float32, "cpu")
    tell("diffusers", "product", measure(multiply, repeats), 2 * 2048**3)


def origin(threads):
    """What is measured, where and when: one line above the table."""
    describe = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    names = [f"commit {done.stdout.strip() or 'unknown'}"]
    names += [f"{name} {version(name)}" for name in ("jax", "torch", "diffusers", "peft")]
    with open("/proc/cpuinfo") as file:
        models = [line.partition(": ")[2].strip() for line in file if line.startswith("model name")]
    cpu, load = (models or [platform.machine()])[0], os.getloadavg()[0]
    names += [f"{threads} of {os.cpu_count()} cores of {cpu}, load {load:.1f} at the start"]
    return ", ".join([*names, f"{datetime.date.today()}"])


def compare(case, args):
    """{what: (ours, theirs)} in milliseconds of CPU time, the least of all rounds."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for who in ["write", *args.rounds * ["ours", "diffusers"]]:
            numbers = json.dumps(list(vars(case).values()))
            flags = ["--threads", str(args.threads), "--repeats", str(args.repeats)]
            command = [sys.executable, __file__, *flags, "--child", who, folder, numbers]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    line = json.loads(line)
                    found.setdefault((line["who"], line["what"]), []).append(line)
    checks = [found[who, "forward"][0]["check"] for who in ("ours", "diffusers")]
    assert np.isclose(*checks, rtol=1e-4), f"other velocities: {checks}"
    least = lambda key: min(line["cpu_min_ms"] for line in found[key])  # noqa: E731
    return {what: (least(("ours", what)), least(("diffusers", what))) for what in WHAT}


def plot(file, case, args):
    """Time against tokens, at batch 1, and against the batch, of both frameworks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = {}
    for rows, columns, batch in GROWTH:
        one = replace(case, rows=rows, columns=columns, batch=batch)
        points[one.image + one.text, batch] = show(one, args)
    fewest = min(tokens for tokens, _ in points)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, label in zip(axes, ("tokens, batch 1", f"batch, {fewest} tokens"), strict=True):
        by_batch = label.startswith("batch")
        chosen = {k: v for k, v in points.items() if (k[0] == fewest if by_batch else k[1] == 1)}
        at = [batch if by_batch else tokens for tokens, batch in chosen]
        for what, dashes in (("forward", "-"), ("gradient", "--")):
            for i, (who, colour) in enumerate((("ours", "C0"), ("diffusers", "C1"))):
                times = [1e-3 * found[what][i] for found in chosen.values()]
                axis.plot(at, times, dashes, color=colour, marker="o", label=f"{who}, {what}")
        axis.set(xlabel=label, xscale="log", yscale="log")
        axis.set_xticks(at, map(str, at))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds of CPU time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(file, dpi=150)


def show(case, args):
    """Measure a case and print its row."""
    found = compare(case, args)
    rates = [f"{2 * 2048**3 / ms / 1e6:.0f}" for ms in found["product"]]
    cells = [f"{case.image + case.text} x {case.batch}"]
    for what in ("forward", "gradient"):
        mine, others = found[what]
        cells += [f"{mine:.0f}", f"{others:.0f}", f"{mine / others:.2f}"]
    print("|", " | ".join([*cells, " / ".join(rates)]), "|", flush=True)
    return found


def main():
    args = parse(sys.argv[1:])
    case = SMALL if args.small else CASE
    if args.child:
        who, folder, numbers = args.child
        hold_threads(args.threads)
        case = Case(*json.loads(numbers))
        if who == "write":
            return write(Path(folder), case)
        return (ours if who == "ours" else theirs)(Path(folder), case, args.repeats)
    print(origin(args.threads), end="\n\n", flush=True)
    names = "tokens x batch", "forward, ms: ours", "diffusers", "ratio", "gradient, ms: ours"
    names += "diffusers + peft", "ratio", "product of 2048², GFLOP/s: XLA / torch"
    print("|", " | ".join(names), "|\n|" + "---|" * len(names))
    if args.plot:
        plot(args.plot, case, args)
    else:
        show(case, args)


if __name__ == "__main__":
    main()
