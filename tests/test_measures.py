"""Laws of inputs/measures.py: what counts as the right picture, and as an edge."""

import numpy as np
import pytest

from vcloze_jax.inputs.measures import edge_f1, hits, rmse, ssim


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).random((*shape, 16, 16, 3), np.float32)


def test_the_truth_is_a_perfect_hit():
    """The truth itself has RMSE 0, SSIM 1 and is its own nearest candidate; a candidate that is
    another subject's truth is a miss."""
    truth = pictures(5)
    own = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(rmse(truth, truth), 0)
    np.testing.assert_allclose(ssim(truth, truth), 1)
    assert hits(truth, truth[None], own).all()
    assert not hits(np.roll(truth, 1, 0), truth[None], own).any()


def test_a_tie_is_a_hit():
    """Two candidates that are one picture: whichever is right, it is the nearest."""
    truth = np.repeat(pictures(1), 3, 0)
    assert hits(truth, truth[None], np.eye(3, dtype=bool)).all()


def test_noise_hits_by_chance():
    """Of pictures that have nothing to do with M candidates, about one in M hits."""
    share = hits(pictures(400), pictures(1, 8, seed=1), np.arange(8) == 3).mean()
    assert share == pytest.approx(1 / 8, abs=0.07)


def test_each_picture_may_have_candidates_of_its_own():
    """[N, M] candidates: those of another picture do not count."""
    candidates = pictures(3, 4)
    found = hits(candidates[:, 2], candidates, np.arange(4) == 2)
    assert found.all() and not hits(candidates[:, 1], candidates, np.arange(4) == 2).any()


def line(column):
    picture = np.zeros((1, 16, 16, 3), np.float32)
    picture[:, :, column] = 1
    return picture


def test_edges_may_be_one_pixel_off():
    """A line is found where it is and one pixel beside it, and not two beside it."""
    assert [edge_f1(line(5), line(x))[0] for x in (5, 6, 4, 7)] == pytest.approx([1, 1, 1, 0])


def test_edges_are_found_and_not_made_up():
    """F1 is symmetric; half of the lines found, or twice as many, cost the same; nothing where
    there is nothing is right, something is wrong."""
    both, nothing = line(3) + line(10), np.zeros_like(line(0))
    assert edge_f1(line(3), both)[0] == edge_f1(both, line(3))[0] == pytest.approx(2 / 3)
    assert edge_f1(nothing, nothing)[0] == 1 and edge_f1(line(3), nothing)[0] == 0
