"""Laws of where it looks: what is measured is the attention that the MMDiT computes, its masses are
shares, and looking changes nothing."""

import csv
import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vcloze_jax.config import MINI
from vcloze_jax.data import graph
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.grid import Spec
from vcloze_jax.painter import initial_noise, pad
from vcloze_jax.pipeline import load_painter
from vcloze_jax.questions import pose_question
from vcloze_jax.study import asker, attention, looks
from vcloze_jax.study.parts import Lab

TASK = graph.parse_task("edges+mask->fluent_3d")
B, T, S, H, K = 2, 5, 40, 2, 8
LENGTHS = np.array([T + S, T + S - 9], np.int32)


def draws(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def dense_heat(q, k, queries, lengths=None):
    """The whole L x L matrix, in float64, of which some rows are read."""
    q, k = np.float64(q), np.float64(k)
    scores = np.einsum("bqhk,blhk->bhql", q, k) / np.sqrt(q.shape[-1])
    if lengths is not None:
        real = np.arange(k.shape[1]) < np.asarray(lengths)[:, None]
        scores = np.where(real[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[:, :, queries].mean((1, 2))


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_chunks_give_the_dense_answer(chunk, lengths):
    """However many queries are taken at once, and with padding, which nobody looks at."""
    q, k = draws(*[(B, T + S, H, K)] * 2)
    queries = np.array([7, 8, 9, 20, 21, 30, 31])
    heat = attention.attention_heat(q, k, queries, lengths, chunk)
    np.testing.assert_allclose(heat, dense_heat(q, k, queries, lengths), atol=1e-6)
    np.testing.assert_allclose(heat.sum(-1), 1, atol=1e-6)
    if lengths is not None:
        assert not heat[1, LENGTHS[1] :].any()


def test_no_matrix_of_all_pairs_is_made():
    """In the whole program there is no array of L x L."""
    q, k = draws(*[(B, T + S, H, K)] * 2)
    heat = partial(attention.attention_heat, queries=np.arange(T, T + S), chunk=8)
    shapes = {v.aval.shape for e in jax.make_jaxpr(heat)(q, k).eqns for v in e.outvars}
    assert (B, H, 8, T + S) in shapes
    assert max(np.prod(shape) for shape in shapes) < B * (T + S) ** 2


@pytest.fixture(scope="module")
def painter():
    return load_painter(None, None, None)


@pytest.fixture(scope="module")
def specs():
    source = open_tasks("", MINI.recipe).held_out()
    grids = [pose_question(source, TASK, TASK, [3, 9], s) for s in (1, 70)]
    return [Spec(grid, prompt, 2, 30.0, seed=i) for i, (grid, prompt) in enumerate(grids)]


@pytest.fixture(scope="module")
def looked(painter, specs):
    return attention.paint_and_look(painter, specs, lambda steps, label: steps)


def test_looking_changes_nothing(painter, specs, looked):
    """The pictures are those that are painted without; of every token of the target, and of every
    block and step, all of its attention is there."""
    plain = painter(specs)
    for one, other in zip(plain, looked[0], strict=True):
        assert np.array_equal(one.pixels, other.pixels)
    names, segments = attention.segment_tokens(specs[0].grid, painter.preset.t5.max_length)
    flux = painter.preset.flux
    heat = looked[1]
    assert heat.shape == (2, flux.double_blocks + flux.single_blocks, 2, len(segments))
    np.testing.assert_allclose(heat.sum(-1), 1, atol=1e-5)
    masses = attention.segment_masses(heat, segments)
    np.testing.assert_allclose(masses.sum(-1), 1, atol=1e-5)
    for i in range(len(names)):
        np.testing.assert_allclose(masses[..., i], heat[..., segments == i].sum(-1), atol=1e-6)


def test_it_is_the_attention_of_mini(painter, specs, looked):
    """Every block's heat is that of the dense matrix of what the block gave to attention; and the
    velocity is that of the model."""
    canvases, heat = looked
    size = 160  # 144 tokens and their padding
    _, times, context = painter.stack(canvases, size)
    x = np.stack([pad(initial_noise(spec), size, "f4") for spec in specs])
    flux = painter.models.flux
    mod = flux.modulation(times[:, 0], context.guidance, context.pooled)
    img = jnp.concatenate([x, context.condition], -1)
    args = flux, img, context.txt, mod, context.pe, context.lengths
    velocity, given = attention.hear_blocks(*args, hear=lambda q, k, lengths: jnp.stack([q, k]))
    np.testing.assert_allclose(velocity, flux(*args[1:]), atol=1e-5)
    names, segments = attention.segment_tokens(specs[0].grid, painter.preset.t5.max_length)
    queries = np.flatnonzero(segments == names.index(attention.TARGET))
    for block, (q, k) in enumerate(given):
        dense = dense_heat(q, k, queries, context.lengths)[:, : len(segments)]
        np.testing.assert_allclose(heat[0, block], dense, atol=2e-5)


def test_segments_are_the_cells(specs):
    """Each token belongs to what it shows: of two conditions and a target, side by side."""
    grid = specs[0].grid
    names, segments = attention.segment_tokens(grid, T)
    assert names == [
        "text",
        "conditions of example 1",
        "target of example 1",
        "conditions of example 2",
        "target of example 2",
        "the query's conditions",
        "the target itself",
    ]
    assert len(segments) == T + grid.tokens and not segments[:T].any()
    ids = grid.ids()
    for (row, _, x), segment in zip(ids, segments[T:], strict=True):
        assert segment == 1 + 2 * (row - 1) + (x >= 8)


def test_the_chapter_adds_up(tmp_path, monkeypatch):
    """Its shares sum to one, of each task and of all tokens; the CSV has a line for every step,
    block and segment, whose masses do so, too; every contradiction was asked both ways round."""
    monkeypatch.setattr(asker, "QUICK_SUBJECTS", 2)
    painter = load_painter(tiny.weights_folder(tmp_path), None, None)
    source = open_tasks("", MINI.recipe).held_out()
    lab = Lab(painter, source, 2, True, lambda steps, label: steps)
    chapter = looks.look_around(lab)
    for record in chapter.numbers["looks"]:
        shares = [x["mean"] if isinstance(x, dict) else x for x in list(record.values())[1:]]
        assert sum(shares) == pytest.approx(1)
    rows = list(csv.DictReader(io.StringIO(chapter.files["looks.csv"])))
    blocks, segments = tiny.TINY.flux.double_blocks + tiny.TINY.flux.single_blocks, 7
    assert len(rows) == 2 * blocks * segments
    for start in range(0, len(rows), segments):
        found = rows[start : start + segments]
        assert len({(row["step"], row["block"]) for row in found}) == 1
        assert sum(float(row["mass"]) for row in found) == pytest.approx(1, abs=1e-5)
    (quarrel,) = chapter.numbers["quarrels"]
    assert quarrel["grids"] == 2 * 2 * asker.QUICK_NOISES


def test_auc():
    """One where values tell all, nothing where they are all the same, and the reverse is its
    complement; of one kind alone nothing is known."""
    values, truths = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert looks.measure_auc(values, truths) == 0.75
    assert looks.measure_auc(-values, truths) == 0.25
    assert looks.measure_auc(np.zeros(4), truths) == 0.5
    assert looks.measure_auc(values, np.ones(4, bool)) == 0.5
