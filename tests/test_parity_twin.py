"""The training step's MMDiT in PyTorch (scripts/twin.py)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vcloze_jax import conditioning, flow, step
from vcloze_jax.config import FluxConfig
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.ops import rope_table

pytestmark = pytest.mark.parity
SIZES = FluxConfig(
    width=32, heads=2, double_blocks=2, single_blocks=3, text_width=12, vec_width=8,
    axes_dim=(4, 6, 6), remat="none",
)  # fmt: skip
B, T, S = 3, 5, 8


@pytest.fixture
def noisy():
    """A micro-batch, of which a part of the tokens counts."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    pe = rope_table(rng.integers(0, 9, (1, T + S, 3)), SIZES.axes_dim, SIZES.theta)
    guidance = jnp.asarray(rng.uniform(1, 50, B), jnp.float32)
    context = conditioning.Context(
        draw(B, S, 320), draw(B, T, 12), draw(B, 8), guidance, pe, segments=None
    )
    share, t = (jnp.asarray(rng.random(shape), jnp.float32) for shape in ((B, S), B))
    return step.NoisyBatch(draw(B, S, 64), draw(B, S, 64), share, t, context)


@pytest.fixture(params=[True, False], ids=["guidance", "none"])
def flux(request):
    return draw_flux(replace(SIZES, guidance_embed=request.param))


def draw_flux(sizes):
    """(graphdef, its tree): all weights are drawn, of which many begin as zeros or ones."""
    graphdef, state = nnx.split(Flux(sizes, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    draw = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(state))


def as_twin(tree):
    """A tree of Flux's as the twin's weights."""
    torch = pytest.importorskip("torch")
    from scripts import twin
    from scripts.train_twin import filled

    leaves, treedef = jax.tree.flatten(twin.rearrange(tree))
    leaves = [torch.from_numpy(np.array(x)) for x in leaves]
    return filled(jax.tree.unflatten(treedef, range(len(leaves))), leaves)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's, of its own
@pytest.mark.parametrize(
    "low, least, most",
    [
        ("float32", 0, 1e-5),  # sums in another order
        ("bfloat16", 1e-3, 3e-2),  # 2 ** -9 a rounding, of some fifty in a row
    ],
)
def test_twin_has_the_loss_and_the_gradient_of_the_step(flux, noisy, low, least, most, monkeypatch):
    """Every loss, and the gradient of every array, is that of step.losses_by_region."""
    torch = pytest.importorskip("torch")
    from scripts import twin
    from scripts.train_twin import as_arrays, filled

    monkeypatch.setattr(twin, "LOW", getattr(torch, low))
    graphdef, tree = flux

    graphdefs = dict.fromkeys(conditioning.Models._fields) | {"flux": graphdef}

    def ours(tree):
        trees = {"flux": tree}, {}
        out = step.predict_velocity(*trees, noisy, graphdefs=graphdefs, dtype=jnp.float32)
        losses = step.losses_by_region(out, noisy)
        return losses["target"].mean(), losses

    (_, losses), grads = jax.value_and_grad(ours, has_aux=True)(tree)

    leaves, treedef = jax.tree.flatten(twin.rearrange(tree))
    kinds = [twin.LOW if twin.is_product(x.shape) else torch.float32 for x in leaves]
    leaves = [
        torch.from_numpy(np.array(x)).to(kind).requires_grad_()
        for x, kind in zip(leaves, kinds, strict=True)
    ]
    weights = filled(jax.tree.unflatten(treedef, range(len(leaves))), leaves)
    to_torch = lambda x: torch.from_numpy(np.array(x))  # noqa: E731
    inputs = jax.tree.map(to_torch, as_arrays(noisy))
    with torch.compiler.set_stance("force_eager"):
        target, grid = twin.losses(weights, inputs, SIZES.heads)
    found = torch.autograd.grad(target.mean(), leaves)
    restore = jax.linear_transpose(lambda tree: jax.tree.leaves(twin.rearrange(tree)), tree)
    (back,) = restore([jnp.asarray(g.float().numpy()) for g in found])

    error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))  # noqa: E731
    assert error(target.detach().numpy(), losses["target"]) < most
    assert error(grid.detach().numpy(), losses["grid"]) < most
    of_arrays = jax.tree.map(error, back, grads)
    assert max(jax.tree.leaves(of_arrays)) < most, of_arrays
    assert least <= np.mean(jax.tree.leaves(of_arrays))


