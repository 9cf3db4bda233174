"""Laws of Graph200K's typed task graph: what there is, and how a question is drawn."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from vcloze_jax.config import Recipe
from vcloze_jax.data import graph200k_tasks
from vcloze_jax.data.__main__ import main
from vcloze_jax.data.degradations import DEGRADATIONS
from vcloze_jax.data.graph200k import needs
from vcloze_jax.data.graph200k_items import COLUMNS
from vcloze_jax.data.graph200k_tasks import (
    GROUP_OF,
    GROUPS,
    PHRASES,
    build_phrases,
    describe_graph,
    draw_phrases,
    node_type,
    select_tasks,
)

EVERYTHING, RECIPE = select_tasks(""), Recipe()
NODES = {node for task in GROUP_OF for node in (*task.conditions, task.target)}


def generator(*seed):
    return np.random.default_rng(seed)


def test_the_graph_is_the_authors():
    """49 types with 503 phrases, 9 to 15 each and none twice; 12 groups, 129 lists, of which half
    the draws have 2 columns, 5 of 12 have 3, one of 12 has 4 (facts: run on the authors' code)."""
    assert len(PHRASES) == 49 and sum(map(len, PHRASES.values())) == 503
    assert all(9 <= len(said) == len(set(said)) <= 15 for said in PHRASES.values())
    sizes = [len(tasks) for _, tasks in GROUPS.values()]
    assert sizes == [11, 10, 18, 1, 1, 3, 9, 2, 2, 8, 32, 32]
    assert sum(sizes) == len(GROUP_OF) == 129
    widths = {c: sum(s for t, s in EVERYTHING.shares.items() if t.columns == c) for c in (2, 3, 4)}
    assert np.allclose([*widths.values()], [0.5, 5 / 12, 1 / 12])


def test_two_commas_are_missing_behind_one_switch():
    """Without it there are 505: the two pairs stand alone that else run into each other."""
    whole, changed = build_phrases(False), []
    assert sum(map(len, whole.values())) == 505
    for name, said in build_phrases(True).items():
        if said != whole[name]:
            changed.append(name)
            (glued,) = set(said) - set(whole[name])
            apart = [phrase for phrase in whole[name] if phrase not in said]
            assert glued == "".join(apart) and len(apart) == 2
    assert changed == ["target", "reference"]
    assert build_phrases(graph200k_tasks.MISSING_COMMAS) == PHRASES


def test_all_nodes_can_be_shown_and_said():
    """Every node of a list has phrases and columns in the data or a degradation, and none of these
    is without a list (but the pictures of boxes, which no list of the authors' has)."""
    assert {node_type(node) for node in NODES} == {*PHRASES}
    assert {name for node in NODES for name in needs(node)} == {*COLUMNS} - {"bbox"}
    assert tuple(DEGRADATIONS) == graph200k_tasks.DEGRADED


def test_tasks_are_drawn_by_their_shares():
    """100,000 draws as grids are drawn, first a width, then a task of it, pass a chi-square test
    against the table; so do all widths in turn (p > 0.001, with a fixed seed)."""
    rng, tasks = generator(0), [*EVERYTHING.shares]
    number, index = 100_000, {task: i for i, task in enumerate(tasks)}
    drawn = [EVERYTHING.draw(rng, EVERYTHING.draw(rng).columns) for _ in range(number)]
    counts = np.bincount([index[task] for task in drawn], minlength=len(tasks))
    expected = number * np.array([*EVERYTHING.shares.values()])
    assert stats.chisquare(counts, expected).pvalue > 0.001
    for columns in (2, 3, 4):
        some = np.array([task.columns == columns for task in tasks])
        share = expected[some] / expected[some].sum() * counts[some].sum()
        assert stats.chisquare(counts[some], share).pvalue > 0.001


def test_selections():
    """A task, a group, several; the shares of what is left are those of its groups."""
    one = select_tasks("canny->target").shares
    assert one == select_tasks("canny-to-target").shares  # which no shell takes for a redirection
    assert [(task.name, share) for task, share in one.items()] == [("canny->target", 1)]
    both = select_tasks("restoration,editing").shares
    assert len(both) == 34 and np.isclose(sum(both.values()), 1)
    assert {round(share, 9) for share in both.values()} == {round(1 / 64, 9), 0.25}
    rest = select_tasks("without:restoration,editing")
    assert len(rest.shares) == 95 and rest.left_out == {*both} and not {*rest.shares} & {*both}
    for text in (
        "gray->depth",
        "restoration,nonsense",
        "without:",
        "without:nonsense",
        "with:gray",
    ):
        with pytest.raises(ValueError, match="no task; python -m|without: names nothing"):
            select_tasks(text)


def test_unseen_tasks_are_never_asked_for():
    """What is left out for a study is never drawn, nor asked for by a blank cell in another column;
    each of its nodes is trained in other tasks."""
    selection, rng = select_tasks("without:zero-shot"), generator(1)
    assert len(selection.left_out) == 6 and len(selection.shares) == 123
    trained = {node for task in selection.shares for node in (*task.conditions, task.target)}
    asked = set()
    for _ in range(20_000):
        task = selection.draw(rng)
        nodes = (*rng.permutation(task.conditions).tolist(), task.target)
        column = selection.choose_blank(rng, nodes, RECIPE)
        asked.add((frozenset(nodes) - {nodes[column]}, nodes[column]))
    for task in selection.left_out:
        assert task not in selection.shares and {*task.conditions, task.target} <= trained
        assert (frozenset(task.conditions), task.target) not in asked
    assert (frozenset(["target"]), "hed") in asked  # what is not left out is asked for in reverse
    papers = replace(RECIPE, reverse_held_out=True)
    drawn = {selection.choose_blank(rng, ("mlsd", "target"), papers) for _ in range(50)}
    assert drawn == {0, 1}  # the paper's rule, behind its switch


def test_any_cell_may_be_blank():
    """The last of L cells is blank with p 0.5 + 0.5 / L, another with 0.5 / L, to 5 deviations."""
    rng, number = generator(2), 4000
    for nodes in (
        ("canny", "target"),
        ("reference", "canny", "InstantStyle-style", "InstantStyle"),
    ):
        drawn = [EVERYTHING.choose_blank(rng, nodes, RECIPE) for _ in range(number)]
        shares = np.full(len(nodes), 0.5 / len(nodes))
        shares[-1] += 0.5
        found = np.bincount(drawn, minlength=len(nodes)) / number
        assert (abs(found - shares) < 5 * (shares * (1 - shares) / number) ** 0.5).all()


def test_phrases_are_those_of_the_columns():
    """Each is drawn among its node's, all of them in turn; a style and the picture in it have types
    of their own."""
    rng, nodes = generator(3), ("gray", "ReduxStyle-style", "ReduxStyle")
    drawn = [draw_phrases(rng, nodes) for _ in range(300)]
    for node, said in zip(nodes, zip(*drawn, strict=True), strict=True):
        assert {*said} == {*PHRASES[node_type(node)]}


def test_the_graph_is_printed(capsys):
    """--list names every node, group, list and selection."""
    main(["--list"])
    text = capsys.readouterr().out
    assert text == describe_graph() + "\n"
    assert text.startswith("49 nodes, 503 phrases\n") and "\n12 groups, 129 lists\n" in text
    for name in (*PHRASES, *GROUPS, *(task.name for task in GROUP_OF), "without:zero-shot"):
        assert name in text
