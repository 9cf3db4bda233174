"""The paper's fifth finding: a model that learned to fill any cell of a row also goes back, from
the target to its conditions."""

from vcloze_jax.data.graph import HELD_OUT_TASKS, TRAIN, Task
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.study import draw
from vcloze_jax.study.asker import (
    DIALLED,
    Asker,
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

TASKS = (
    "mask->fluent_3d",
    "edges->fluent_flat",
    "gray->fluent_3d",
    "fluent_flat->gray",
    "edges->mask",
    "edges->fluent_3d",
)
SEVERAL = "edges+mask+blur->fluent_3d"  # all of whose conditions are asked at once
QUICK_TASKS = 1
SHOWN = 4  # subjects of a sheet
SAYS = (
    "The grid of a task as it was trained, but in the last row the target is given and its "
    "condition, in the first column, is blank; no sentence. Beside it the way back as a task of "
    "its own, its condition first, which was trained, too, or is held out: then no grid of "
    "training asked for it in any column. RMSE to the truth of the condition; copy is the target, "
    "left as it is."
)


def turn_round(lab):
    """Chapter of a Lab: errors of conditions that are asked of their target."""
    asker = Asker(lab)
    records, figures = [], []
    for task in parse_tasks(TASKS, QUICK_TASKS if lab.quick else None):
        record, painted = go_back(asker, task)
        records.append(record)
        figures.append(show_way_back(asker, task, {task.conditions[0]: painted}))
    several = parse_tasks([SEVERAL])[0]
    given = tuple(range(len(several.conditions)))
    cells = asker.paint_blank(several, asker.examples(DIALLED), given)
    together = {node: cells[..., i] for i, node in enumerate(several.conditions)}
    alone = [ask_forth(asker, node, several.target) for node in several.conditions]
    at_once = [
        {"asked": f"`{node}`", "all at once": asker.error(x, node), "as a task of its own": error}
        for (node, x), error in zip(together.items(), alone, strict=True)
    ]
    blocks = [
        SAYS,
        asker.spreads,
        sum_up_ways(records),
        TextTable(tabulate_records(records)),
        *figures,
        Heading(f"All conditions of `{several.target}` at once"),
        TextTable(tabulate_records(at_once)),
        show_way_back(asker, several, together),
    ]
    return Chapter(blocks, {"reverse": list_records(records), "at once": list_records(at_once)})


def go_back(asker, task):
    """A record of one task of one condition, and what was painted with most examples."""
    (asked,), given = task.conditions, task.target
    back = Task((given,), asked)
    known = "held out" if back in HELD_OUT_TASKS else "trained" if back in TRAIN else "neither"
    record = {"trained": f"`{task.name}`", "the way back": known}
    for count in range(DIALLED + 1):
        painted = asker.paint_blank(task, asker.examples(count), (0,))[..., 0]
        record[name_count(count)] = asker.error(painted, asked)
    record["as a task of its own"] = ask_forth(asker, asked, given)
    copied = rmse(asker.truth(given), asker.truth(asked))
    return record | {"copy": float(copied.mean())}, painted


def ask_forth(asker, asked, given):
    """The error of a node as the target of another one."""
    return asker.error(asker.paint(Task((given,), asked), asker.examples(DIALLED)), asked)


def sum_up_ways(records):
    """The means by what the way back is, in words."""
    lines = []
    for known in dict.fromkeys(record["the way back"] for record in records):
        names = name_count(DIALLED), "as a task of its own"
        of_kind = [record for record in records if record["the way back"] == known]
        back, own = (mean_error([record[name] for record in of_kind]) for name in names)
        lines.append(f"{known}: {back:.3f} backwards, {own:.3f} as a task of its own")
    return f"Mean errors with {DIALLED} examples where the way back is {'; '.join(lines)}."


def show_way_back(asker, task, painted):
    """Some subjects: the target, and each condition as painted and in truth."""
    columns = {task.target: asker.truth(task.target)}
    for node, pictures in painted.items():
        columns |= {f"{node}, painted": pictures[0], f"{node}, truth": asker.truth(node)}
    sheet = draw.label_columns({label: to_levels(x[:SHOWN]) for label, x in columns.items()})
    return Figure(sheet, f"`{task.name}`, backwards, the first noise.")
