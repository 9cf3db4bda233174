"""Laws of rowmemory.py: what is remembered of a row is what encoding it gives."""

import jax
import numpy as np
import pytest
from tiny import vae

from vcloze_jax import conditioning, rowmemory
from vcloze_jax.data.sources import Example
from vcloze_jax.devices import make_mesh, parse_mesh
from vcloze_jax.grid import Grid, Row
from vcloze_jax.rowmemory import RowMemory
from vcloze_jax.step import spread_rows

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
    plain = np.zeros((16, 16), bool)
    rows = ((Row(first[i], plain), Row(query[i], mask[i])) for i in range(2))
    return [Example(Grid(of_grid, columns=2), "") for of_grid in rows]


def read(memory, examples, mesh="1"):
    """Posteriors on a mesh of one device, or another."""
    return memory.read_rows(examples, make_mesh(parse_mesh(mesh)))


def test_remembered_rows_are_encoded_rows(memory):
    """A micro-batch read twice is, each time, what its encoding gives (float32 sums in another
    order); the second time nothing is encoded."""
    rows = micro_batch(0)
    expected = encode_rows(vae(), spread_rows(rows, make_mesh(parse_mesh("1"))), -1.0)
    first = read(memory, rows)
    count = len(memory.kept)
    for ours, again, theirs in zip(
        *map(jax.tree.leaves, (first, read(memory, rows), expected)), strict=True
    ):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(ours, again)
    assert len(memory.kept) == count == 6  # the rows without masks and the queries, twice each


def test_a_row_depends_on_no_other(memory):
    """Alone, in a batch, before and after others, on a mesh: a row's posterior is the same to the
    bit."""
    rows = micro_batch(1)
    alone = read(RowMemory(vae(), -1.0, "float32"), rows[1:])
    read(memory, micro_batch(2))
    for mesh in ("1", "2"):
        there = read(memory, rows, mesh)
        for one, other in zip(*map(jax.tree.leaves, (alone, there)), strict=True):
            np.testing.assert_array_equal(one[0], other[1])


def test_the_shape_of_a_row_counts(memory):
    """Rows of the same bytes and another shape are other rows: one of a single colour, lying and
    standing."""
    lying, standing = (np.zeros((*size, 3), np.uint8) for size in ((16, 64), (64, 16)))
    kept = [memory.look_up(x, np.zeros(x.shape[:2], bool)) for x in (lying, standing)]
    assert np.abs(kept[0] - kept[1]).max() > 1e-3


def test_a_memory_is_bounded(monkeypatch):
    """Beyond the limit what was used longest ago goes, and what is asked for is always right."""
    monkeypatch.setattr(rowmemory, "LIMIT", 2000)  # bytes: a row of 16 x 32 has 1024
    small, rows = RowMemory(vae(), -1.0, "float32"), micro_batch(3)
    once, again = read(small, rows), read(small, rows)
    assert sum(x.nbytes for x in small.kept.values()) <= 2000
    for one, other in zip(*map(jax.tree.leaves, (once, again)), strict=True):
        np.testing.assert_array_equal(one, other)
