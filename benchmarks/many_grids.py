"""Does a large file of people's own data start in seconds, and train in little memory?

    python benchmarks/many_grids.py

Writes 200,000 JSON lines, each a pair of photographs of 512 x 512 by names of its own (hard links
to 20 JPEG files), opens them as train.py does, twice, in processes of their own, and draws groups
of grids in threads. Prints the seconds to the first group, the CPU seconds of that, and the most
memory that the process ever held, imports included. The first start reads the headers of all
pictures and keeps their sizes beside the file; every later one reads those. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from grids_per_second import MAKER, SIZE
from load_memory import MB, ROOT, resident
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from vcloze_jax.config import FLUX_FILL  # noqa: E402
from vcloze_jax.data.sources import draw_groups, open_source  # noqa: E402


def write_lines(folder, count):
    """The JSON-lines file of so many pairs; a file has as many names as it must."""
    subprocess.run([sys.executable, MAKER, folder / "pairs"], check=True)
    sides = {side: sorted((folder / "pairs" / side).iterdir()) for side in ("in", "out")}
    for file in (*sides["in"], *sides["out"]):
        Image.open(file).resize((SIZE, SIZE)).save(file, quality=95)
    with (folder / "own.jsonl").open("w") as lines:
        for i in range(count):
            names = {side: f"{side}-{i}.jpg" for side in sides}
            for side, name in names.items():
                os.link(sides[side][i % len(sides[side])], folder / name)
            text = f"number {i}"
            line = {"source": names["in"], "target": names["out"], "text": text}
            lines.write(json.dumps(line) + "\n")
    return folder / "own.jsonl"


def start(file, groups):
    """In a process of its own: seconds to the first group, CPU seconds, bytes at most."""
    begun, recipe = time.perf_counter(), replace(FLUX_FILL.recipe, data=file, resolution=SIZE)
    drawn = draw_groups(open_source(recipe), recipe, 0, groups)
    next(drawn)
    seconds, cpu = time.perf_counter() - begun, time.process_time()
    grids = recipe.group * (1 + len([*drawn]))
    print(json.dumps([seconds, cpu, resident("VmHWM"), grids]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--groups", type=int, default=12, help="of 8 grids that are drawn")
    parser.add_argument("--start", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        return start(args.start, args.groups)
    print(f"{args.lines} lines; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        file = write_lines(Path(folder), args.lines)
        for number in ("first", "second"):
            command = [sys.executable, __file__, "--start", file, "--groups", str(args.groups)]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            seconds, cpu, most, grids = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{number} start: {seconds:.1f} s to the first group ({cpu:.1f} of CPU time), "
                f"{most / MB:.0f} MB at most while {grids} grids were drawn"
            )


if __name__ == "__main__":
    main()
