"""Laws of training on Graph200K: every list of the authors' gives grids that a step takes."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import tiny

from scripts.make_graph200k import SPLITS, write_dataset
from vcloze_jax.config import Recipe
from vcloze_jax.data.graph200k_tasks import GROUP_OF, Selection
from vcloze_jax.data.sources import draw_groups, open_source
from vcloze_jax.devices import make_mesh
from vcloze_jax.inputs.metrics import summarise_step
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.step import KIND, encode_batch, loss_fn, make_batch, purpose_key, spread_rows
from vcloze_jax.storage import places, weights
from vcloze_jax.storage.models import load_for_training
from vcloze_jax.storage.textreader import Tokenizers
from vcloze_jax.trainer import Trainer

SIDE, GROUP = 32, 2
RECIPE = replace(
    tiny.TINY.recipe,
    data="graph200k",
    resolution=SIDE,
    rank=2,
    batch=2 * GROUP,
    micro_batch=GROUP,
    group=GROUP,
    threads=1,
    task_sentence=1.0,
    caption_dropout=0.0,
)
PRESET = replace(tiny.TINY, recipe=RECIPE)
MESH = make_mesh(dict(data=1, fsdp=1, tensor=1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tiny dataset as train.py opens it."""
    folder = tmp_path_factory.mktemp("data") / "graph200k"
    write_dataset(folder)
    return open_source(replace(RECIPE, data_dir=f"{folder}"))


def draw(source, task, number=0):
    """The group of that number, of one list, made as a run's are."""
    alone = replace(source, selection=Selection({task: 1.0}))
    return next(draw_groups(alone, RECIPE, number, number + 1))


def test_the_fixture_is_small(tmp_path):
    """All columns of the published data, real photographs, all 129 lists: in under 100 KB."""
    write_dataset(tmp_path / "graph200k")
    files = [f.stat().st_size for f in (tmp_path / "graph200k").rglob("*") if f.is_file()]
    assert sum(files) < 100_000
    grids = open_source(Recipe(data_dir=f"{tmp_path}/graph200k"))
    counts = len(grids.numbers), len(grids.held_out().numbers)
    assert counts == tuple(count for count, _ in SPLITS.values())
    assert grids.selection.shares.keys() == GROUP_OF.keys()
    assert max(map(len, GROUP_OF.values())) <= KIND  # or metrics would cut the names of kinds


def test_every_list_is_trained(source):
    """Each of the 129 lists gives, through the threads of a run, different grids of its columns
    that hold together: one cell of the last row blank, all pictures there, a sentence that names
    the columns. Their shapes are among those that a run compiles before its first step, and for
    each of these a step is traced, from pictures and text to what the MMDiT reads, of which only
    the number of tokens differs; and for one of them to the gradient of an adapter."""
    tokenizers = Tokenizers(places.MINI_FOLDER, PRESET.t5, PRESET.clip)
    shapes, traced = {shape.sizes: shape for shape in source.shapes()}, set()
    for number, task in enumerate(GROUP_OF):
        one, other = draw(source, task, number)
        for example in (one, other):
            grid = example.grid
            assert (example.kind, grid.columns) == (GROUP_OF[task], task.columns)
            (column,) = grid.targets
            assert grid.split(grid.query.mask)[column].all()
            assert sum(row.mask.sum() for row in grid.rows) == SIDE * SIDE
            assert all(row.pixels.any() for row in grid.rows) and "[IMAGE1]" in example.prompt
        assert not np.array_equal(one.grid.query.pixels, other.grid.query.pixels)
        how = partial(spread_rows, mesh=MESH), tokenizers, PRESET, MESH
        batch = make_batch([one, other], range(GROUP), *how)
        shape = shapes[one.grid.shape]
        if shape not in traced:
            trace_step(batch, shape, learning=not traced)
            traced.add(shape)
    assert traced == {*source.shapes()}


def trace_step(batch, shape, learning):
    """A step over a micro-batch, or what it encodes, by shapes alone: nothing is computed."""
    parts = {
        name: weights.abstract(module, getattr(PRESET.learning, name))
        for name, module in weights.MODULES.items()
    }
    graphdefs, adapters, frozen = ({n: p[i] for n, p in parts.items()} for i in range(3))
    trainable, statics = {"flux": adapters["flux"]}, dict(graphdefs=graphdefs, dtype="float32")
    encode = partial(encode_batch, preset=PRESET, **statics)
    noisy = jax.eval_shape(encode, frozen, batch, purpose_key(0, "draws"))
    assert noisy.x_t.shape == noisy.velocity.shape == (GROUP, shape.tokens, 64)
    if not learning:
        return
    loss = jax.value_and_grad(partial(loss_fn, region="target", **statics), has_aux=True)
    (_, told), grads = jax.eval_shape(loss, trainable, frozen, noisy)
    assert told["target"].shape == told["grid"].shape == (GROUP,)
    assert jax.tree.map(np.shape, grads) == jax.tree.map(np.shape, trainable)


@pytest.mark.slow
def test_all_lists_train_in_one_run(source, tmp_path):
    """Real steps over groups of every list, one after the other: all losses are finite, all kinds
    of tasks are told, and the adapter has moved."""
    folder = tiny.weights_folder(tmp_path / "weights")
    parts = load_for_training(PRESET, folder, MESH)
    tokenizers, tx = Tokenizers(folder, PRESET.t5, PRESET.clip), make_optimizer(PRESET.recipe.clip)
    trainer = Trainer(parts, PRESET, tokenizers, MESH, tx)
    lists = [*GROUP_OF, next(iter(GROUP_OF))]  # a step has two groups
    groups = (draw(source, task, number) for number, task in enumerate(lists))
    before, kinds = jax.tree.map(np.asarray, trainer.state.trainable), set()
    for _ in range(len(lists) // 2):
        sent = trainer.send(groups)
        trainer.wait(sent)
        losses = summarise_step(sent, 1.0, "target", {})["loss_by_kind"]
        assert np.isfinite([*losses.values()]).all()
        kinds |= losses.keys()
    assert kinds == {*GROUP_OF.values()}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, trainer.state.trainable)
    assert all(jax.tree.leaves(moved))
