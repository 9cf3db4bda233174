"""Laws of train.py --offload: text encoders wait in host memory, and no number changes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from chips import v5e
from flax import nnx
from runs import assert_same_run, flags, make_home
from test_rowmemory import micro_batch

import train
from vcloze_jax.config import MINI
from vcloze_jax.devices import HOST, make_mesh, parse_mesh, waits
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.sharding import batch_sharding, shardings
from vcloze_jax.step import purpose_key
from vcloze_jax.storage import weights
from vcloze_jax.storage.models import TEXT_ENCODERS, load_for_training
from vcloze_jax.storage.textreader import Tokenizers
from vcloze_jax.trainer import Trainer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The weights and the grids of the runs."""
    return make_home(tmp_path_factory.mktemp("home"))


def test_blocks_come_to_be_used(home):
    """On a mesh prompts are read to the bit as where the encoders stay; before and after that the
    matrices of their blocks, and nothing else, lie in host memory, split as they were."""
    mesh, folder, noisy, places = make_mesh(parse_mesh("8")), home / "weights", [], []
    recipe = replace(tiny.TINY.recipe, rank=4, batch=8, micro_batch=8, group=8)
    for offload in (False, True):
        preset = replace(tiny.TINY, recipe=replace(recipe, offload=offload))
        tokenizers = Tokenizers(folder, preset.t5, preset.clip)
        parts, tx = load_for_training(preset, folder, mesh), make_optimizer(recipe.clip)
        trainer = Trainer(parts, preset, tokenizers, mesh, tx)
        examples = [micro_batch(0)[1]._replace(prompt=f"number {i}") for i in range(8)]
        noisy.append(trainer.encode(examples, range(8), purpose_key(0, "draws")))
        places.append(jax.tree.map(lambda x: x.sharding, trainer.frozen))

    def move(path, x, place):
        encoder, part, *_ = (entry.key for entry in path[:2])
        moves = encoder in TEXT_ENCODERS and part == "blocks" and x.ndim > 2
        return place.with_memory_kind("pinned_host") if moves else place

    assert jax.tree_util.tree_map_with_path(move, trainer.frozen, places[0]) == places[1]
    for here, there in zip(*map(jax.tree.leaves, noisy), strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [1, 8])
def test_a_run_may_offload_for_a_while(home, tmp_path, mesh):
    """A run that offloads for three steps, and then no more, is one that never did: metrics,
    previews, adapter."""
    assert train.main(flags(home, tmp_path / "stays", mesh=mesh)) == 0
    for steps, flag in ((3, ["--offload"]), (6, [])):
        assert train.main(flags(home, tmp_path / "moves", mesh=mesh, steps=steps) + flag) == 0
    assert_same_run(tmp_path / "moves", tmp_path / "stays")


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_tpus_gather_what_has_come(monkeypatch, name):
    """Encoders that wait compile for TPUs, and a layer is gathered on the chips to which its parts
    have come: left alone, XLA gathers it from host to host, over the network."""
    config = getattr(MINI, name)
    graphdef, _, tree = weights.abstract(weights.MODULES[name], config)

    def place(path, x, where):
        where = where.with_memory_kind(HOST) if waits(path, x) else where
        return x.update(dtype="bfloat16", sharding=where)

    with v5e(monkeypatch) as mesh:
        tree = jax.tree_util.tree_map_with_path(place, tree, shardings(tree, mesh, f"{name}/"))
        ids = jax.ShapeDtypeStruct((8, config.max_length), "int32", sharding=batch_sharding(mesh))
        read = jax.jit(weights.MODULES[name].__call__)
        text = read.lower(nnx.merge(graphdef, tree), ids).compile().as_text()
    assert " all-gather(" in text and "MegaScale" not in text
