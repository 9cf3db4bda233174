"""What it costs that grids are drawn in groups of one shape.

    python benchmarks/gradient_variance.py

Draws groups of 8 grids as `train.py --data graphemoji` does and takes the gradient of mini's
adapter, new and as shipped, at every grid. Groups are independent: the covariance of a step of two
is that of a group's mean over 2. Grids that each had a shape of their own would be independent,
too: it would be that of one grid over 16. Prints the traces of both, their ratio with its standard
error, and the squared norm of the mean gradient. Takes two minutes of one core.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from vcloze_jax.config import MINI  # noqa: E402
from vcloze_jax.data.sources import draw_group, open_source  # noqa: E402
from vcloze_jax.devices import make_mesh  # noqa: E402
from vcloze_jax.optimizers import make_optimizer  # noqa: E402
from vcloze_jax.step import purpose_key  # noqa: E402
from vcloze_jax.storage import places  # noqa: E402
from vcloze_jax.storage.models import checked_training_preset, load_for_training  # noqa: E402
from vcloze_jax.storage.textreader import Tokenizers  # noqa: E402
from vcloze_jax.trainer import Trainer  # noqa: E402

RECIPE = replace(MINI.recipe, data="graphemoji", micro_batch=1)
ADAPTERS = {"new": None, "shipped": str(places.MINI_LORA)}


def load(preset, lora, mesh):
    """Mini's graphdefs, trainable and frozen trees, to go on from that adapter."""
    return load_for_training(
        replace(preset, recipe=replace(RECIPE, lora=lora)), places.MINI_FOLDER, mesh
    )


def grid_gradient(trainer, adapter, example, number):
    """The gradient at one grid, by its number in the run: float32 [parameters]."""
    noisy = trainer.encode([example], [number], purpose_key(RECIPE.seed, "draws"))
    args = adapter, trainer.frozen, jax.tree.map(jnp.zeros_like, adapter), noisy
    _, grads = trainer.program("accumulate", noisy.x_t.shape, *args)(*args)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])


def measure(gradient, groups):
    """Trace of the covariance of a step's gradient as drawn and fully mixed, their ratio and its
    error, the squared norm of the mean; `gradient` is a function of a grid and its number."""
    size, per_step, count = RECIPE.group, RECIPE.batch // RECIPE.group, len(groups)
    means, squares = [], []
    for number, group in enumerate(tqdm(groups, unit="group", leave=False)):
        gradients = [gradient(grid, number * size + i) for i, grid in enumerate(group)]
        means.append(np.mean(gradients, 0))
        squares.append(np.mean([np.square(g).sum() for g in gradients]))
    mean = np.mean(means, 0)
    drawn = np.array([np.square(m - mean).sum() for m in means]) * count / (count - 1)
    signal = np.square(mean).sum() - drawn.mean() / count  # the estimate has noise of its own
    mixed = (np.array(squares) - signal) / size
    ratio = drawn.mean() / mixed.mean()
    error = np.std(drawn - ratio * mixed) / mixed.mean() / count**0.5
    return drawn.mean() / per_step, mixed.mean() / per_step, ratio, error, signal


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24, help="of 16 grids")
    count = parser.parse_args().steps * RECIPE.batch // RECIPE.group
    mesh = make_mesh()
    source = open_source(RECIPE)
    preset = checked_training_preset(places.MINI_FOLDER, RECIPE, mesh)
    parts = load(preset, None, mesh)
    tokenizers = Tokenizers(places.MINI_FOLDER, preset.t5, preset.clip)
    trainer = Trainer(parts, preset, tokenizers, mesh, make_optimizer(RECIPE.clip))
    groups = [draw_group(source, RECIPE.seed, n, RECIPE.group) for n in range(count)]
    adapters = {name: load(preset, lora, mesh)[1] for name, lora in ADAPTERS.items()}
    print("adapter  as drawn  fully mixed  ratio          squared mean")
    for name, adapter in adapters.items():
        gradient = partial(grid_gradient, trainer, adapter)
        drawn, mixed, ratio, error, signal = measure(gradient, groups)
        print(f"{name:7} {drawn:9.4g} {mixed:12.4g}  {ratio:.3f} ± {error:.3f}  {signal:.3g}")


if __name__ == "__main__":
    main()
