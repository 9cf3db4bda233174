"""One question on its way to a picture, with all that it was at every step; and what a station of
the walk tells of it."""

from typing import NamedTuple

import numpy as np

from vcloze_jax.conditioning import Context
from vcloze_jax.data import graph
from vcloze_jax.grid import Grid, Row, Spec, bucket
from vcloze_jax.painter import Canvas, initial_noise
from vcloze_jax.questions import choose_examples, pose_question, truth

TASK = graph.parse_task("fluent_flat->fluent_3d")
SUBJECT, EXAMPLES, SEED = 68, 2, 0  # a rocket


class Journey(NamedTuple):
    """What a grid became on its way."""

    painter: object
    truth: np.ndarray  # uint8 [h, w, 3], of the asked cell
    spec: Spec
    canvas: Canvas
    states: np.ndarray  # float32 [N + 1, S, 64], latents from noise to picture
    context: Context  # a batch of one, padded to the bucket

    @property
    def velocities(self):
        """What the model said at each step, read off from where it led: float32 [N, S, 64]."""
        return np.diff(self.states, axis=0) / np.diff(self.canvas.times)[:, None, None]

    @property
    def expected(self):
        """At each step the picture if the velocity stayed as it is, x - t v: float32 [N, S, 64]."""
        return self.states[:-1] - self.canvas.times[:-1, None, None] * self.velocities

    def decode(self, latents):
        """Latents [S, 64] -> the query row, uint8 [h, C*w, 3]."""
        return self.painter.decode(self.spec.grid, latents)


class Station(NamedTuple):
    """One stage of the way."""

    title: str
    text: str
    functions: tuple  # that do it
    things: dict  # name: an array that goes through
    figures: list


def travel(lab):
    """Paint the question of the walk, and keep what it was at every step."""
    examples = choose_examples(lab.source, SUBJECT, EXAMPLES)
    grid, prompt = pose_question(lab.source, TASK, TASK, examples, SUBJECT, sentence=True)
    row = grid.query  # the truth goes no further than here
    blank = Row(np.where(row.mask[..., None], np.uint8(0), row.pixels), row.mask)
    grid = Grid((*grid.rows[:-1], blank), grid.columns)
    spec = Spec(grid, prompt, lab.steps, lab.painter.preset.guidance_scale, SEED)
    states = [initial_noise(spec)]

    def watch(canvases, i, before, latents):
        states.append(latents[0][: grid.tokens])

    (canvas,) = lab.painter([spec], lab.bar, watch)
    *_, context = lab.painter.stack([canvas], bucket(grid.tokens, lab.painter.preset.resolution))
    asked = np.rint(truth(lab.source, TASK.target, [SUBJECT])[0] * 255).astype(np.uint8)
    return Journey(lab.painter, asked, spec, canvas, np.stack(states), context)
