"""The task graph of GraphEmoji: nodes with their phrases, tasks as paths, and one drawn sample.

A node is a drawn view of a subject or a condition derived from one; a task leads from one to three
nodes to a target, so a row has C = 2, 3 or 4 cells. Rules of sampling: paper, section 3, and
lzyhha/VisualCloze:data/dataset.py. Everything drawn is a function of the generator given.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vcloze_jax.data.conditions import CONDITIONS
from vcloze_jax.data.draws import ROWS, draw_blank, draw_order, draw_rows, draw_sentences
from vcloze_jax.data.sources import Shape
from vcloze_jax.inputs import prompts

SIZE = 64  # pixels of a cell's side

# The drawn views by pack, each with its phrases, of which a prompt says one.
PACKS = {
    "main": {
        "fluent_3d": ("a glossy 3D icon", "a shaded 3D rendering", "a 3D emoji"),
        "fluent_color": ("a softly shaded icon", "an icon with colour gradients"),
        "fluent_flat": ("a flat colour icon", "a flat drawing without shading", "a flat emoji"),
        "fluent_high_contrast": ("a black and white icon", "a high contrast pictogram"),
        "noto": ("a Noto style emoji", "an emoji in the Noto style"),
        "twemoji": ("a Twemoji style emoji", "an emoji in the Twemoji style"),
    },
    "openmoji": {
        "openmoji": ("an outlined colour emoji", "a colour drawing with black outlines"),
        "openmoji_line": ("thin line art", "a black line drawing"),
    },
}
VIEWS = (*PACKS["main"], *PACKS["openmoji"])
NODE_PHRASES = PACKS["main"] | PACKS["openmoji"]
NODE_PHRASES |= {name: tuple(phrases) for name, (_, *phrases) in CONDITIONS.items()}
NODES = tuple(NODE_PHRASES)


@dataclass(frozen=True)
class Task:
    """`conditions` -> `target`, all names of nodes."""

    conditions: tuple[str, ...]
    target: str

    @property
    def columns(self):
        return len(self.conditions) + 1

    @property
    def name(self):
        return f"{'+'.join(self.conditions)}->{self.target}"

    @property
    def spelling(self):
        """The name as a shell takes it, where > would name a file."""
        return f"{'-and-'.join(self.conditions)}-to-{self.target}"


def parse_task(name):
    """'edges-and-palette-to-fluent_3d', or 'edges+palette->fluent_3d' -> Task. Raises ValueError
    that names an unknown node."""
    conditions, arrow, target = name.replace("-and-", "+").replace("-to-", "->").partition("->")
    nodes = (*conditions.split("+"), target)
    unknown = [node for node in nodes if node not in NODES]
    if not arrow or unknown or not 2 <= len(nodes) <= 4:
        raise ValueError(
            f"{name}: not CONDITION[-and-CONDITION…]-to-TARGET, with nodes of {', '.join(NODES)}"
        )
    return Task(nodes[:-1], target)


def _tasks(*names):
    return tuple(parse_task(name) for name in names)


def _pairs(sources, targets):
    return tuple(Task((a,), b) for a in sources for b in targets if a != b)


ALIGNED = ("fluent_3d", "fluent_flat", "edges", "gray", "mask", "blur")
# Of those, the nodes that nearly show each other. They teach a model to look at its neighbours, so
# they come first: all aligned pairs at once teach it, for thousands of steps, each node's mean.
NEAR = ("fluent_3d", "fluent_flat", "gray", "blur")
REDRAWN = ("noto", "twemoji", "openmoji", "openmoji_line")

# Never trained. The pairs lead between nodes that training does use, each in other tasks.
HELD_OUT_TASKS = _tasks(
    "noto->openmoji_line",
    "fluent_flat->edges",
    "gray->fluent_flat",
    "mask->edges",
    "fluent_high_contrast->fluent_3d",
)
HELD_OUT_COMPOSITIONS = _tasks(
    "mask+blur->fluent_3d",
    "edges+blur->fluent_flat",
    "edges+gray->fluent_3d",
)

# Groups with their share of the draws, held-out tasks counted; in one every task is as likely.
# Pixel-aligned nodes come first and most: they are what a small model learns to follow.
GROUPS = (
    (0.33, _pairs(NEAR, NEAR)),
    (0.37, tuple(task for task in _pairs(ALIGNED, ALIGNED) if task not in _pairs(NEAR, NEAR))),
    (0.03, _pairs(("fluent_3d",), ("distance", "palette", "low_resolution"))),
    (0.05, _pairs(("low_resolution", "noise", "hole", "palette", "distance"), ("fluent_3d",))),
    (0.02, _pairs(("fluent_3d", "fluent_flat"), ("fluent_color", "fluent_high_contrast"))),
    (0.02, _pairs(("fluent_color", "fluent_high_contrast"), ("fluent_3d", "fluent_flat"))),
    (0.08, _pairs(("fluent_3d", *REDRAWN), ("fluent_3d", *REDRAWN))),
    (
        0.1,
        _tasks(
            "edges+blur->fluent_3d",
            "mask+gray->fluent_3d",
            "edges+palette->fluent_3d",
            "mask+gray->fluent_flat",
            "fluent_flat+edges->fluent_3d",
            "edges+mask+blur->fluent_3d",
        ),
    ),
)
TRAIN = {
    task: share / len(tasks)
    for share, tasks in GROUPS
    for task in tasks
    if task not in HELD_OUT_TASKS + HELD_OUT_COMPOSITIONS
}


class Sample(NamedTuple):
    """One drawn grid, before any picture: who stands where, and what is blank."""

    nodes: list[list[str]]  # [R][C]
    subjects: np.ndarray  # int [R] or [R, C]
    mask: np.ndarray  # bool [R, C, size, size]; True is generated
    prompt: str


def draw_task(rng, columns=None, tasks=TRAIN):
    """One of `tasks` (a table of weights) among those of `columns` columns, or of any."""
    fitting = [task for task in tasks if columns in (None, task.columns)]
    weights = np.array([tasks[task] for task in fitting])
    return fitting[rng.choice(len(fitting), p=weights / weights.sum())]


def list_shapes(tasks):
    """All that `draw_shape` may draw."""
    widths = sorted({task.columns for task in tasks})
    return tuple(Shape(rows, columns, SIZE, SIZE) for rows in ROWS for columns in widths)


def draw_shape(rng, tasks=TRAIN):
    """The shape of a group: the columns are those of a drawn task.

    Each element then draws a task of that width, so that over many batches every task keeps its
    share.
    """
    return Shape(draw_rows(rng), draw_task(rng, tasks=tasks).columns, SIZE, SIZE)


def draw_sample(rng, shape, names, query, recipe, tasks=TRAIN):
    """One grid of a Shape, of the task graph over the subjects called `names`; that of the last row
    has the number `query`.

    Draws task, the other subjects, the order of the conditions (the same in all rows), the
    sentences and the mask, as the Recipe says.
    """
    task = draw_task(rng, shape.columns, tasks)
    order = draw_order(rng, task.columns, recipe)
    nodes = [(*task.conditions, task.target)[i] for i in order]
    subjects = draw_subjects(rng, len(names), shape.rows, query)
    content = names[query] if task.target in VIEWS else ""
    phrases = [draw_phrase(rng, node) for node in nodes]
    prompt = draw_sentences(rng, recipe, shape[:2], phrases, content)
    mask = np.zeros((shape.rows, shape.columns, shape.height, shape.width), bool)
    mask[-1] = draw_mask(rng, nodes, shape.height, recipe, tasks)
    return Sample([nodes] * shape.rows, subjects, mask, prompt)


def draw_subjects(rng, count, size, query):
    """Different numbers below `count`, the last one `query`: int [size]."""
    others = rng.choice(count - 1, size - 1, replace=False)
    return np.append(others + (others >= query), query)


def ask_last(nodes, subjects, names, of_task=True):
    """The grid of these cells whose last one is blank, with all text, that of the task if asked."""
    mask = np.zeros((len(nodes), len(nodes[0]), 1, 1), bool)
    mask[-1, -1] = True
    layout = prompts.layout_prompt(len(nodes), len(nodes[0]))
    task = prompts.task_prompt([NODE_PHRASES[node][0] for node in nodes[-1]]) if of_task else ""
    content = prompts.content_sentence(names[np.ravel(subjects)[-1]])
    return Sample(nodes, np.asarray(subjects), mask, prompts.join(layout, task, content))


def draw_mask(rng, nodes, size, recipe, tasks=TRAIN):
    """What is blank in the query row: bool [C, size, size].

    One cell, as `draw_blank` has it. Mini's additions: with p 0.1 two cells or more, with p 0.1 a
    random part of the cell. What would show a held-out task is not drawn, the last cell is instead;
    the Recipe's `reverse_held_out` draws it all the same (the paper's rule).
    """
    columns, kind = len(nodes), rng.random()
    blank = np.zeros(columns, bool)
    if kind < 0.1:
        blank[rng.choice(columns, rng.integers(2, columns + 1), replace=False)] = True
    else:
        blank[draw_blank(rng, columns, recipe)] = True
    if not recipe.reverse_held_out and asks_held_out(nodes, blank, tasks):
        blank = np.arange(columns) == columns - 1
    mask = np.zeros((columns, size, size), bool)
    mask[blank] = draw_part(rng, size) if 0.1 <= kind < 0.2 else True
    return mask


def asks_held_out(nodes, blank, tasks):
    """Whether cells of these nodes, some of them blank, ask for a task that is held out: lead from
    its conditions to its target, in whatever columns. Those of `tasks` are not held out."""
    given = {node for node, hidden in zip(nodes, blank, strict=True) if not hidden}
    held_out = {*HELD_OUT_TASKS, *HELD_OUT_COMPOSITIONS} - {*tasks}
    return any(given == {*task.conditions} and task.target in {*nodes} - given for task in held_out)


def draw_part(rng, size):
    """A rectangle or half plane of a cell, at least a tenth of it: bool [size, size]."""
    y, x = np.mgrid[:size, :size] / size
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        return (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) > rng.uniform(-0.25, 0.25)
    h, w = rng.uniform(0.35, 0.9, 2)
    top, left = rng.uniform(0, 1 - h), rng.uniform(0, 1 - w)
    return (y >= top) & (y < top + h) & (x >= left) & (x < left + w)


def draw_phrase(rng, node):
    return NODE_PHRASES[node][rng.integers(len(NODE_PHRASES[node]))]


# Rows and columns of the infilling base's grids, with their share; 1 x 1 is a single picture.
FILL_SHAPES = {(1, 1): 0.05, (2, 2): 0.65, (3, 2): 0.3}
FILL_KINDS = {"repeats": 0.3, "sheet": 0.65, "unrelated": 0.05}
# A sheet has no direction, so no pair of it is held out either way round.
SHEETS = {
    task: 1.0
    for task in _pairs(NEAR, NEAR)
    if not {task, Task((task.target,), task.conditions[0])} & {*HELD_OUT_TASKS}
}


def draw_fill_shape(rng):
    """The shape of a group of the infilling base."""
    shapes = list(FILL_SHAPES)
    return Shape(*shapes[rng.choice(len(shapes), p=list(FILL_SHAPES.values()))], SIZE, SIZE)


def draw_fill(rng, shape, names, query, recipe):
    """One grid with random holes: what mini's base, its FLUX-Fill, learns from.

    The web is full of repeated pictures and of sheets that draw a few subjects in a few manners:
    here rows that repeat one picture, rows of one subject in two nodes, and unrelated pictures.
    Any cell may be blank, whole or in part, but one of a row at most, so that there is something
    to go by; the text tells what the last cell shows, and never names a task.
    """
    kind = list(FILL_KINDS)[rng.choice(len(FILL_KINDS), p=list(FILL_KINDS.values()))]
    rows, columns, size, _ = shape
    nodes = rng.choice(ALIGNED, (rows, columns))
    subjects = draw_subjects(rng, len(names), rows * columns, query).reshape(rows, columns)
    if kind != "unrelated":
        nodes, subjects = (np.repeat(x[:, -1:], columns, 1) for x in (nodes, subjects))
    if kind == "sheet" and columns > 1:
        task = draw_task(rng, columns, SHEETS)
        nodes[:] = rng.permutation((*task.conditions, task.target))
    mask = np.zeros((rows, columns, size, size), bool)
    blank = rng.random(rows) < 0.6
    blank[rng.integers(rows)] = True
    for row in np.flatnonzero(blank):
        mask[row, rng.integers(columns)] = draw_part(rng, size) if rng.random() < 0.15 else True
    content = f"{draw_phrase(rng, nodes[-1, -1])}, {names[subjects[-1, -1]]}"
    prompt = draw_sentences(rng, replace(recipe, content_sentence=1.0), shape[:2], "", content)
    return Sample(nodes.tolist(), subjects, mask, prompt)
