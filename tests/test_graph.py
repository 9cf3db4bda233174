"""Laws of the task graph: which tasks there are, what is drawn of them, and how often."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vcloze_jax.config import MINI
from vcloze_jax.data.conditions import CONDITIONS
from vcloze_jax.data.graph import (
    FILL_KINDS,
    GROUPS,
    HELD_OUT_COMPOSITIONS,
    HELD_OUT_TASKS,
    NODE_PHRASES,
    NODES,
    PACKS,
    TRAIN,
    VIEWS,
    asks_held_out,
    draw_fill,
    draw_mask,
    draw_part,
    draw_sample,
    draw_shape,
    draw_task,
    parse_task,
)
from vcloze_jax.data.sources import Shape

NAMES = [f"subject {i}" for i in range(20)]
DRAWS = 4000
RECIPE = MINI.recipe
SILENT = replace(RECIPE, caption_dropout=0.0)
SQUARE = 16, 16  # a cell, where its size does not matter


def generator(*seed):
    return np.random.default_rng(seed)


def share(count, p, draws=DRAWS):
    """A count of draws within 5 deviations of the binomial."""
    assert abs(count - p * draws) < 5 * np.sqrt(draws * p * (1 - p)) + 1e-9, (count / draws, p)


# --- tasks ---


def test_every_node_is_drawn_or_derived_and_has_its_phrases():
    """A node is a view of one pack or a condition, in this order; no phrase is said of two."""
    assert NODES == (*VIEWS, *CONDITIONS) == tuple(NODE_PHRASES) and len(set(NODES)) == len(NODES)
    assert VIEWS == tuple(view for views in PACKS.values() for view in views)
    phrases = [phrase for node in NODE_PHRASES.values() for phrase in node]
    assert all(phrases) and len(phrases) == len(set(phrases))
    assert all(NODE_PHRASES.values())


def test_tasks_are_paths_of_two_to_four_cells():
    """Every task, trained or held out, leads from one to three other nodes to its target, is named
    after them, and stands in one group."""
    grouped = Counter(task for _, tasks in GROUPS for task in tasks)
    assert set(grouped.values()) == {1}
    for task in {*grouped, *HELD_OUT_TASKS, *HELD_OUT_COMPOSITIONS}:
        assert 2 <= task.columns <= 4 and task.target not in task.conditions
        assert len(set(task.conditions)) == len(task.conditions)
        assert parse_task(task.name) == task


@pytest.mark.parametrize("name", ["", "gray", "gray->", "gray->x", "gray+->noto", "a->b->c"])
def test_unknown_tasks_are_refused(name):
    """What is no task is an error that lists the nodes."""
    with pytest.raises(ValueError, match="nodes of fluent_3d"):
        parse_task(name)


def test_held_out_tasks_are_never_trained():
    """No task that is held out is in the training table; each of its nodes is, elsewhere, as a
    condition or as a target, so that only the way between them is new."""
    held_out = {*HELD_OUT_TASKS, *HELD_OUT_COMPOSITIONS}
    assert parse_task(MINI.recipe.data.partition(":")[2]) in held_out  # mini learns it in the end
    assert held_out.isdisjoint(TRAIN) and all(task.columns == 2 for task in HELD_OUT_TASKS)
    for task in held_out:
        assert any(task.target == other.target for other in TRAIN)
        for condition in task.conditions:
            assert any(condition in other.conditions for other in TRAIN)


def test_shares_of_tasks():
    """Groups share the draws as the table says (they sum to 1), tasks inside a group equally; each
    task's count lies within 5 deviations."""
    np.testing.assert_allclose(sum(weight for weight, _ in GROUPS), 1)
    rng = generator(0)
    counts = Counter(draw_task(rng) for _ in range(DRAWS))
    assert counts.keys() <= TRAIN.keys()
    for task, weight in TRAIN.items():
        share(counts[task], weight / sum(TRAIN.values()))


def test_shapes_of_micro_batches():
    """1, 2 and 3 rows with p 0.3, 0.4, 0.3 (the authors'), columns as often as tasks have them; of
    one task its own."""
    rng = generator(1)
    shapes = [draw_shape(rng)[:2] for _ in range(DRAWS)]
    for rows, p in ((1, 0.3), (2, 0.4), (3, 0.3)):
        share(sum(r == rows for r, _ in shapes), p)
    for columns in (2, 3, 4):
        weight = sum(w for task, w in TRAIN.items() if task.columns == columns)
        share(sum(c == columns for _, c in shapes), weight / sum(TRAIN.values()))
    only = {parse_task("edges+blur->fluent_3d"): 1.0}
    assert {draw_shape(rng, only)[1] for _ in range(20)} == {3}


# --- masks ---


@pytest.mark.parametrize("name", ["edges->noto", "edges+gray->noto", "edges+gray+mask->noto"])
def test_reverse_masking(name):
    """Of the draws that mask one cell, the last is it with p 0.5 + 0.5/L, every other with p 0.5/L
    (the authors'); with p 0.1 two cells or more are blank, with p 0.1 one is blank in part only."""
    task = parse_task(name)
    rng, columns = generator(2, task.columns), task.columns
    nodes = [*task.conditions, task.target]
    masks = [draw_mask(rng, nodes, 16, RECIPE) for _ in range(DRAWS)]
    query = np.array([mask.mean((1, 2)) for mask in masks])  # share of each cell
    several = (query > 0).sum(1) > 1
    assert (query.max(1) > 0).all() and (query[several] % 1 == 0).all()
    share(several.sum(), 0.1)
    share(((query > 0) & (query < 1)).any(1).sum(), 0.1)
    column = query[~several].argmax(1)
    for i in range(columns):
        p = 0.5 / columns + 0.5 * (i == columns - 1)
        share((column == i).sum(), p, len(column))


