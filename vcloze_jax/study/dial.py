"""The dial: how far a picture moves when its examples do, from the same noise; and how often the
noise alone decides whether a picture succeeds."""

import numpy as np

from vcloze_jax.config import MINI
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.questions import truth
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, Spread, parse_tasks, to_levels
from vcloze_jax.study.owndial import turn_own_dial
from vcloze_jax.study.page import (
    Chapter,
    Figure,
    Heading,
    TextTable,
    list_records,
    tabulate_records,
)

TASKS = ("mask->fluent_3d", "gray->fluent_3d", "fluent_3d->mask", "edges->fluent_3d")
QUICK_TASKS, SEEDS, QUICK_SEEDS = 1, 12, 4
SHOWN = 6  # noises of the subject that depends on them most
SAYS = (
    "A question with {dialled} examples and no sentence, asked again from the same noise with "
    "other examples: RMSE to the picture that it was. Another noise is the yardstick."
)
FAILS = (
    "A seed fails where its picture is no nearer to the truth (RMSE) than the mean picture of all "
    "trained subjects, which needs no model. Of the failures of {subjects} subjects from {seeds} "
    "noises each: how many, and how many subjects fail from every noise, from some, from none. "
    "Best and worst are the errors of a subject's luckiest and unluckiest noise, in the mean."
)


def turn_dial(lab):
    """Chapter of a Lab: what every change of the examples does, and what the noise does; of its own
    grids, if it has any."""
    if lab.grids:
        return turn_own_dial(lab)
    asker = Asker(lab)
    tasks = parse_tasks(TASKS, QUICK_TASKS if lab.quick else None)
    changes = [{"task": f"`{task.name}`"} | change_examples(asker, task) for task in tasks]
    asker.noises = QUICK_SEEDS if lab.quick else SEEDS
    seeds, figures = [], []
    for task in tasks:
        pictures = asker.paint(task, asker.examples(DIALLED))
        seeds.append({"task": f"`{task.name}`"} | count_failures(asker, task, pictures))
        figures.append(show_noises(asker, task, pictures))
    columns = [*zip(*tabulate_records(changes), strict=True)]  # a row for each change
    says = dict(subjects=len(asker.subjects), seeds=asker.noises)
    blocks = [
        SAYS.format(dialled=DIALLED),
        Asker(lab).spreads,
        TextTable([list(column) for column in columns]),
        Heading("How often does a seed fail?"),
        FAILS.format(**says),
        TextTable(tabulate_records(seeds)),
        *figures,
    ]
    return Chapter(blocks, {"dial": list_records(changes), "seeds": list_records(seeds)})


def change_examples(asker, task):
    """{what is changed: Spread of the RMSE to the pictures that were}."""
    shown, more = asker.examples(DIALLED), asker.examples(2 * DIALLED)
    was = asker.paint(task, shown)
    now = {
        "examples swapped": asker.paint(task, [e[::-1] for e in shown]),
        "the last replaced": asker.paint(task, [[*e[: DIALLED - 1], e[DIALLED]] for e in more]),
        "all replaced": asker.paint(task, asker.examples(2 * DIALLED, DIALLED)),
        "the first dropped": asker.paint(task, asker.examples(DIALLED, 1)),
        "all dropped": asker.paint(task, asker.examples(0)),
        "one more": asker.paint(task, asker.examples(DIALLED + 1)),
        "the sentence said": asker.paint(task, shown, sentence=True),
        "another noise": np.roll(was, 1, 0),
    }
    return {change: Spread.of(rmse(pictures, was)) for change, pictures in now.items()}


def count_failures(asker, task, pictures):
    """How pictures [noises, N, 64, 64, 3] of a task succeed: shares, and errors."""
    asked = asker.truth(task.target)
    mean = truth(open_tasks("", MINI.recipe), task.target, slice(None)).mean(0)
    errors = rmse(pictures, asked)  # noises N
    fails = errors >= rmse(mean, asked)
    every, some = fails.all(0), fails.any(0) & ~fails.all(0)
    return {
        "error": Spread.of(errors),
        "best": float(errors.min(0).mean()),
        "worst": float(errors.max(0).mean()),
        "seeds that fail": f"{fails.mean():.0%}",
        "subjects: from every noise": int(every.sum()),
        "from some": int(some.sum()),
        "from none": int((~every & ~some).sum()),
    }


def show_noises(asker, task, pictures):
    """The subject whose errors depend on the noise most, from some noises, in order of error."""
    errors = rmse(pictures, asker.truth(task.target))
    worst = int(errors.std(0).argmax())
    order = errors[:, worst].argsort()
    shown = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int)]
    cells = {node: asker.truth(node)[worst] for node in task.conditions}
    cells |= {f"{errors[i, worst]:.2f}": pictures[i, worst] for i in shown}
    cells |= {"truth": asker.truth(task.target)[worst]}
    sheet = draw.label_columns({label: to_levels(x)[None] for label, x in cells.items()})
    caption = f"`{task.name}`, {asker.names[worst]}: the noise decides most here. Error above each."
    return Figure(sheet, caption)
