"""The dial turned on people's own grids, of specs or of the records that sample.py wrote: the same
noise, the examples in another order, one of them left out; and other noises."""

from dataclasses import replace

import numpy as np

from vcloze_jax.dial import change_spec, mean_rmse
from vcloze_jax.study import draw
from vcloze_jax.study.page import (
    Chapter,
    Figure,
    Heading,
    TextTable,
    list_records,
    tabulate_records,
)

SAYS = (
    "Each grid painted again from the same noise with other examples: RMSE of its painted cells to "
    "those that they were, in [0, 1]. The last rows are the yardstick: the same grid from other "
    "noises. Where a change moves less than these, it is the noise that decides."
)


def turn_own_dial(lab):
    """Chapter of a Lab: its grids under every change of their examples."""
    blocks, numbers = [SAYS], {}
    for spec in lab.grids:
        spec = replace(spec, upsampling=None)
        changed = {"as it is": spec} | change_spec(spec)
        canvases = lab.painter([*changed.values()], lab.bar)
        targets = dict(zip(changed, (canvas.targets for canvas in canvases), strict=True))
        was = targets["as it is"]
        records = [{"": change, "moved": mean_rmse(now, was)} for change, now in targets.items()]
        sheet = draw.label_columns({change: np.stack(now) for change, now in targets.items()})
        blocks += [
            Heading(f"`{spec.name}`"),
            TextTable(tabulate_records(records)),
            Figure(sheet, ""),
        ]
        numbers[spec.name] = list_records(records)
    return Chapter(blocks, numbers)
