"""Laws of flow.py: the convention of time, the shifted schedule, the masked loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import part

from vcloze_jax import flow
from vcloze_jax.config import FlowConfig
from vcloze_jax.grid import Grid, Spec
from vcloze_jax.painter import initial_noise

C = FlowConfig()
KEYS = jax.random.split(jax.random.key(0), 10_000)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("case", part("sigmas/"))
def test_schedule_is_that_of_diffusers(case):
    """Times equal FlowMatchEulerDiscreteScheduler's, for few and many tokens, without a clamp
    above 4096; 1e-6 because diffusers shifts in float32."""
    tokens, steps = map(int, case.split("/"))
    np.testing.assert_allclose(flow.schedule(steps, tokens, C), part("sigmas/")[case], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 30, 100])
def test_schedule_runs_from_noise_to_picture(steps):
    """N steps have N + 1 times: exactly 1 first, exactly 0 last, falling strictly; float32."""
    times = flow.schedule(steps, 1152, C)
    assert times.shape == (steps + 1,) and times.dtype == np.float32
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()


def test_more_tokens_mean_more_noise():
    """The larger the grid, the later the noise leaves; at 256 tokens the shift is e^0.5."""
    few, many = flow.schedule(10, 256, C), flow.schedule(10, 6912, C)
    assert (few[1:-1] < many[1:-1]).all()
    plain = np.linspace(1, 0.1, 10)
    np.testing.assert_allclose(few[:-1], 1 / (1 + np.exp(-0.5) * (1 / plain - 1)), rtol=1e-6)


def test_interpolation_has_the_convention():
    """x_t is the picture at t = 0, noise at t = 1, and its derivative is noise - picture."""
    x, noise = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    for t, expected in ((0.0, x), (1.0, noise)):
        np.testing.assert_array_equal(flow.interpolate(x, noise, np.full(3, t))[0], expected)
    at = lambda t: flow.interpolate(x, noise, t)[0]  # noqa: E731
    _, slope = jax.jvp(at, (jnp.float32([0.2, 0.5, 0.9]),), (jnp.ones(3),))
    np.testing.assert_array_equal(slope, flow.interpolate(x, noise, np.zeros(3))[1])


def test_euler_is_exact_on_a_linear_flow():
    """Where the velocity is constant one step lands where interpolation says, from any time to any
    other; each sample has times of its own (a few float32 roundings of numbers up to 4)."""
    x, noise = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    start, end = np.float32([1.0, 0.7, 0.4]), np.float32([0.0, 0.1, 0.35])
    x_t, velocity = flow.interpolate(x, noise, start)
    expected, _ = flow.interpolate(x, noise, end)
    np.testing.assert_allclose(flow.euler(x_t, velocity, start, end), expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7])
def test_n_steps_are_n_calls_and_arrive(steps):
    """The schedule's N intervals, one call of the model each, lead from noise to the picture."""
    x, noise, calls = normal(1, 5, 4), normal(1, 5, 4, seed=1), []
    times, y = flow.schedule(steps, 1152, C), noise

    def model(y, t):
        calls.append(t)
        return (y - x) / t  # the velocity of the line through y at t and x at 0

    for t, t_next in zip(times, times[1:], strict=False):
        y = flow.euler(y, model(y, t), t[None], t_next[None])
    assert len(calls) == steps and calls[0] == 1
    np.testing.assert_allclose(y, x, atol=1e-5)  # a chain of `steps` float32 roundings


def test_euler_keeps_its_state_in_float32():
    """A bfloat16 velocity moves a float32 state, whose small steps would else be lost."""
    step = flow.euler(jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4), jnp.bfloat16), np.ones(1), 1 - 1e-3)
    assert step.dtype == jnp.float32
    np.testing.assert_allclose(step, 0.999, rtol=1e-6)


@pytest.fixture
def losing():
    """Prediction, velocity, and weights: a small target, a large one, and shares of tokens."""
    weight = np.zeros((3, 6), np.float32)
    weight[0, 5], weight[1, 1:], weight[2, :4] = 1, 1, (0.25, 0.5, 1, 0)
    return normal(3, 6, 8), normal(3, 6, 8, seed=1), weight


