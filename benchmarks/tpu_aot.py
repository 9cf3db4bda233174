"""Compiles what training and sampling run for TPUs that are not here, and prints what it needs.

    pip install '.[tpu-aot]'
    python benchmarks/tpu_aot.py --small                         # a tiny model: a minute
    python benchmarks/tpu_aot.py v5e:2x4 --remat full            # FLUX.1-Fill, adapter of rank 256
    python benchmarks/tpu_aot.py v6e:2x4 v5p:2x2x1 --grid 3x3
    python benchmarks/tpu_aot.py v5p:2x2x2 --mesh state=8        # the base whole on every chip
    python benchmarks/tpu_aot.py v5e:2x4 --keep-all              # the control: it must be refused
    python benchmarks/tpu_aot.py H100x8 --mesh state=8           # arithmetic, in a second

These are the functions of step.py and painter.py, not copies of them, on meshes of a topology that
libtpu describes: its compiler places the buffers, cuts the arrays and refuses what does not fit, as
it would there. Nothing runs: no numbers, no seconds. Bytes are of one chip; collectives are counted
as often as the loops around them turn; FLOPs are XLA's count for one grid of the same program
without loops (vcloze_jax.plan). For GPUs nothing compiles here: what lies on each is counted from
shapes, and beside it stand the temporaries that gpu.py measured of a gradient on one, in full.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from hlo import count_collectives  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from programs import Programs  # noqa: E402

from vcloze_jax import plan  # noqa: E402
from vcloze_jax.config import FLUX_FILL, MINI, REMAT, FluxConfig  # noqa: E402
from vcloze_jax.devices import kernel_on, parse_mesh  # noqa: E402
from vcloze_jax.model import mmdit  # noqa: E402
from vcloze_jax.sharding import AXES, count_shards  # noqa: E402
from vcloze_jax.storage.weights import MODULES, abstract  # noqa: E402

GPUS = {"H100": 80e9, "H200": 141e9}  # bytes, as their names have them
# Of a gradient on an H200 beside its arguments, of one grid of 3 x 3 cells of 384², rank 256.
MEASURED = {"light": 22.3 * 2**30, "full": 5.9 * 2**30}

SMALL = replace(
    MINI,
    flux=FluxConfig(
        width=256, heads=2, double_blocks=2, single_blocks=2, text_width=128, vec_width=64
    ),
)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("topologies", nargs="*", default=["v5e:2x4"], help="as libtpu names them (v5e:2x4)")
    add("--mesh", help="as train.py has it (default: all chips on fsdp)")
    add("--programs", nargs="*", default=["encode", "accumulate", "update", "euler"])
    add("--grid", default="3x3", metavar="ROWSxCOLUMNS")
    add("--resolution", type=int, default=384)
    add("--per-chip", type=int, default=1, help="grids at a time on each chip")
    add("--rank", type=int, default=256)
    add("--remat", choices=REMAT, default="light")
    add("--keep-all", action="store_true", help="as without remat, but in loops: the control")
    add("--small", action="store_true", help="a tiny model of the same topology")
    args = parser.parse_args(argv)
    others = args.grid, args.resolution, args.per_chip, args.rank, args.small, args.keep_all
    if any(map(is_gpu, args.topologies)):
        if others != ("3x3", 384, 1, 256, False, False) or args.remat not in MEASURED:
            parser.error("of GPUs one grid of 3x3 cells of 384 was measured, at rank 256")
    return args


def is_gpu(name):
    """Whether "H100x8" is meant, or a topology of libtpu."""
    return name.partition("x")[0] in GPUS


def topology_mesh(name, sizes):
    """The mesh of a topology's chips: `sizes` as --mesh says them, or all on fsdp."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    sizes = parse_mesh(sizes or str(len(devices)))
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, (AxisType.Auto,) * len(AXES))


def count_weights(preset, mesh):
    """Bytes on each chip of a mesh while an adapter learns, by part."""
    weights = plan.weights_on_device(preset, MODULES, mesh, "bfloat16")
    adapter = abstract(MODULES["flux"], preset.flux)[1]
    learnt = plan.on_device(adapter, mesh, "flux", "float32")
    return weights | {"adapter": learnt, "gradients": learnt, "moments": 2 * learnt}


def add_up(name, preset, args):
    """Print what a gradient takes of a GPU, one grid on each: "H100x8" -> whether it fits."""
    kind, _, count = name.partition("x")
    sizes = parse_mesh(args.mesh or count)
    mesh = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    parts = count_weights(preset, mesh) | {"temporaries": MEASURED[args.remat]}
    total = sum(parts.values())
    print(f"{name} as {dict(mesh.shape)}, remat {args.remat}, arithmetic: {in_bytes(parts)}")
    print(f"  {plan.si(total, 'B')} of {plan.si(GPUS[kind], 'B')}")
    return total <= GPUS[kind]


def report(name, programs):
    """Compile one program and print its line -> whether it fits."""
    with jax.set_mesh(programs.mesh):
        program, args = getattr(programs, name)()
        lowered, start = program.lower(*args), time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", str(error))
            reason = reason[0] if reason else " ".join(str(error).split()[:60])
            print(f"  {name}: refused: {reason}")
            return False
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    print(f"  {name}: {in_bytes(sizes)}; compiled in {seconds:.0f} s")
    kernels = Counter(re.findall(r"%(splash_\w+?)[.\d]* = ", text))
    for kernel, count in kernels.items():
        print(f"    {count} x {kernel}")
    for kind, (count, size) in sorted(count_collectives(text).items()):
        print(f"    {count} x {kind}: {plan.si(size, 'B')}", flush=True)
    return True


def in_bytes(sizes):
    """{"flux": 3_000_000} -> "flux 3 MB"."""
    return ", ".join(f"{part} {plan.si(size, 'B')}" for part, size in sizes.items())


def main():
    args = parse(sys.argv[1:])
    preset = SMALL if args.small else FLUX_FILL
    resolution = 64 if args.small else args.resolution
    rank = min(args.rank, 8) if args.small else args.rank
    recipe = replace(preset.recipe, rank=rank, remat=args.remat, resolution=resolution)
    preset = replace(preset, recipe=recipe).learning
    if args.keep_all:  # mmdit's policy for "light" says which results are kept
        preset = replace(preset, flux=replace(preset.flux, remat="light"))
        mmdit.keep_products = lambda *_, **__: True
    rows, columns = map(int, args.grid.split("x"))
    fits = True
    for name in args.topologies:
        if is_gpu(name):
            fits &= add_up(name, preset, args)
            continue
        mesh = topology_mesh(name, args.mesh)
        programs = Programs(preset, mesh, rows, columns, args.per_chip * count_shards(mesh))
        tokens, text = programs.tokens, preset.t5.max_length
        folded = replace(preset, flux=replace(preset.flux, rank=0))
        forward, (_, gradient) = (
            plan.flux_flops(folded, tokens),
            plan.gradient_flops(preset, tokens),
        )
        size = f"{programs.grids} grids of {tokens} + {text} tokens"
        how = f"attention by {kernel_on(mesh, preset)}, remat {args.remat}, jax {jax.__version__}"
        print(f"{name} as {dict(mesh.shape)}, {size}, {how}")
        print(f"  a step of sampling {plan.si(forward, 'FLOP')}, a gradient", end=" ")
        parts = in_bytes(count_weights(preset, mesh))
        print(f"{plan.si(gradient, 'FLOP')} for a grid; on a chip {parts}", flush=True)
        for program in args.programs:
            fits &= report(program, programs)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
