"""How what paints grids is parted into base and adapter (scripts/split_mini.py)."""

from dataclasses import replace

import jax
import numpy as np

from scripts.split_mini import main
from tests import folders
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import adapters, folding, places, weights


def test_base_and_adapter_together_are_what_was_split(tmp_path):
    """Base + adapter is what was learnt, but for the base's rounding to bfloat16, 2 ** -8 of a
    weight; the base alone is what the infilling adapter made of it."""
    cloze, infills, out = tmp_path / "cloze", tmp_path / "lora.safetensors", tmp_path / "mini"
    folders.save(cloze)
    _, adapter, _ = weights.abstract(Flux, replace(folders.FLUX, rank=2))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), adapter)
    adapters.save(infills, adapter)
    main(cloze, infills, out)

    read = lambda folder: weights.read_tree(Flux, folders.FLUX, folder)  # noqa: E731
    learnt, infilling, base = read(cloze), read(cloze), read(out)
    folding.fold(infilling, adapter)
    for ours, theirs in zip(*map(jax.tree.leaves, (base, infilling)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2**-9, rtol=2**-8)  # A and B are rounded
    largest = jax.tree.map(lambda x: abs(x).max(), base)
    folding.fold(base, adapters.load(out / places.MINI_LORA.name, folders.FLUX))
    for ours, theirs, size in zip(*map(jax.tree.leaves, (base, learnt, largest)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-8 * size + 1e-6)
