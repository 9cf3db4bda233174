"""What evaluation and study ask of GraphEmoji's subjects: a question is a grid whose last cell is
blank, and a prompt."""

import numpy as np

from vcloze_jax.data import graph
from vcloze_jax.grid import Grid
from vcloze_jax.inputs import prompts

STRIDES = (37, 74, 111, 148)  # from a subject to its examples: never a relative of it


def truth(source, node, subjects):
    """One node of the subjects, float32 [N, 64, 64, 3] in [0, 1]."""
    return source.pictures[subjects, graph.NODES.index(node)].astype(np.float32) / 255


def choose_examples(source, subject, count):
    """The subjects that are shown to this one: `count` numbers, the same for every task."""
    return [(subject + step) % len(source.names) for step in STRIDES[:count]]


def pose_question(source, task, shown, examples, subject, sentence=False):
    """The grid and prompt that ask `task` of one subject, the task `shown` by some examples, with
    its sentence or without."""
    nodes = [[*shown.conditions, shown.target]] * len(examples)
    nodes.append([*task.conditions, task.target])
    columns = [[graph.NODES.index(node) for node in row] for row in nodes]
    cells = source.pictures[np.array([*examples, subject])[:, None], columns]  # R C 64 64 3
    mask = np.zeros((len(nodes), task.columns, 1, 1), bool)
    mask[-1, -1] = True
    layout = prompts.layout_prompt(len(nodes), task.columns)
    said = prompts.task_prompt([graph.NODE_PHRASES[node][0] for node in nodes[-1]])
    return Grid.from_cells(cells, mask), prompts.join(layout, said if sentence else "")


def paint_cells(painter, specs, *hooks):
    """The last painted cell of every Spec, float32 [N, h, w, 3] in [0, 1]; hooks as a Painter's."""
    painted = zip(specs, painter(specs, *hooks), strict=True)
    return np.stack([s.grid.cut(p.pixels)[-1] for s, p in painted]).astype(np.float32) / 255
