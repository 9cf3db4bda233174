"""The paper's second finding, tasks that were never trained; and where the limit is: seen and
unseen tasks, each of seen and unseen kinds of pictures."""

import numpy as np

from vcloze_jax.data import graph
from vcloze_jax.evaluate import reconstruct
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.questions import pose_question
from vcloze_jax.study import draw
from vcloze_jax.study.asker import (
    DIALLED,
    Asker,
    Spread,
    mean_error,
    name_count,
    parse_tasks,
    to_levels,
)
from vcloze_jax.study.page import (
    Chapter,
    Figure,
    Heading,
    TextTable,
    list_records,
    tabulate_records,
)
from vcloze_jax.study.photographs import read_photographs

KINDS = {
    "trained": ("fluent_3d->gray", "fluent_3d->edges", "blur->fluent_3d", "gray->fluent_3d"),
    "held out": tuple(task.name for task in graph.HELD_OUT_TASKS),
    "composition": tuple(task.name for task in graph.HELD_OUT_COMPOSITIONS),
}
QUICK_TASKS = 1  # of each kind
# Tasks that can be asked of a photograph; each unseen one has the target of the seen one beside it.
SEEN = ("fluent_3d->gray", "fluent_3d->edges", "fluent_3d->blur", "blur->fluent_3d")
UNSEEN = ("palette->gray", "low_resolution->edges", "noise->blur", "edges+gray->fluent_3d")
QUICK_SQUARE = 1  # of those
SHOWN = 3  # subjects of a sheet
SAYS = (
    "RMSE with 0, 1 and 2 examples and no sentence. Beside it what needs no model: the best "
    "condition, left as it is. A composition's conditions were each trained, never together."
)
SQUARE = (
    "The same tasks asked of held-out emoji and of photographs ({source}), whose examples are "
    "photographs, too; a photograph stands where the 3D view stands. Seen tasks are {seen}; unseen "
    "ones, which have the same targets, {unseen}. RMSE with {dialled} examples, in the mean over "
    "the tasks; and how it compares with the best condition left as it is, and with the truth "
    "through the autoencoder, which no painter can beat by much."
)


def measure_unseen(lab):
    """Chapter of a Lab: unseen tasks by number of examples; the square of tasks and pictures."""
    asker, most = Asker(lab), QUICK_TASKS if lab.quick else None
    records = [
        measure_counts(asker, kind, task)
        for kind, names in KINDS.items()
        for task in parse_tasks(names, most)
    ]
    said, squares, figures = measure_square(lab)
    blocks = [
        SAYS,
        asker.spreads,
        sum_up_kinds(records),
        TextTable(tabulate_records(records)),
        Heading("Tasks and pictures"),
        said,
        TextTable(tabulate_records(squares)),
        *figures,
    ]
    return Chapter(blocks, {"unseen": list_records(records), "square": list_records(squares)})


def measure_square(lab):
    """Seen and unseen tasks of emoji and of photographs: what is said of it, a record and a figure
    for each of the four."""
    most = QUICK_SQUARE if lab.quick else None
    squares = []
    figures = []
    sources = {"emoji": lab.source, "photographs": read_photographs(lab.photographs)}
    for pictures, source in sources.items():
        asker = Asker(lab, source)
        for kind, names in (("seen", SEEN), ("unseen", UNSEEN)):
            tasks = parse_tasks(names, most)
            painted = {task: asker.paint(task, asker.examples(DIALLED)) for task in tasks}
            place = {"pictures": pictures, "tasks": kind}
            squares.append(place | compare_square(asker, painted))
            figures.append(show_square(asker, painted, f"{kind} tasks of {pictures}"))
    source = "of your folder" if lab.photographs else "that scikit-image ships, in parts"
    told = dict(seen=name_tasks(SEEN[:most]), unseen=name_tasks(UNSEEN[:most]))
    return SQUARE.format(source=source, dialled=DIALLED, **told), squares, figures


def measure_counts(asker, kind, task):
    """A record of one task: its errors by number of examples, and that of copying."""
    counts = range(DIALLED + 1)
    errors = {
        name_count(n): asker.error(asker.paint(task, asker.examples(n)), task.target)
        for n in counts
    }
    copied = float(rmse(asker.nearest_given(task), asker.truth(task.target)).mean())
    return {"": kind, "task": f"`{task.name}`"} | errors | {"copy": copied}


def sum_up_kinds(records):
    """How far examples take the error, by kind of task, in words."""
    lines = []
    for kind in KINDS:
        of_kind = [record for record in records if record[""] == kind]
        zero, two = (mean_error([r[name_count(n)] for r in of_kind]) for n in (0, DIALLED))
        better = sum(r[name_count(DIALLED)].mean < r["copy"] for r in of_kind)
        beats = f"better than copying on {better} of {len(of_kind)}"
        lines.append(f"{kind}, {zero:.3f} to {two:.3f}, {beats}")
    return f"Mean errors without and with {DIALLED} examples: {'; '.join(lines)}."


def compare_square(asker, painted):
    """What was painted of some tasks, {task: [noises, N, 64, 64, 3]}, beside what needs no model:
    a record of means over the tasks."""
    errors, copied, floor = [], [], []
    for task, pictures in painted.items():
        asked = asker.truth(task.target)
        errors.append(rmse(pictures, asked))
        copied.append(rmse(asker.nearest_given(task), asked))
        floor.append(rmse(encode_and_decode(asker, task), asked))
    found = Spread.of(np.mean(errors, 0))
    copy, least = float(np.mean(copied)), float(np.mean(floor))
    ratio = f"{found.mean / copy:.2f}"
    return {"error": found, "copy": copy, "error / copy": ratio, "autoencoder": least}


def encode_and_decode(asker, task):
    """The truth of a task as the autoencoder gives it back: float32 [N, 64, 64, 3]."""
    grids = [pose_question(asker.source, task, task, (), s)[0] for s in asker.subjects]
    rows = reconstruct(asker.lab.painter, [grid.query.pixels for grid in grids])
    cells = [grid.split(row)[-1] for grid, row in zip(grids, rows, strict=True)]
    return np.stack(cells).astype(np.float32) / 255


def show_square(asker, painted, title):
    """Some subjects of one quarter, a group of columns for each task."""
    columns = {}
    for number, (task, pictures) in enumerate(painted.items(), 1):
        given = {f"{number} {node}": asker.truth(node) for node in task.conditions}
        painting = {f"{number} painted": pictures[0], f"{number} truth": asker.truth(task.target)}
        columns |= {label: to_levels(x[:SHOWN]) for label, x in (given | painting).items()}
    return Figure(draw.label_columns(columns), f"{title.capitalize()}; the tasks are numbered.")


def name_tasks(names):
    """Their names as code."""
    return ", ".join(f"`{name}`" for name in names)
