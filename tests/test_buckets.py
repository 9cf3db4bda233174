"""Laws of the sizes that samples are joined to, few of them, and the same for what is held out."""

import numpy as np
import pytest

from vcloze_jax.data.owndata import split_buckets
from vcloze_jax.data.sizes import ASPECTS, fill_buckets, find_near, merge_buckets
from vcloze_jax.inputs.cells import row_size


def make_table(sizes, rows=1, columns=2):
    """The table of samples whose first pictures have these sizes."""
    return np.array([(1, rows, columns, *size) for size in sizes], np.int32)


@pytest.mark.parametrize("resolution", [64, 384, 512])
def test_few_sizes_of_cells(resolution):
    """Pictures of any size make cells of at most nine sizes, all whole tokens, of about the area
    that is asked for, and of the nearest aspect: within a quarter, from 1:2 to 2:1."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(100), np.log(4000), (500, 2))).astype(int)
    buckets = fill_buckets(make_table(sizes), resolution)
    assert len(buckets) <= len(ASPECTS) == 9
    assert sorted(np.concatenate(list(buckets.values()))) == list(range(500))
    for shape, members in buckets.items():
        assert shape.height % 16 == shape.width % 16 == 0
        assert 0.6 < shape.height * shape.width / resolution**2 <= 1.05
        for w, h in sizes[members]:
            if 1 / 2 < w / h < 2 and resolution > 64:
                assert abs(np.log(w / h * shape.height / shape.width)) < 0.25
    for w, h in ASPECTS:
        (shape,) = fill_buckets(make_table([(20 * w, 20 * h)]), resolution)
        assert (shape.width, shape.height) == row_size(w, h, resolution)


def test_small_buckets_join_their_neighbour():
    """No bucket has less than asked for that can join one of as many rows and columns, and of no
    quite other aspect; nothing is lost; what is large enough stays."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = np.exp(rng.uniform(np.log(100), np.log(4000), (60, 2))).astype(int)
        table = make_table(sizes)
        table[:, 2] = rng.integers(2, 4, 60)
        buckets = fill_buckets(table, 384)
        merged = merge_buckets(buckets, 8)
        assert sorted(np.concatenate(list(merged.values()))) == list(range(60))
        for shape, members in merged.items():
            within = [own for own, some in buckets.items() if np.isin(some, members).all()]
            assert all(shape in find_near(own, merged) for own in within)
            others = merged.keys() - {shape}
            can_join = [x for x in others if all(x in find_near(own, others) for own in within)]
            assert len(members) >= 8 or not can_join
        assert {s for s, m in buckets.items() if len(m) >= 8} <= merged.keys()


def test_unlike_buckets_stay_apart():
    """Law: no picture loses a third or more for the number of its like: few portraits stand beside
    many landscapes in cells of their own, also where some are held out."""
    buckets = fill_buckets(make_table([(160, 90)] * 10 + [(90, 160)] * 10 + [(1000, 900)]), 64)
    rest, reserve = split_buckets(buckets, np.array([0, 10, 11, 12]), 16)
    assert {(s.width > s.height): len(m) for s, m in rest.items() if s.width != s.height} == {
        True: 9, False: 7,
    }  # fmt: skip
    assert sorted(map(len, reserve.values())) == [1, 3]


def test_held_out_shapes_are_those_of_training():
    """What is held out is cut as training's pictures are, so that it needs no program more, unless
    nothing like it is learnt."""
    rng = np.random.default_rng(5)
    sizes = np.exp(rng.uniform(np.log(100), np.log(4000), (80, 2))).astype(int)
    buckets = fill_buckets(make_table(sizes), 384)
    rest, reserve = split_buckets(buckets, np.arange(40), 8)
    assert reserve.keys() <= rest.keys()
    for part in (rest, reserve):
        counts = [len(members) for members in part.values()]
        assert counts == sorted(counts, reverse=True)  # previews are of the fullest
    both = [*rest.values(), *reserve.values()]
    assert sorted(np.concatenate(both)) == list(range(80))
