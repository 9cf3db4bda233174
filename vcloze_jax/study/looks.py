"""Where the tokens that are painted look: to which example, to its condition or its target, to the
query, to the text; by block and by step. And whether that tells which demonstration is followed."""

import csv
import io
from typing import NamedTuple

import numpy as np

from vcloze_jax.grid import Grid
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.inputs.sheet import stack_sheets
from vcloze_jax.questions import pose_question
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, Spread, parse_tasks, specify
from vcloze_jax.study.attention import TARGET_OF, paint_and_look, segment_masses, segment_tokens
from vcloze_jax.study.page import (
    Chapter,
    Figure,
    Heading,
    TextTable,
    list_records,
    tabulate_records,
)

TASKS = ("fluent_3d->mask", "gray->fluent_3d", "edges->fluent_3d")
QUICK_TASKS = 1
# Demonstrations that contradict each other: the same condition, two targets.
QUARRELS = (
    ("fluent_3d->mask", "fluent_3d->gray"),
    ("edges->fluent_3d", "edges->mask"),
    ("fluent_3d->edges", "fluent_3d->fluent_flat"),
)
QUICK_QUARRELS = 1
COLOURS = ("#888888", "#f4a582", "#b2182b", "#92c5de", "#2166ac", "#228833", "#dddddd")
SAYS = (
    "What the tokens of the asked cell attend to, in the mean over its tokens, heads, blocks and "
    "steps, with {dialled} examples and no sentence: shares of one. `of all tokens` is what each "
    "would get if they looked everywhere alike."
)
QUARREL = (
    "Two examples that contradict each other: the first shows one task, the second another, in "
    "both orders, and nothing else says which is asked. Followed is the one to whose truth the "
    "painted cell is nearer (RMSE). Does attention tell? AUC is the chance that of two grids the "
    "one that followed its second example looked more at that example's target, less at the first "
    "one's: 0.5 tells nothing, 1 all. One block (its number, of {blocks}) is chosen by half of the "
    "subjects and measured on the others."
)


HEAT = (
    "A grid with its truth ({name}), and how much the tokens of the last cell look at each token, "
    "in the mean over blocks and steps: the square root, so that little is seen, too."
)


class Looked(NamedTuple):
    """Where the target's tokens of some grids looked, and what was painted."""

    specs: list
    painted: np.ndarray  # float32 [noises, N, 64, 64, 3]
    times: np.ndarray  # float32 [steps]
    names: list[str]  # of segments
    heat: np.ndarray  # float32 [steps, blocks, grids, T + S]
    masses: np.ndarray  # float32 [steps, blocks, grids, segments]


def look_around(lab):
    """Chapter of a Lab: masses by segment, block and step; contradicting examples."""
    asker = Asker(lab)
    tasks = parse_tasks(TASKS, QUICK_TASKS if lab.quick else None)
    looked = {task.name: look_at(asker, [task] * DIALLED, task) for task in tasks}
    records = [count_tokens(lab, next(iter(looked.values())))]
    records += [{"task": f"`{name}`"} | spread_masses(asker, x) for name, x in looked.items()]
    pairs = QUARRELS[: QUICK_QUARRELS if lab.quick else None]
    quarrels = [settle(asker, *parse_tasks(pair)) for pair in pairs]
    blocks = len(next(iter(looked.values())).masses[0])
    text = [
        SAYS.format(dialled=DIALLED),
        asker.spreads,
        TextTable(tabulate_records(records)),
        *(block for name, x in looked.items() for block in show_looks(asker, name, x)),
        Heading("Which demonstration is followed?"),
        QUARREL.format(blocks=blocks),
        TextTable(tabulate_records(quarrels)),
    ]
    lines = [line for name, x in looked.items() for line in list_masses(name, x)]
    numbers = {"looks": list_records(records), "quarrels": list_records(quarrels)}
    return Chapter(text, numbers, {"looks.csv": write_csv(lines)})


def look_at(asker, shown, task):
    """Ask a task of every subject from every noise, its examples showing tasks of the same
    conditions, one each -> Looked."""
    specs, painter = pose_all(asker, shown, task), asker.lab.painter
    canvases, heat = paint_and_look(painter, specs, asker.lab.bar)
    names, segments = segment_tokens(specs[0].grid, painter.preset.t5.max_length)
    painted = np.stack([canvas.targets[-1] for canvas in canvases]).astype(np.float32) / 255
    painted = painted.reshape(asker.noises, len(asker.subjects), *painted.shape[1:])
    masses, times = segment_masses(heat, segments), canvases[0].times[:-1]
    return Looked(specs, painted, times, names, heat, masses)


