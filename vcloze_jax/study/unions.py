"""The paper's third finding: tasks united in one grid. Several targets at once, and a chain of two
tasks as one, each against one after another."""

from typing import NamedTuple

from vcloze_jax.data.graph import Task
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, mean_error, to_levels
from vcloze_jax.study.page import Chapter, Figure, TextTable, list_records, tabulate_records


class Union(NamedTuple):
    """A condition and two targets, of which the second can also be made of the first."""

    given: str
    first: str
    second: str


UNIONS = (
    Union("fluent_3d", "gray", "edges"),
    Union("noise", "fluent_3d", "gray"),
    Union("fluent_3d", "fluent_flat", "mask"),
    Union("gray", "fluent_3d", "fluent_flat"),
    Union("low_resolution", "fluent_3d", "edges"),
)
QUICK_UNIONS = 2
SHOWN = 4  # subjects of a sheet
SAYS = (
    "A condition and two targets, with {dialled} examples and no sentence. `at once`: a grid of "
    "three columns whose last two are blank. `alone`: a grid of two columns for each target. "
    "`after the first`: the first target, painted alone, stands as a condition beside the given "
    "one. `of the first`: it stands there alone, so that the second task reads nothing else. RMSE."
)


def unite_tasks(lab):
    """Chapter of a Lab: errors of both targets, in every way to ask for them."""
    asker = Asker(lab)
    records, figures = [], []
    for union in UNIONS[: QUICK_UNIONS if lab.quick else None]:
        painted = paint_union(asker, union)
        errors = {way: asker.error(x, target_of(union, way)) for way, x in painted.items()}
        records.append({"given, first, second": f"`{', '.join(union)}`"} | errors)
        figures.append(show_union(asker, union, painted))
    blocks = [
        SAYS.format(dialled=DIALLED),
        asker.spreads,
        sum_up_unions(records),
        TextTable(tabulate_records(records)),
        *figures,
    ]
    return Chapter(blocks, {"unions": list_records(records)})


def paint_union(asker, union):
    """{way: pictures [noises, N, 64, 64, 3]}; a way begins with the target that it paints."""
    examples = asker.examples(DIALLED)
    both = Task((union.given, union.first), union.second)
    first = asker.paint(Task((union.given,), union.first), examples)
    at_once = asker.paint_blank(both, examples, blank=(1, 2))
    after = asker.paint_blank(both, examples, blank=(2,), given={1: first})[..., 0]
    step = Task((union.first,), union.second)
    of_first = asker.paint_blank(step, examples, blank=(1,), given={0: first})[..., 0]
    return {
        "first, alone": first,
        "first, at once": at_once[..., 0],
        "second, alone": asker.paint(Task((union.given,), union.second), examples),
        "second, at once": at_once[..., 1],
        "second, after the first": after,
        "second, of the first": of_first,
    }


def target_of(union, way):
    """The node that a way paints."""
    return union.first if way.startswith("first") else union.second


def sum_up_unions(records):
    """The means over all unions, in words."""
    ways = list(records[0])[1:]
    means = ", ".join(f"{way}: {mean_error([r[way] for r in records]):.3f}" for way in ways)
    return f"Over all unions: {means}."


def show_union(asker, union, painted):
    """Some subjects of a union: given, both targets in every way, and their truth."""
    columns = {union.given: asker.truth(union.given)}
    columns |= {way: pictures[0] for way, pictures in painted.items()}
    columns |= {f"truth: {node}": asker.truth(node) for node in union[1:]}
    sheet = draw.label_columns({label: to_levels(x[:SHOWN]) for label, x in columns.items()})
    return Figure(sheet, f"`{', '.join(union)}`, the first noise.")
