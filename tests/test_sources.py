"""Laws of the sources of data: what each must do, and micro-batches."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from test_datanames import EMOJI, open_named

from scripts.make_graph200k import write_dataset
from vcloze_jax.config import MINI
from vcloze_jax.data.graph import NEAR, NODES, SIZE, TRAIN, draw_fill, draw_sample
from vcloze_jax.data.sources import (
    SOURCES,
    Shape,
    deal,
    draw_group,
    draw_groups,
    draw_of_shape,
    draw_validation,
)
from vcloze_jax.inputs.prompts import CONTENT_PREFIXES

NAMES = [*EMOJI, "own.jsonl", "pairs", "graph200k", "graph200k:restoration"]
SILENT = replace(MINI.recipe, caption_dropout=0.0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What each name opens, held out: 128 subjects of GraphEmoji, which are derived in a second.
    Of the user's own data a half is held out: as many as there is to learn from."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "pairs").mkdir()
    for i in range(8):
        for side, level in (("in", 0), ("out", 255)):
            picture = Image.new("RGB", (64, 64), (30 * i, level, 0))
            picture.save(folder / "pairs" / f"{i}_{side}.png")
        (folder / "pairs" / f"{i}.txt").write_text(f"colour {i}")
    rows = [[f"pairs/{i}_in.png", f"pairs/{i}_out.png"] for i in range(8)]
    lines = [{"image": [rows[i - 1], rows[i]]} for i in range(8)]
    lines = [json.dumps(line | {"content_prompt": f"{i}"}) for i, line in enumerate(lines)]
    (folder / "own.jsonl").write_text("\n".join(lines))
    opened = {name: open_named(name) for name in NAMES[:3]}
    opened |= {name: open_named(folder / name) for name in NAMES[3:5]}
    write_dataset(folder / "graph200k", side=24)
    opened |= {name: open_named(name, data_dir=f"{folder}/graph200k") for name in NAMES[5:]}
    return {name: source.held_out() for name, source in opened.items()}


@pytest.fixture(scope="module")
def source(sources):
    return sources["graphemoji"]


def generator(*seed):
    return np.random.default_rng(seed)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.prompt == b.prompt and a.grid.shape == b.grid.shape
        for row, again in zip(a.grid.rows, b.grid.rows, strict=True):
            np.testing.assert_array_equal(row.pixels, again.pixels)
            np.testing.assert_array_equal(row.mask, again.mask)


# --- what a source must do ---


def test_every_row_of_the_registry_is_tested():
    """The laws below hold for every source that can be opened."""
    words = {"gray->fluent_flat": "TASK", "restoration": "TASKS"}
    forms = {":".join(words.get(part, part) for part in name.split(":")) for name in NAMES}
    assert SOURCES.keys() == forms - {"own.jsonl", "pairs"}


@pytest.mark.parametrize("name", NAMES)
def test_groups_depend_on_seed_and_number_only(sources, name):
    """A group is a function of (seed, number), whatever was asked before; its grids have one shape,
    of those that are known beforehand, and only a source that says so masks other rows than the
    last."""
    grids = sources[name]
    first = draw_group(grids, 3, 7, 4)
    draw_group(grids, 0, 0, 2)
    same(draw_group(grids, 3, 7, 4), first)
    groups = [draw_group(grids, 3, i, 4) for i in range(20)]
    shapes = {shape.sizes for shape in grids.shapes()}
    assert shapes == {draw_of_shape(grids, shape).grid.shape for shape in grids.shapes()}
    assert all(shape.tokens == draw_of_shape(grids, shape).grid.tokens for shape in grids.shapes())
    assert all(len({example.grid.shape for example in group}) == 1 for group in groups)
    assert {group[0].grid.shape for group in groups} <= shapes
    others = [*groups, *(draw_group(grids, 4, i, 4) for i in range(20))]
    assert len({tuple(example.prompt for example in group) for group in others}) > 20
    rows = [row for group in groups for example in group for row in example.grid.rows[:-1]]
    assert any(row.mask.any() for row in rows) == grids.masks_every_row


@pytest.mark.parametrize("name", NAMES)
def test_no_grid_comes_twice_in_a_group(sources, name):
    """The last rows of a group are all different: their pictures tell."""
    for number in range(40):
        group = draw_group(sources[name], 5, number, 2)
        assert len({example.grid.query.pixels.tobytes() for example in group}) == 2


@pytest.mark.parametrize("count, size", [(1, 4), (3, 8), (8, 8), (100, 8), (10_000, 8)])
def test_dealing(count, size):
    """Each member of a group gets numbers that no other gets, all there are or 64 each; where there
    are fewer than members, they come in turns. Every number is as likely as another. Behind its own
    stand those of others."""
    first = np.zeros(count, int)
    for seed in range(400):
        given = deal(generator(seed), count, size)
        dealt = max(size, min(count, 64 * size))
        hands = [hand[: len(range(i, dealt, size))] for i, hand in enumerate(given)]
        assert all(len(hand) == min(64, dealt) for hand in given)
        assert dealt > 64 or all({*hand} == {*np.concatenate(hands)} for hand in given)
        numbers = np.concatenate(hands)
        assert len(numbers) == max(size, min(count, 64 * size)) and numbers.max() < count
        if count >= size:
            assert len(set(numbers.tolist())) == len(numbers)
        else:
            turns = np.array(hands)[: size // count * count, 0].reshape(-1, count)
            assert (np.sort(turns, 1) == np.arange(count)).all()
        first[hands[1][0]] += 1
    if 1 < count < 100:
        assert chisquare(first).pvalue > 1e-4


def test_tasks_do_not_depend_on_rows_or_position(source):
    """What task a member of a group shows is drawn apart from the group's shape: of two columns,
    its share of near pairs is that of the table at every number of rows and every position, to 5
    deviations of a share of 300 draws. (NumPy pads seeds with zeros: the first member of a group
    once drew its task with the number that chose the rows.)"""
    drawn = []

    def spy(rng, shape, names, query):
        sample = draw_sample(rng, shape, names, query, SILENT)
        drawn.append((shape[:2], tuple(sample.nodes[-1])))
        return sample

    watched = replace(source, choose_sample=spy)
    for number in range(1100):
        draw_group(watched, 0, number, 2)
    near = {(a, b) for a in NEAR for b in NEAR}
    tasks = {task: weight for task, weight in TRAIN.items() if task.columns == 2}
    expected = sum(w for t, w in tasks.items() if (*t.conditions, t.target) in near)
    expected /= sum(tasks.values())
    for rows in (1, 2, 3):
        for position in (0, 1):
            found = [nodes in near for shape, nodes in drawn[position::2] if shape == (rows, 2)]
            deviation = (expected * (1 - expected) / len(found)) ** 0.5
            assert len(found) > 200 and abs(np.mean(found) - expected) < 5 * deviation, rows


@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_restart_continues(source, start):
    """Begun at any number, by any number of threads, the stream is the rest of the whole one, and
    ends where it should."""
    rest = list(
        draw_groups(source, replace(MINI.recipe, seed=1, group=2, threads=start + 1), start, 6)
    )
    assert len(rest) == 6 - start
    for number, group in enumerate(rest, start):
        same(group, draw_group(source, 1, number, 2))


def test_hosts_draw_their_part(source):
    """A host that draws only some places of a group draws there what one that draws all does."""
    whole = draw_group(source, 1, 3, 4)
    part = draw_group(source, 1, 3, 4, drawn=[1, 2])
    assert part[0] is part[3] is None
    same(part[1:3], whole[1:3])


@pytest.mark.parametrize("name", NAMES)
def test_validation_has_examples(sources, name):
    """What a run's held-out loss is of has grids with as many examples as the source has, and with
    fewer, also where it has several widths; its first group is of the first shape."""
    source = sources[name]
    shapes = source.shapes()
    groups = draw_validation(source, 1, 3)
    found = [len(group[0].grid.rows) for group in groups]
    alike = [shape.rows for shape in shapes if shape[1:] == shapes[0][1:]]
    assert found[: len(alike)] == alike[:3] and len(found) == min(3, len(shapes))
    assert groups[0][0].grid.tokens == shapes[0].tokens


def test_streams_need_not_be_read_to_the_end(source):
    """What is made ahead is no obligation: a reader that stops early gets the same groups."""
    recipe = replace(MINI.recipe, seed=1, group=2)
    for number, group in enumerate(islice(draw_groups(source, recipe, 0, 1000), 2)):
        same(group, draw_group(source, 1, number, 2))


def test_digests_follow_the_content(sources, tmp_path):
    """A source is known by what it holds: other tasks, lines or pixels are another digest, another
    place is not."""
    digests = {source.digest() for source in sources.values()}
    assert len(digests) == len(NAMES)
    for folder, colour in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64), (colour, 0, 0)).save(tmp_path / folder / "0.png")
        (tmp_path / folder / "own.jsonl").write_text('{"image": [["0.png", "0.png"]]}')
    a, b, c = (open_named(tmp_path / f / "own.jsonl").digest() for f in "abc")
    assert a == b != c


# --- GraphEmoji ---


def test_held_out_subjects_are_never_trained_on(sources):
    """Held-out grids are drawn by the rules of the source, of the split that is not trained on."""
    for name in NAMES[:3]:
        train = open_named(name)
        assert (train.split, sources[name].split) == ("train", "held_out")
        assert len(sources[name].names) == 128 and sources[name].held_out().split == "held_out"
        for number in range(5):
            assert train.shape(generator(number)) == sources[name].shape(generator(number))


def test_cells_show_what_the_sample_says(source):
    """Row r, column c of a grid is the picture of the sample's subject and node there, for tasks
    (subjects by row) and for the infilling base (subjects by cell); masks lie on their cells."""
    args = (Shape(2, 3, SIZE, SIZE), source.names, 5, SILENT)
    for sample in (draw_sample(generator(10), *args), draw_fill(generator(10), *args)):
        grid = source.picture(sample).grid
        for r, row in enumerate(grid.rows):
            for c in range(3):
                subject = sample.subjects[r] if sample.subjects.ndim == 1 else sample.subjects[r, c]
                picture = source.pictures[subject, NODES.index(sample.nodes[r][c])]
                np.testing.assert_array_equal(row.pixels[:, 64 * c : 64 * c + 64], picture)
                np.testing.assert_array_equal(row.mask[:, 64 * c : 64 * c + 64], sample.mask[r, c])


def test_names_are_those_of_the_pictures(source):
    """The content sentence of a task names the subject of the last row, whose picture is there."""
    shape = Shape(2, 2, SIZE, SIZE)
    for seed in range(20):
        sample = draw_sample(generator(11, seed), shape, source.names, seed, SILENT)
        prefix = next((p for p in CONTENT_PREFIXES if p in sample.prompt), None)
        if prefix:
            assert sample.prompt.endswith(prefix + source.names[sample.subjects[-1]])
