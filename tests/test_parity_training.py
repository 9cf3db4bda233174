"""Ten training steps against PyTorch: diffusers' transformer, the authors' LoRA, torch's AdamW.

tests/injected.py draws what a run would; scripts/fixtures_training.py is the reference.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import injected
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from vcloze_jax import flow
from vcloze_jax.conditioning import Context, Models, position_table
from vcloze_jax.devices import make_mesh, put
from vcloze_jax.grid import PATCH, Grid, Row
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.sharding import shardings
from vcloze_jax.step import NoisyBatch, init_state, loss_fn, make_step
from vcloze_jax.storage import weights

# Region of the loss, whether blocks are recomputed, grids of a micro-batch.
WAYS = (
    ("target", "none", 1),
    ("target", "light", 2),
    ("grid", "full", 1),
)


def add_noise(group, part):
    """A part of a group as the NoisyBatch that `step.encode_batch` would make of it."""
    names = ("x", "noise", "t", "latent", "mask", "txt", "pooled")
    x, noise, t, latent, mask, *text = (jnp.asarray(group[name][part]) for name in names)
    sizes = [(PATCH * h, PATCH * w) for h, w in group["rows"]]
    grid = Grid(tuple(Row(np.zeros((*s, 3), np.uint8), np.zeros(s, bool)) for s in sizes), 1)
    pe = position_table([grid], injected.CONFIG, injected.TEXT, grid.tokens)
    context = Context(jnp.concatenate([latent, mask], -1), *text, jnp.ones(len(t)), pe)
    return NoisyBatch(*flow.interpolate(x, noise, t), mask.mean(-1), t, context)


def make(region, remat):
    """The two functions of a step, its State and the frozen weights."""
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1))
    base = nnx.to_pure_dict(nnx.state(tiny.flux()))
    base["final"]["linear"] = jax.tree.map(lambda x: injected.LAST * x, base["final"]["linear"])
    adapter = unflatten_dict(injected.adapter(), sep="/")
    frozen, trainable = put({"flux": base}, mesh), put({"flux": adapter}, mesh)
    graphdef = weights.abstract(Flux, replace(injected.CONFIG, remat=remat))[0]
    graphdefs = dict.fromkeys(Models._fields) | {"flux": graphdef}
    loss = partial(loss_fn, region=region, graphdefs=graphdefs, dtype=jnp.float32)
    tx = make_optimizer(injected.CLIP)
    init = partial(init_state, tx=tx, ema=0.0)
    places = shardings(jax.eval_shape(init, trainable), mesh)
    return *make_step(tx, loss, places), init(trainable), frozen


def with_options(jitted, options):
    """A jitted function, compiled with these options for each shape of its arguments."""
    programs = {}

    def call(*args):
        shapes = str(jax.tree.map(jnp.shape, args))
        if shapes not in programs:
            programs[shapes] = jitted.lower(*args).compile(options)
        return programs[shapes](*args)

    return call


def train(region, remat, micro, options):
    """By our step what `train` of the reference does and returns."""
    *functions, state, frozen = make(region, remat)
    accumulate, update = (with_options(f, options) for f in functions)
    start, grads = injected.adapter(), jax.tree.map(jnp.zeros_like, state.trainable)
    run = {"losses": [], "norms": []}
    for step in range(injected.STEPS):
        parts, losses = [slice(i, i + micro) for i in range(0, 2, micro)], []
        for noisy in (add_noise(group, part) for group in injected.groups(step) for part in parts):
            found, grads = accumulate(state.trainable, frozen, grads, noisy)
            losses.append(found[region])
        if step == 0:
            sums = weights.flat(grads["flux"])
            run |= {f"gradient/{path}": np.asarray(x) / len(losses) for path, x in sums.items()}
        state, grads, norms = update(state, grads, losses, np.float32(injected.LR))
        run["losses"].append(np.concatenate(losses))
        run["norms"].append(norms["all"])
    run |= {name: np.stack(run[name]) for name in ("losses", "norms")}
    ends = weights.flat(state.trainable["flux"])
    return run | {f"moved/{path}": (x - start[path]) / injected.LR for path, x in ends.items()}


def assert_same(ours, theirs):
    """Losses and norms to 1e-5, each gradient to 1e-4 of its largest entry, and to 1e-2 how far ten
    steps moved each array, in the Euclidean norm: Adam divides a gradient by its own size, so that
    one that is mostly rounding, as behind a GELU where it is flat, moves an entry as far as others.
    Steps are clipped and not, else Adam would not see a clip."""
    assert ours.keys() == theirs.keys()
    assert theirs["norms"].min() < injected.CLIP < theirs["norms"].max()
    for name, there in theirs.items():
        there = there.reshape(ours[name].shape)  # the fixture has no axes of heads
        if name.startswith("moved/"):
            assert tiny.relative(ours[name], np.float32(there)) < 1e-2, name
        elif name.startswith("gradient/"):
            atol = 1e-4 * np.abs(there).max()
            np.testing.assert_allclose(ours[name], there, rtol=0, atol=atol, err_msg=name)
        else:
            np.testing.assert_allclose(ours[name], there, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("region, remat, micro", WAYS)
def test_stored(region, remat, micro):
    """Ten steps are those of PyTorch when the fixture was made: losses of both regions, gradients
    and clipped updates, however a step is split and whether blocks are recomputed."""
    stored = load_file(Path(__file__).parent / "data/training.safetensors")
    theirs = {k.removeprefix(f"{region}/"): x for k, x in stored.items() if k.startswith(region)}
    assert_same(train(region, remat, micro, {}), theirs)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("region", ["target", "grid"])
def test_live(region, monkeypatch):
    """They are also those of the installed PyTorch, compiled as users' runs are."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import fixtures_training

    theirs = fixtures_training.train(region)
    for way in WAYS:
        if way[0] == region:
            assert_same(train(*way, tiny.as_users()), theirs)
