"""How much memory loading takes beyond the model itself: `python benchmarks/load_memory.py`.

Writes a transformer of FLUX.1-Fill's depth (19 + 38 blocks) at a smaller width, bfloat16, in either
naming, and loads it as sample.py would, in a process of its own for each: the peak of its resident
memory over what it held before and over the arrays that it loaded, in MB. On a CPU those arrays
are in the same memory; on accelerators they are not, and the excess is all there is. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from vcloze_jax.config import FluxConfig  # noqa: E402
from vcloze_jax.ports import engine  # noqa: E402
from vcloze_jax.ports.tables import mmdit  # noqa: E402

ROOT = Path(__file__).parents[1]
MB = 1e6


def config(width):
    """FLUX.1-Fill's, but for the width of everything."""
    heads = width // 128
    return replace(FluxConfig(), width=width, heads=heads, text_width=width, vec_width=width // 4)


def write(folder, width, table):
    """A file of ones -> bytes of the file, of our largest leaf."""
    from vcloze_jax.storage import weights

    sizes = weights.shapes(weights.abstract(weights.MODULES["flux"], config(width))[2])
    ones = ((path, np.ones(shape, "bfloat16")) for path, shape in sizes.items())
    engine.write_shards(
        folder, "diffusion_pytorch_model", engine.export_arrays(table, ones), "bfloat16"
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size, 2 * max(map(np.prod, sizes.values()))


def resident(field):
    """VmRSS, what this process holds now, or VmHWM, the most that it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def load(folder, width, devices, dtype):
    """In a process of its own: bytes loaded, and how the peak rose above what was there before."""
    import jax

    from vcloze_jax.devices import make_mesh
    from vcloze_jax.sharding import shardings
    from vcloze_jax.storage import weights

    mesh = make_mesh(dict(data=1, fsdp=devices, tensor=1))
    cls, place = weights.MODULES["flux"], partial(shardings, mesh=mesh, root="flux/")
    jax.block_until_ready(jax.device_put(np.zeros(1), mesh.devices.flat[0]))
    weights.match_files(cls, config(width), folder)
    before = resident("VmRSS")
    model = weights.load(cls, config(width), folder, dtype, place)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    print(json.dumps({"held": held, "rise": resident("VmHWM") - before}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=640, help="a multiple of 128")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "DEVICES", "DTYPE"))
    args = parser.parse_args()
    if args.load:
        folder, devices, dtype = args.load
        return load(Path(folder), args.width, int(devices), dtype)
    print("naming     devices  dtype     file  largest leaf  held  rise over held")
    for naming, table in (("bfl", mmdit.BFL), ("diffusers", mmdit.DIFFUSERS)):
        with tempfile.TemporaryDirectory() as folder:
            inside = Path(folder, "transformer")
            size, largest = write(inside, args.width, table)
            for devices, dtype in ((1, "bfloat16"), (8, "bfloat16"), (1, "float32")):
                command = [sys.executable, __file__, "--width", str(args.width)]
                command += ["--load", folder, str(devices), dtype]
                done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                leaf = largest * (2 if dtype == "float32" else 1)
                numbers = (size, leaf, found["held"], found["rise"] - found["held"])
                print(f"{naming:9} {devices:8}  {dtype:8}", *(f"{n / MB:9.0f}" for n in numbers))


if __name__ == "__main__":
    main()
