"""How many grids a second the user's own data gives, by threads, and what limits it.

    python benchmarks/grids_per_second.py

Writes triples of photographs of 512 x 512, as Graph200K's are, as JPEG or PNG files, and draws
grids of 3 x 3 cells of 384 x 384 from them as train.py does, made ahead in threads. Then tells what
one core works for a grid and for a picture: counted is this process alone, so that a machine which
others use tells what an idle one would do. The photographs are scikit-image's and matplotlib's.
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

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from vcloze_jax.config import FLUX_FILL  # noqa: E402
from vcloze_jax.data.owndata import OwnGrids, open_own  # noqa: E402
from vcloze_jax.data.sources import draw_group, draw_groups  # noqa: E402
from vcloze_jax.inputs.cells import cover  # noqa: E402
from vcloze_jax.inputs.pictures import open_picture  # noqa: E402

MAKER = Path(__file__).parents[1] / "scripts" / "make_pairs.py"
SIZE = 512


class ThreeRows(OwnGrids):
    """The same grids, always of three rows."""

    def shape(self, rng):
        return super().shape(rng)._replace(rows=3)


def write_triples(folder, suffix):
    """20 triples as pictures of one format -> the JSON-lines file."""
    subprocess.run([sys.executable, MAKER, folder / "pairs"], check=True)
    lines = []
    for source in sorted((folder / "pairs" / "in").iterdir()):
        sides = {"cond1": source, "source": source, "target": folder / "pairs/out" / source.name}
        line = {}
        for key, file in sides.items():
            line[key] = f"{source.stem}-{key}{suffix}"
            Image.open(file).resize((SIZE, SIZE)).save(folder / line[key])
        lines.append(json.dumps(line | {"text": source.stem}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return folder / "own.jsonl"


def grids_per_second(source, recipe, count):
    """Grids a second, over `count` groups."""
    start = time.perf_counter()
    done = sum(len(group) for group in draw_groups(source, recipe, 0, count))
    return done / (time.perf_counter() - start)


def milliseconds(action, times=30):
    """The median time that a core works on an action."""
    spent = []
    for _ in range(times):
        start = time.thread_time()
        action()
        spent.append(time.thread_time() - start)
    return 1e3 * float(np.median(spent))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=12, help="of 8 grids, by threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for suffix in (".jpg", ".png"):
        with tempfile.TemporaryDirectory() as folder:
            file = write_triples(Path(folder), suffix)
            recipe = replace(FLUX_FILL.recipe, data=str(file))
            source = ThreeRows(**vars(open_own(str(file), recipe)))
            for threads in args.threads:
                recipe = replace(recipe, threads=threads)
                speed = grids_per_second(source, recipe, args.groups)
                print(f"{suffix[1:]}, {threads} threads: {speed:.1f} grids a second")
            name = next(Path(folder).glob(f"*{suffix}"))
            picture = open_picture(name)
            opening = milliseconds(lambda name=name: open_picture(name))
            cutting = milliseconds(lambda picture=picture: cover(picture, 384, 384))
            group = milliseconds(lambda args=(source, 0, 0, 8): draw_group(*args), 3) / 8
            print(
                f"{suffix[1:]}, work of one core: {group:.0f} ms for a grid; for a picture "
                f"{opening:.1f} to decode, {cutting:.1f} to resize"
            )


if __name__ == "__main__":
    main()
