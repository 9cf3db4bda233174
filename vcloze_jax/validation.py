"""What a run has learnt, on fixed grids that it never sees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.sharding import gathered
from vcloze_jax.step import loss_fn, predict_velocity, purpose_key


class Validation:
    """Groups of held-out examples, encoded once with times and noise that are always the same:
    most of what moves a training loss is drawn times."""

    def __init__(self, trainer, groups):
        self.trainer = trainer
        statics = dict(graphdefs=trainer.graphdefs, dtype=trainer.dtype)
        self.measure = jax.jit(partial(measure_batch, region=trainer.recipe.loss_region, **statics))
        key, size = purpose_key(0, "validation"), trainer.micro
        parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        self.batches = [
            trainer.encode(part, range(i * size, (i + 1) * size), key)
            for i, part in enumerate(parts)
        ]

    def __call__(self):
        """Mean loss, and by how much what is learnt changes the velocities, as a share of their
        size; of an adapter, which is nothing where it begins."""
        trees = self.trainer.learnt, self.trainer.frozen
        with jax.set_mesh(self.trainer.mesh):
            values = [self.measure(*trees, batch) for batch in self.batches]
        loss, effect = np.mean([np.asarray(value) for value in values], 0)
        return float(loss), float(effect)


def measure_batch(trainable, frozen, noisy, *, region, **statics):
    """Both of them, of one batch: float32 [2]."""
    loss, _ = loss_fn(trainable, frozen, noisy, region=region, **statics)
    predict = jax.jit(partial(predict_velocity, **statics))  # traced once for both
    nothing = jax.tree.map(jnp.zeros_like, trainable)
    out, bare = (predict(w, frozen, noisy) for w in (trainable, nothing))
    return gathered(jnp.stack([loss, jnp.linalg.norm(out - bare) / jnp.linalg.norm(out)]))
