"""The dial turned on people's own grids, of specs or of the records that sample.py wrote: the same
noise, the examples in another order, one of them left out; and other noises."""

from dataclasses import replace

import numpy as np

from vcloze_jax.grid import Grid
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.painter import initial_noise
from vcloze_jax.study import draw
from vcloze_jax.study.page import (
    Chapter,
    Figure,
    Heading,
    TextTable,
    list_records,
    tabulate_records,
)

SEEDS = 4  # the spec's own, and those that follow it
SAYS = (
    "Each grid painted again from the same noise with other examples: RMSE of its painted cells to "
    "those that they were, in [0, 1]. The last rows are the yardstick: the same grid from other "
    "noises. Where a change moves less than these, it is the noise that decides."
)


def turn_own_dial(lab):
    """Chapter of a Lab: its grids under every change of their examples."""
    blocks, numbers = [SAYS], {}
    for spec in lab.grids:
        changed = change_spec(replace(spec, upsampling=None))
        canvases = lab.painter([*changed.values()], lab.bar)
        targets = dict(zip(changed, (canvas.targets for canvas in canvases), strict=True))
        was = targets["as it is"]
        records = [{"": change, "moved": distance(now, was)} for change, now in targets.items()]
        sheet = draw.label_columns({change: np.stack(now) for change, now in targets.items()})
        blocks += [
            Heading(f"`{spec.name}`"),
            TextTable(tabulate_records(records)),
            Figure(sheet, ""),
        ]
        numbers[spec.name] = list_records(records)
    return Chapter(blocks, numbers)


def distance(cells, others):
    """Mean RMSE of pairs of cells, uint8 [h, w, 3] each."""
    pairs = zip(cells, others, strict=True)
    return float(np.mean([rmse(np.float32(a) / 255, np.float32(b) / 255) for a, b in pairs]))


def change_spec(spec):
    """{what is changed: Spec}, the first as it is. The noise of what stays is what it was."""
    *examples, query = spec.grid.rows
    kept = {"as it is": examples}
    if len(examples) > 1:
        kept["in reverse order"] = examples[::-1]
        for i in range(len(examples)):
            kept[f"without example {i + 1}"] = examples[:i] + examples[i + 1 :]
    if examples:
        kept["without examples"] = []
    noise = initial_noise(spec)
    found = {what: show_only(spec, (*rows, query), noise) for what, rows in kept.items()}
    for step in range(1, SEEDS):
        seed = (spec.seed + step) % 2**32
        found[f"seed {seed}"] = replace(spec, seed=seed, latents=None)
    return found


def show_only(spec, rows, noise):
    """The Spec with these rows, whose prompt counts them; of its noise the end."""
    grid = Grid(rows, spec.grid.columns, spec.grid.first_row)
    before, now = (prompts.layout_prompt(len(g.rows), g.columns) for g in (spec.grid, grid))
    prompt = spec.prompt.replace(before, now)
    return replace(spec, grid=grid, prompt=prompt, latents=noise[-grid.tokens :])
