"""The dial: how far a painted grid moves when its examples do, from the same noise; and, as a
yardstick, when its noise does."""

from dataclasses import replace

import numpy as np

from vcloze_jax.grid import Grid
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.painter import initial_noise

SEEDS = 3  # other noises, of the seeds that follow


def measure_moves(painter, canvases, *hooks):
    """What each painted Canvas becomes under every change, painted now: [{change: RMSE}], of its
    first pass, in [0, 1]. `hooks` are a Painter's."""
    changes = [change_spec(replace(canvas.spec, upsampling=None)) for canvas in canvases]
    painted = iter(painter([spec for change in changes for spec in change.values()], *hooks))
    moves = []
    for canvas, change in zip(canvases, changes, strict=True):
        was = canvas.spec.grid.cut(canvas.pixels)
        moved = {what: mean_rmse(next(painted).targets, was) for what in change}
        moves.append({what: round(distance, 4) for what, distance in moved.items()})
    return moves


def mean_rmse(cells, others):
    """Mean RMSE of pairs of cells, uint8 [h, w, 3] each, in [0, 1]."""
    pairs = zip(cells, others, strict=True)
    return float(np.mean([rmse(np.float32(a) / 255, np.float32(b) / 255) for a, b in pairs]))


def change_spec(spec):
    """{what is changed: Spec}. The query's noise is what it was."""
    *examples, query = spec.grid.rows
    kept = {}
    if len(examples) > 1:
        kept["in reverse order"] = examples[::-1]
        for i in range(len(examples)):
            kept[f"without example {i + 1}"] = examples[:i] + examples[i + 1 :]
    if examples:
        kept["without examples"] = []
    noise = initial_noise(spec)
    found = {what: show_only(spec, (*rows, query), noise) for what, rows in kept.items()}
    for step in range(1, SEEDS + 1):
        seed = (spec.seed + step) % 2**32
        found[f"seed {seed}"] = replace(spec, seed=seed, latents=None)
    return found


def show_only(spec, rows, noise):
    """The Spec with these rows, whose prompt counts them; of its noise the end."""
    grid = Grid(rows, spec.grid.columns, spec.grid.first_row)
    before, now = (prompts.layout_prompt(len(g.rows), g.columns) for g in (spec.grid, grid))
    prompt = spec.prompt.replace(before, now)
    return replace(spec, grid=grid, prompt=prompt, latents=noise[-grid.tokens :])
