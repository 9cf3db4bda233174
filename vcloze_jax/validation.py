"""What a run has learnt, on fixed grids that it never sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.sharding import gathered
from vcloze_jax.step import losses_by_region, predict_velocity, purpose_key


class Validation:
    """Groups of held-out examples, encoded once with times and noise that are always the same:
    most of what moves a training loss is drawn times."""

    def __init__(self, trainer, groups):
        self.trainer, recipe = trainer, trainer.recipe
        statics = dict(graphdefs=trainer.graphdefs, dtype=trainer.dtype)
        self.predict = jax.jit(partial(predict_velocity, **statics))
        self.measure = jax.jit(partial(measure_velocity, region=recipe.loss_region))
        key, size = purpose_key(0, "validation"), trainer.micro
        parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        self.batches = [
            trainer.encode(part, range(i * size, (i + 1) * size), key)
            for i, part in enumerate(parts)
        ]
        self.bare = [0.0] * len(parts)  # velocities where nothing is learnt: of no weights, none
        if recipe.rank:
            self.bare = self.velocities(jax.tree.map(jnp.zeros_like, trainer.learnt))

    def velocities(self, trainable):
        """What the MMDiT says of each batch."""
        with jax.set_mesh(self.trainer.mesh):
            return [self.predict(trainable, self.trainer.frozen, batch) for batch in self.batches]

    def __call__(self):
        """Mean loss, and by how much what is learnt changes the velocities, as a share of their
        size; of an adapter, which is nothing where it begins."""
        velocities = self.velocities(self.trainer.learnt)
        with jax.set_mesh(self.trainer.mesh):
            values = list(map(self.measure, velocities, self.bare, self.batches))
        loss, effect = np.mean([np.asarray(value) for value in values], 0)
        return float(loss), float(effect)


def measure_velocity(out, bare, noisy, *, region):
    """Both of them, of one batch's velocities: float32 [2]."""
    loss = losses_by_region(out, noisy)[region].mean()
    return gathered(jnp.stack([loss, jnp.linalg.norm(out - bare) / jnp.linalg.norm(out)]))