def test_guidance_by_examples(noisy, monkeypatch):
    """With --guide 3, at guidance 1 the true velocity is asked for, at 30 one that is led twice the
    way from what the last row alone is told to what it is told among all; other rows' is as it
    was, and so is all of a grid of one row."""
    torch = pytest.importorskip("torch")
    from scripts import twin
    from scripts.train_twin import as_arrays

    monkeypatch.setattr(twin, "LOW", torch.float32)
    graphdef, tree = draw_flux(SIZES)
    flux = nnx.merge(graphdef, tree)
    ids = np.zeros((1, T + S, 3), np.float32)
    ids[0, T:] = [(row, y, x) for row in (1, 2) for y in (0, 1) for x in (0, 1)]
    pe = rope_table(ids, SIZES.axes_dim, SIZES.theta)
    guidance = jnp.asarray([1.0, 30.0, 30.0])
    noisy = noisy._replace(context=noisy.context._replace(pe=pe, guidance=guidance))
    alone = lambda x: x[:, S // 2 :]  # noqa: E731
    c, half = noisy.context, tuple(x[:, : T + S // 2] for x in pe)
    mod = flux.modulation(noisy.t, guidance, c.pooled)
    v = alone(conditioning.velocity(flux, noisy.x_t, mod, c))
    query = c._replace(condition=alone(c.condition), pe=half)
    u = conditioning.velocity(flux, alone(noisy.x_t), mod, query)

    teacher = as_twin(tree)

    def ask(noisy):
        arrays = as_arrays(noisy, rows=SIZES.axes_dim[0], guide=3.0)
        inputs = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), arrays)
        with torch.compiler.set_stance("force_eager"):
            return twin.guided(teacher, inputs, SIZES.heads).numpy()

    asked, true = ask(noisy), np.asarray(noisy.velocity)
    np.testing.assert_array_equal(asked[:, : S // 2], true[:, : S // 2])
    np.testing.assert_array_equal(asked[0], true[0])
    led = asked[1:, S // 2 :] - true[1:, S // 2 :]
    np.testing.assert_allclose(led, 2 * np.asarray(v - u)[1:], atol=1e-4)  # sums in another order
    assert np.abs(led).mean() > 0.01

    one_row = noisy._replace(
        x_t=alone(noisy.x_t), velocity=alone(noisy.velocity), share=alone(noisy.share)
    )
    one_row = one_row._replace(context=query)
    np.testing.assert_array_equal(ask(one_row), alone(true))


def test_temperature(noisy, monkeypatch):
    """With --temperature 0.5 what is masked is led as two of Euler's steps lead that noise halved,
    at guidance 30, or whole, at 1: but for the rest of the noise, times t, it stands where they
    come to, and goes as they do. In grids of edges only the velocity is the teacher's; what is
    given is as it was, and went with the steps on its own way."""
    torch = pytest.importorskip("torch")
    from scripts import train_twin, twin

    monkeypatch.setattr(twin, "LOW", torch.float32)
    graphdef, tree = draw_flux(SIZES)
    flux, guidance = nnx.merge(graphdef, tree), jnp.asarray([30.0, 30.0, 1.0])
    names = b"edges", b"edges of another kind", b"mask"
    kinds = jnp.asarray([[*name.ljust(step.KIND)] for name in names], jnp.uint8)
    noisy = noisy._replace(
        t=jnp.asarray([0.5, 0.8, 0.3]),
        share=noisy.share.at[:, : S // 2].set(0),
        context=noisy.context._replace(guidance=guidance),
        kinds=kinds,
    )
    given, c = np.s_[:, : S // 2], noisy.context
    noise = noisy.x_t + (1 - noisy.t)[:, None, None] * noisy.velocity
    rest = (0.5 * noise).at[given].set(0).at[np.array([0, 2])].set(0)

    def follow(x, t):
        v = conditioning.velocity(flux, x, flux.modulation(t, guidance, c.pooled), c)
        return v.at[given].set(noisy.velocity[given])

    start, middle, _ = (jnp.full(B, t, jnp.float32) for t in train_twin.TIMES)
    first = follow(noise - rest, start)
    half = flow.euler(noise - rest, first, start, middle)
    second = follow(half, middle)
    x = [
        noisy.x_t[0],
        flow.euler(noise - rest, first, start, noisy.t)[1] + noisy.t[1] * rest[1],
        flow.euler(half, second, middle, noisy.t)[2],
    ]
    v = [follow(noisy.x_t, noisy.t)[0], first[1] + rest[1], second[2]]

    arrays = train_twin.as_arrays(noisy, temperature=0.5)
    inputs = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), arrays)
    with torch.compiler.set_stance("force_eager"):
        found = twin.cooled(as_twin(tree), inputs, SIZES.heads)
    close = partial(np.testing.assert_allclose, atol=1e-4)  # sums in another order
    close(found["x_t"], jnp.stack(x))
    close(found["velocity"], jnp.stack(v))
    for name, true in (("x_t", noisy.x_t), ("velocity", noisy.velocity)):
        close(found[name][given], true[given])
        assert np.abs(found[name].numpy() - true)[1:].mean() > 0.1