def pose_all(asker, shown, task):
    """Specs of a task for every noise and subject, whose examples show tasks of the same
    conditions, one each."""
    specs = []
    for seed in range(asker.noises * len(asker.subjects)):
        number = seed % len(asker.subjects)
        examples = asker.examples(len(shown))[number]
        subject = asker.subjects[number]
        grids = [pose_question(asker.source, task, s, examples, subject) for s in [*shown, task]]
        rows = [grid.rows[i] for i, (grid, _) in enumerate(grids)]
        specs.append(specify(asker.lab, Grid(tuple(rows), task.columns), grids[-1][1], seed))
    return specs


def count_tokens(lab, looked):
    """A record of the segments' shares of all tokens."""
    _, segments = segment_tokens(looked.specs[0].grid, lab.painter.preset.t5.max_length)
    shares = (np.bincount(segments) / len(segments)).tolist()
    return {"task": "of all tokens"} | dict(zip(looked.names, shares, strict=True))


def spread_masses(asker, looked):
    """{segment: Spread} of its mass in the mean over blocks and steps."""
    each = looked.masses.mean((0, 1)).reshape(asker.noises, len(asker.subjects), -1)
    return {name: Spread.of(each[..., i]) for i, name in enumerate(looked.names)}


def settle(asker, one, other):
    """A record of two demonstrations: which is followed, and whether attention tells."""
    follows, looks = [], []
    for shown in ((one, other), (other, one)):
        looked = look_at(asker, shown, shown[-1])
        first, second = (rmse(looked.painted, asker.truth(task.target)) for task in shown)
        follows.append((second < first).ravel())
        columns = [looked.names.index(TARGET_OF.format(number)) for number in (1, DIALLED)]
        looks.append(looked.masses[..., columns[1]] - looked.masses[..., columns[0]])
    follows, looks = np.concatenate(follows), np.concatenate(looks, -1)  # steps blocks grids
    early = looks[: max(len(looks) // 3, 1)].mean((0, 1))
    by_block = looks.mean(0)
    half = slice(0, None, 2)  # of subjects
    rest = slice(1, None, 2)
    chosen = np.argmax([measure_auc(x[half], follows[half]) for x in by_block])
    return {
        "one, other": f"`{one.name}`, `{other.name}`",
        "grids": len(follows),
        "second followed": f"{follows.mean():.0%}",
        "looked at the second more": f"{(looks.mean((0, 1)) > 0).mean():.0%}",
        "AUC": measure_auc(looks.mean((0, 1)), follows),
        "of the first third of the steps": measure_auc(early, follows),
        "of one block": f"{measure_auc(by_block[chosen][rest], follows[rest]):.3f} ({chosen})",
    }


def measure_auc(values, truths):
    """The chance that a value whose truth holds is above one whose truth does not, ties by half;
    0.5 where all truths are one."""
    if truths.all() or not truths.any():
        return 0.5
    above = np.sign(values[truths][:, None] - values[~truths])
    return float((1 + above.mean()) / 2)


def list_masses(task, looked):
    """A line of the CSV for each step, block and segment."""
    mean, deviation = looked.masses.mean(2), looked.masses.std(2)  # steps blocks segments
    lines = []
    for step, block, i in np.ndindex(mean.shape):
        place = [task, step, f"{looked.times[step]:.4f}", block, looked.names[i]]
        lines.append([*place, f"{mean[step, block, i]:.6f}", f"{deviation[step, block, i]:.6f}"])
    return lines


def write_csv(lines):
    """Lines below their header."""
    text = io.StringIO()
    header = "task", "step", "t", "block", "segment", "mass", "deviation over grids"
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()


def show_looks(asker, name, looked):
    """Curves and bars of a task, and the heat over the grid of the second subject."""
    heat = looked.heat[:, :, 1, -looked.specs[1].grid.tokens :].mean((0, 1))
    picture = draw_heat(looked.specs[1].grid, heat)
    return [
        Heading(f"`{name}`"),
        Figure(draw_masses(looked), "By time, and by block, double ones first."),
        Figure(picture, HEAT.format(name=asker.names[1]), 2),
    ]


def draw_masses(looked):
    """Masses stacked up, by time and by block."""
    masses, times = looked.masses, looked.times
    figure, panels = draw.new_figure(panels=2)
    by_step, by_block = masses.mean((1, 2)).T, masses.mean((0, 2)).T
    panels[0].stackplot(times, by_step, colors=COLOURS, labels=looked.names)
    panels[0].set(xlabel="t", ylabel="share of the attention", xlim=(times[0], times[-1]))
    floor = np.zeros(by_block.shape[1])
    for colour, values in zip(COLOURS, by_block, strict=False):
        panels[1].bar(range(len(values)), values, bottom=floor, color=colour)
        floor = floor + values
    panels[1].set(xlabel="block")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right")
    return draw.render_figure(figure)


def draw_heat(grid, heat):
    """A grid, and beside it how much every token is looked at, [S]."""
    cells = stack_sheets([row.pixels for row in grid.rows])
    return draw.tile([cells, draw.map_tokens(grid, np.sqrt(heat), name="inferno")], 2)
