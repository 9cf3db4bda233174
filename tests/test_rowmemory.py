"""Laws of rowmemory.py: what is remembered of a row is what encoding it gives."""

import jax
import numpy as np
import pytest
from tiny import vae

from vcloze_jax import conditioning, rowmemory
from vcloze_jax.rowmemory import RowMemory

encode_rows = jax.jit(conditioning.encode_rows)


@pytest.fixture(scope="module")
def memory():
    return RowMemory(vae(), -1.0, "float32")


def micro_batch(seed):
    """Two grids of a row that is never masked and a query of two cells, some of it blank."""
    rng = np.random.default_rng(seed)
    first, query = (rng.integers(256, size=(2, 16, w, 3), dtype=np.uint8) for w in (16, 32))
    mask = np.zeros((2, 16, 32), bool)
    mask[0, :, 16:], mask[1, 3:9, :5] = True, True
    return (first, None), (query, mask)


def test_remembered_rows_are_encoded_rows(memory):
    """A micro-batch read twice is, each time, what its encoding gives (float32 sums in another
    order); the second time nothing is encoded."""
    rows = micro_batch(0)
    expected = encode_rows(vae(), rows, -1.0)
    first = memory(rows)
    count = len(memory.kept)
    for ours, again, theirs in zip(
        *map(jax.tree.leaves, (first, memory(rows), expected)), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(ours, again)
    assert len(memory.kept) == count == 6  # the rows without masks and the queries, twice each


def test_a_row_depends_on_no_other(memory):
    """Alone, in a batch, before and after others: a row's posterior is the same to the bit."""
    rows = micro_batch(1)
    alone = RowMemory(vae(), -1.0, "float32")([(x[1:], m if m is None else m[1:]) for x, m in rows])
    memory(micro_batch(2))
    for one, other in zip(*map(jax.tree.leaves, (alone, memory(rows))), strict=True):
        np.testing.assert_array_equal(one[0], other[1])


def test_a_memory_is_bounded(monkeypatch):
    """Beyond the limit what was used longest ago goes, and what is asked for is always right."""
    monkeypatch.setattr(rowmemory, "LIMIT", 2000)  # bytes: a row of 16 x 32 has 1024
    small, rows = RowMemory(vae(), -1.0, "float32"), micro_batch(3)
    once, again = small(rows), small(rows)
    assert sum(x.nbytes for x in small.kept.values()) <= 2000
    for one, other in zip(*map(jax.tree.leaves, (once, again)), strict=True):
        np.testing.assert_array_equal(one, other)
