"""What a step of mini's training takes on this CPU.

    taskset -c 0 python benchmarks/mini_step.py

Steps of 16 grids of 2 x 2, the shape that training draws most, of mini's adapter: with all rows
encoded in every step, and with the rows remembered, on huge pages as train.py (to see it without:
GLIBC_TUNABLES= before the command). Prints the least and the median of the milliseconds of the
process's own CPU time, so that other work on the machine changes little.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from vcloze_jax.config import MINI  # noqa: E402
from vcloze_jax.data.sources import Shape, open_source, random_generator  # noqa: E402
from vcloze_jax.devices import make_mesh  # noqa: E402
from vcloze_jax.inputs import cli  # noqa: E402
from vcloze_jax.optimizers import make_optimizer  # noqa: E402
from vcloze_jax.rowmemory import choose_readers  # noqa: E402
from vcloze_jax.storage import places  # noqa: E402
from vcloze_jax.storage.models import checked_training_preset, load_for_training  # noqa: E402
from vcloze_jax.storage.textreader import Tokenizers  # noqa: E402
from vcloze_jax.trainer import Trainer  # noqa: E402

SHAPE = Shape(2, 2, MINI.resolution, MINI.resolution)


def time_steps(trainer, groups, repeats):
    """CPU milliseconds of every step, after one that compiles."""
    taken = []
    for _ in range(repeats + 1):
        start = time.process_time()
        trainer.wait(trainer.send(iter(groups)))
        taken.append(1000 * (time.process_time() - start))
    return taken[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    cli.use_huge_pages()
    mesh, folder = make_mesh(None), places.MINI_FOLDER
    recipe = replace(MINI.recipe, data="graphemoji", micro_batch=MINI.recipe.group)
    preset = checked_training_preset(folder, recipe, mesh)
    tokenizers = Tokenizers(folder, preset.t5, preset.clip)
    parts, tx = load_for_training(preset, folder, mesh), make_optimizer(recipe.clip)
    trainer = Trainer(parts, preset, tokenizers, mesh, tx)
    source = open_source(recipe)
    generators = (random_generator("example", 0, i) for i in range(recipe.batch))
    grids = [source.example(rng, SHAPE, [i]) for i, rng in enumerate(generators)]
    groups = [grids[i : i + recipe.group] for i in range(0, recipe.batch, recipe.group)]
    for name in ("encoded", "remembered"):
        if name == "remembered":
            choose_readers(trainer, None)
            trainer.programs = {}
        taken = time_steps(trainer, groups, args.repeats)
        print(f"rows {name}: least {min(taken):.0f}, median {np.median(taken):.0f} ms of CPU time")


if __name__ == "__main__":
    main()
