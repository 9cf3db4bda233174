"""Laws of one step of training, with a toy model: micro-batches, what is not finite, averages."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vcloze_jax.config import PRESETS
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.step import init_state, learning_rate, make_step, merge_models
from vcloze_jax.storage import weights


def toy_step(skip=0):
    """A step of a toy model, w x = y: its two functions and its state."""

    def loss(w, frozen, batch):
        losses = jnp.square(batch @ w["w"] - frozen)
        return losses.mean(), {"target": losses}

    w = {"w": jnp.arange(3.0)}
    tx = make_optimizer(clip=1.0)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, init_state(w, tx, 0.9))
    return *make_step(tx, loss, places, 0.9, skip), init_state(w, tx, 0.9)


BATCH = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def stepped(batches, frozen=1.0, skip=0, state=None):
    """State and norm after one step of some micro-batches."""
    accumulate, update, begun = toy_step(skip)
    state = jax.tree.map(jnp.copy, state) if state else begun
    grads, losses = jax.tree.map(jnp.zeros_like, state.trainable), []
    for batch in batches:
        loss, grads = accumulate(state.trainable, frozen, grads, batch)
        losses.append(loss["target"])
    state, grads, norms = update(state, grads, losses, np.float32(0.1))
    assert not any(x.any() for x in jax.tree.leaves(grads))
    return state, norms["all"]


def test_micro_batches_are_one_batch():
    """A step over two halves is the step over the whole; over one half twice, that of the half."""
    for many, one in (([BATCH[:2], BATCH[2:]], [BATCH]), ([BATCH, BATCH], [BATCH])):
        for x, y in zip(*map(jax.tree.leaves, (stepped(many), stepped(one))), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)  # sums in another order


@pytest.mark.parametrize("target", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(target):
    """Neither weights nor moments nor average nor the count move, be it the loss or but the
    gradient; nor does anything after it, until the loop has read that it failed."""
    before = toy_step()[2]
    after, norm = stepped([BATCH], frozen=target)
    assert not np.isfinite(norm) and after.failed
    for state in (after, stepped([BATCH], state=after)[0]):
        same = jax.tree.map(np.array_equal, before[:4], state[:4])
        assert jax.tree.all(same) and state.failed


def test_some_steps_may_be_skipped():
    """As many steps as may be skipped are counted and change nothing else; one more fails."""
    before = toy_step()[2]
    once, _ = stepped([BATCH], np.nan, skip=1)
    assert (once.skipped, once.failed) == (1, False)
    assert jax.tree.all(jax.tree.map(np.array_equal, before[:3], once[:3]))
    fine, _ = stepped([BATCH], skip=1, state=once)
    assert not np.array_equal(fine.trainable["w"], once.trainable["w"]) and fine.skipped == 1
    twice, _ = stepped([BATCH], np.nan, skip=1, state=fine)
    assert (twice.skipped, twice.failed) == (1, True)


def test_average():
    """The average moves a tenth of the way to the weights at each step."""
    before = toy_step()[2]
    after, _ = stepped([BATCH])
    expected = 0.9 * before.average["w"] + 0.1 * after.trainable["w"]
    np.testing.assert_allclose(after.average["w"], expected, rtol=1e-6)


def test_learning_rates():
    """A warm-up rises linearly to the rate, which then stays, or falls by a cosine to a hundredth
    at a step of its own, whatever --steps says, and stays there."""
    rate = partial(learning_rate, replace(PRESETS["mini"].recipe, lr=0.1, warmup=4))
    np.testing.assert_allclose([rate(n) for n in (0, 3, 4, 99)], [0.02, 0.08, 0.1, 0.1])
    rate = partial(learning_rate, replace(PRESETS["mini"].recipe, lr=0.1, warmup=4, decay_steps=24))
    np.testing.assert_allclose([rate(n) for n in (4, 14, 24, 99)], [0.1, 0.0505, 0.001, 0.001])
    assert not isinstance(rate(14), jax.Array)  # to read it would be to wait for a device's work


def test_models_free_what_they_are_made_of():
    """Networks that are put together of trees hold them no longer than they live, whether or not
    Python looks for what nobody holds: of an adapter of zeros, made for one preview, gigabytes."""
    graphdef, _, base = weights.abstract(weights.VAE, tiny.TINY.vae)
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), base)
    held = [weakref.ref(x) for x in jax.tree.leaves(tree)]
    gc.disable()
    try:
        graphdefs = dict.fromkeys(weights.MODULES) | {"vae": graphdef}
        models = merge_models(graphdefs, {"vae": tree})
        del tree
        assert all(ref() is not None for ref in held) and models.vae.config == tiny.TINY.vae
        del models
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()