def test_loss_sees_masked_tokens_only(losing):
    """Tokens of weight 0 get no gradient, bit for bit, and do not change the loss; others do."""
    out, velocity, weight = losing
    grad = np.asarray(jax.grad(lambda x: flow.masked_loss(x, velocity, weight).sum())(out))
    assert (np.abs(grad).max(-1) > 0).tolist() == (weight > 0).tolist()
    other = np.where(weight[..., None] > 0, out, 1e6)
    assert np.array_equal(*(flow.masked_loss(x, velocity, weight) for x in (other, out)))


def test_loss_weighs_samples_equally(losing):
    """A sample's loss is the weighted mean of its tokens' squared errors (float32 sums), whatever
    the size of its target."""
    out, velocity, weight = losing
    loss = flow.masked_loss(out, velocity, weight)
    error = np.square(np.float64(out) - velocity).mean(-1)
    each = [np.average(e, weights=w) for e, w in zip(error, weight, strict=True)]
    np.testing.assert_allclose(loss, each, rtol=1e-6)
    larger = weight * np.float32([[8], [1], [2]])
    np.testing.assert_allclose(flow.masked_loss(out, velocity, larger), loss, rtol=1e-6)


def test_full_weight_is_the_plain_mean(losing):
    """With all weights 1 (the authors' code, region `grid`) the loss is the mean squared error."""
    out, velocity, weight = losing
    plain = np.square(np.float64(out) - velocity).mean((1, 2))
    loss = flow.masked_loss(out, velocity, np.ones_like(weight))
    np.testing.assert_allclose(loss, plain, rtol=1e-6)


def test_loss_is_float32(losing):
    """A bfloat16 prediction is compared in float32: the loss is that of its rounded values."""
    out, velocity, weight = losing
    low = jnp.asarray(out, jnp.bfloat16)
    loss = flow.masked_loss(low, velocity, weight)
    assert loss.dtype == jnp.float32
    assert np.array_equal(loss, flow.masked_loss(low.astype(jnp.float32), velocity, weight))


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_training_times(mean):
    """Times are sigmoids of a normal: float32 inside (0, 1), quartiles at the sigmoids of its mean
    and of 0.674 below and above (5 deviations of a quantile of 10,000 draws: 0.011)."""
    t = np.asarray(flow.draw_time(KEYS, mean))
    assert t.dtype == np.float32 and 0 < t.min() and t.max() < 1
    expected = 1 / (1 + np.exp(np.array([0.6745, 0, -0.6745]) - mean))
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), expected, atol=0.02)


def test_shifted_times():
    """A shift moves times towards noise, more for more tokens, keeps their order and 1, and is that
    of sampling: the times of a schedule are the shifted even ones."""
    t = np.linspace(0.01, 1, 100)
    few, many = (flow.shift_time(t, tokens, C) for tokens in (256, 4096))
    assert (t[:-1] < few[:-1]).all() and (few[:-1] < many[:-1]).all() and (np.diff(many) > 0).all()
    assert np.float32(few[-1]) == np.float32(many[-1]) == 1
    even = np.linspace(1, 1 / 30, 30)
    assert np.array_equal(
        flow.schedule(30, 4096, C)[:-1], np.float32(flow.shift_time(even, 4096, C))
    )


def test_training_guidance():
    """Guidance is log-uniform between its bounds, and exactly 1 between 1 and 1 (the authors').
    The median of 10,000 draws lies within 5 deviations, 2.5 % of the log range."""
    g = np.asarray(flow.draw_guidance(KEYS, (1.0, 50.0)))
    assert g.min() >= 1 and g.max() <= 50.0001
    assert abs(np.median(np.log(g)) / np.log(50) - 0.5) < 0.025
    np.testing.assert_array_equal(flow.draw_guidance(KEYS, (1.0, 1.0)), 1)


def test_draws_are_those_of_single_precision():
    """What is drawn is the same numbers where JAX_ENABLE_X64 is set, as some environments have
    it."""
    spec = Spec(Grid.from_cells(np.zeros((1, 1, 32, 32, 3), np.uint8), True), "", 1, 30.0, 7)
    draws = {
        "noise": lambda: initial_noise(spec),
        "time": lambda: flow.draw_time(KEYS[:4]),
        "guidance": lambda: flow.draw_guidance(KEYS[:4], (1.0, 50.0)),
    }
    for name, draw in draws.items():
        single = np.asarray(draw())
        with jax.enable_x64(True):
            double = np.asarray(draw())
        assert double.dtype == np.float32 and np.array_equal(single, double), name