def test_held_out_tasks_are_never_shown_the_other_way_round():
    """No grid of the trained tasks asks for one that is held out, whichever cells are blank. The
    paper's rule, which does not look, does; and a held-out task may be asked for where it is what
    is trained."""
    asked = Counter()
    for recipe in (RECIPE, replace(RECIPE, reverse_held_out=True)):
        rng = generator(12)
        for task in TRAIN:
            for _ in range(60):
                nodes = [*task.conditions, task.target]
                blank = draw_mask(rng, nodes, 4, recipe).any((1, 2))
                asked[recipe] += asks_held_out(nodes, blank, TRAIN)
    assert list(asked.values())[0] == 0 and list(asked.values())[1] > 20
    for task in HELD_OUT_TASKS:
        nodes, blank = [task.target, *task.conditions], [True, False]
        assert asks_held_out(nodes, blank, TRAIN) and not asks_held_out(nodes, blank, {task: 1.0})


def test_parts_are_neither_empty_nor_whole():
    """A part covers between a tenth and nine tenths of its cell."""
    rng = generator(3)
    covered = [draw_part(rng, 64).mean() for _ in range(1000)]
    assert 0.1 <= min(covered) < 0.25 and 0.7 < max(covered) <= 0.9


# --- samples ---


def test_samples_are_grids_of_one_task():
    """All rows show the same nodes, of subjects that are all different; the target is last, its
    conditions in any order; the mask has the grid's shape."""
    tasks, orders = set(), set()
    for seed in range(300):
        rng = generator(4, seed)
        rows, columns = draw_shape(rng)[:2]
        query = seed % len(NAMES)
        shape = Shape(rows, columns, *SQUARE)
        nodes, subjects, mask, _ = draw_sample(rng, shape, NAMES, query, RECIPE)
        assert subjects[-1] == query and not mask[:-1].any()
        assert len(nodes) == rows and all(row == nodes[0] for row in nodes)
        assert len(set(subjects.tolist())) == rows and mask.shape == (rows, columns, 16, 16)
        task = next(
            t for t in TRAIN if t.target == nodes[0][-1] and {*t.conditions} == {*nodes[0][:-1]}
        )
        tasks.add(task)
        orders.add((task, *nodes[0]))
    assert len(orders) > len(tasks) > 30


def test_samples_depend_on_the_generator_only():
    """The same generator draws the same sample, with text, mask and all; another one another."""
    args = Shape(2, 2, *SQUARE), NAMES, 3, SILENT
    for draw in (draw_sample, draw_fill):
        first, again, other = (draw(generator(s), *args) for s in (5, 5, 6))
        assert first.nodes == again.nodes and first.prompt == again.prompt
        np.testing.assert_array_equal(first.subjects, again.subjects)
        np.testing.assert_array_equal(first.mask, again.mask)
        assert first.prompt != other.prompt


def test_sentences():
    """The last row's subject is named with p 0.8 where the target is a drawn view, and elsewhere
    never. Phrases are those of the nodes, in the order of the columns."""
    rng, shape = generator(7), Shape(2, 2, *SQUARE)
    view, edges = ({parse_task(name): 1.0} for name in ("edges->fluent_3d", "fluent_3d->edges"))
    prompts = [draw_sample(rng, shape, NAMES, 7, SILENT, view).prompt for _ in range(DRAWS)]
    share(sum(prompt.endswith("subject 7") for prompt in prompts), 0.8)
    phrases = {p for p in NODE_PHRASES["edges"] if any(f"[IMAGE1] {p}" in x for x in prompts)}
    assert phrases == set(NODE_PHRASES["edges"])
    others = [draw_sample(rng, shape, NAMES, 7, SILENT, edges).prompt for _ in range(100)]
    assert not any("subject 7" in prompt for prompt in others)


def test_fill_grids():
    """The infilling base's grids: at most one blank cell a row and at least one in all, in any
    row; unrelated pictures, or rows of one subject: one picture again and again, or two nodes that
    a trained task joins and no held-out task does."""
    blank_rows, kinds = Counter(), Counter()
    trained = {frozenset((*task.conditions, task.target)) for task in TRAIN}
    held_out = {frozenset((*task.conditions, task.target)) for task in HELD_OUT_TASKS}
    shape = Shape(3, 2, *SQUARE)
    for seed in range(300):
        query = seed % len(NAMES)
        nodes, subjects, mask, _ = draw_fill(generator(9, seed), shape, NAMES, query, RECIPE)
        assert subjects[-1, -1] == query
        blank = mask.any((2, 3))
        assert blank.any() and blank.sum(1).max() == 1
        blank_rows.update(np.flatnonzero(blank.any(1)).tolist())
        if len(np.unique(subjects)) == 6:
            kinds["unrelated"] += 1
            continue
        assert (subjects == subjects[:, :1]).all() and len(np.unique(subjects)) == 3
        if all(a == b for a, b in nodes):
            kinds["repeats"] += 1
        else:
            kinds["sheet"] += 1
            assert nodes == [nodes[0]] * 3 and frozenset(nodes[0]) in trained - held_out
    assert min(blank_rows[row] for row in range(3)) > 100
    for kind, p in FILL_KINDS.items():
        share(kinds[kind], p, 300)
