"""Laws of the optimizers: whose a weight is, what Muon makes of a matrix, and on a mesh."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import flags, make_home, metrics

import train
from vcloze_jax import plan
from vcloze_jax.config import FLUX_FILL
from vcloze_jax.devices import make_mesh, parse_mesh, put
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.sharding import shardings
from vcloze_jax.step import init_state, make_step
from vcloze_jax.storage import checkpoint, weights

# Every kind of matrix, [D, 3, H, K] and the like, at widths that divide over 8 devices.
CONFIG = replace(tiny.FLUX, width=16, single_blocks=3, text_width=16, vec_width=16)
CLIP = 2.0
# Product of a block's -> matrices [N, inputs, outputs] of its weights, of each layer and part.
MATRICES = {
    "qkv": lambda w: jnp.moveaxis(w, 2, 1).reshape(-1, w.shape[1], w.shape[3] * w.shape[4]),
    "proj": lambda w: w.reshape(len(w), -1, w.shape[-1]),
    "mlp_in": lambda w: w,
    "mlp_out": lambda w: w,
    "linear2": lambda w: w.reshape(w.shape[0] * w.shape[1], -1, w.shape[-1]),
}
MATRICES["linear1"] = MATRICES["qkv"]
COUNTS = dict(qkv=2 * 3, proj=2, mlp_in=2, mlp_out=2, linear1=3 * 7, linear2=3 * 5)  # of them


@cache
def trees():
    """Random weights and a gradient, on the host, of what compiles soon and has each kind of weight
    of the MMDiT, and of a text encoder, of which Muon has nothing."""
    flux = weights.abstract(Flux, CONFIG)[2]
    shapes = {"flux": {name: flux[name] for name in ("img_in", "single", "final")}}
    shapes["flux"]["double"] = {"img": flux["double"]["img"]}
    shapes["t5"] = weights.abstract(weights.MODULES["t5"], tiny.TINY.t5)[2]
    return [jax.tree.map(np.asarray, tiny.filled(shapes, seed)) for seed in (0, 1)]


def name_of(path):
    """The product that a path is the matrices of, if they are Muon's."""
    model, block, *_, name, leaf = path.split("/")[:2] + path.split("/")[-2:]
    is_muons = model == "flux" and block in ("double", "single") and leaf == "kernel"
    return name if is_muons and name in MATRICES else None


def updates(name, gradients, clip=CLIP):
    """{path: array} of what the last of some gradients makes."""
    tx, (w, _) = make_optimizer(clip, name=name), trees()
    state, update = tx.init(w), jax.jit(tx.update)
    for gradient in gradients:
        told, state = update(gradient, state, w)
    return weights.flat(told)


def singular_values(matrices):
    """[N, shorter side], the largest first."""
    return np.linalg.svd(np.asarray(matrices), compute_uv=False)


def test_every_matrix_is_orthogonal():
    """Muon's update of a matrix, of each layer and each part by itself, however loud its gradient,
    has singular values of 0.5 … 1.5 times 0.2 and the root of its longer side, all but as many as
    the gradient hardly has."""
    rng = np.random.default_rng(0)

    def shout(path, x):
        part = 2 if path[-2].key in ("qkv", "linear1") else 1 if path[-2].key == "linear2" else 0
        loud = [n if i in (0, part) else 1 for i, n in enumerate(x.shape)]
        return (x * 10 ** rng.uniform(-2, 2, loud)).astype("float32")

    loud = trees()[1] | {"flux": jax.tree_util.tree_map_with_path(shout, trees()[1]["flux"])}
    found, gradient = {}, weights.flat(loud)
    for path, u in updates("muon", [loud], clip=1e30).items():
        if name := name_of(path):
            found[name], matrices = path, MATRICES[name](u)
            values = singular_values(matrices) / (0.2 * max(matrices.shape[1:]) ** 0.5)
            given = singular_values(MATRICES[name](gradient[path]))
            many = (given > 0.01 * np.linalg.norm(given, axis=1, keepdims=True)).sum(1)
            assert len(values) == COUNTS[name] and (many >= 0.8 * values.shape[1]).all(), path
            assert (values < 1.5).all() and ((values > 0.5).sum(1) >= many).all(), (path, values)
    assert found.keys() == MATRICES.keys()


def test_all_else_is_adams():
    """Biases, norms, embeddings, modulations, the last layer and text encoders move as by Adam
    alone, to the bit, after several steps; for matrices Adam keeps nothing, and Muon one moment."""
    gradients = [jax.tree.map(lambda x, i=i: x * i, trees()[1]) for i in (1.0, -0.2, 3.0)]
    adam, muon = (updates(name, gradients) for name in ("adam", "muon"))
    for path, u in adam.items():
        assert np.array_equal(u, muon[path]) == (name_of(path) is None), path
    state = weights.flat(make_optimizer(CLIP, name="muon").init(trees()[0]))
    for path in adam:
        kept = {key.removesuffix(f"/{path}")[-2:] for key in state if key.endswith(f"/{path}")}
        assert kept == ({"mu"} if name_of(path) else {"mu", "nu"}), path


def test_decay_is_of_all():
    """Weights decay alike, whoever moves them."""
    w = {"flux": {"double": {"mlp_in": {"kernel": jnp.ones((1, 2, 4)), "bias": jnp.ones((1, 4))}}}}
    plain, decayed = (make_optimizer(CLIP, decay, "muon") for decay in (0, 0.25))
    u, v = (tx.update(w, tx.init(w), w)[0] for tx in (plain, decayed))
    jax.tree.map(lambda u, v, w: np.testing.assert_array_equal(v, u + 0.25 * w), u, v, w)


@cache
def begun(text):
    """A State on a mesh, where it lies, and what makes the next of it."""
    mesh, (w, gradient) = make_mesh(parse_mesh(text)), trees()
    tx = make_optimizer(CLIP, name="muon")
    init = partial(init_state, tx=tx, ema=0.9)
    places = shardings(jax.eval_shape(init, w), mesh)
    _, update = make_step(tx, None, places, 0.9)

    def go_on(state):
        state = jax.tree.map(jnp.copy, state)  # it is donated
        with jax.set_mesh(mesh):
            return update(state, put(gradient, mesh), [jnp.ones(8)], np.float32(0.1))[0]

    return jax.jit(init, out_shardings=places)(put(w, mesh)), places, go_on


def stepped(text):
    """State after two updates on a mesh, and where it should lie."""
    state, places, go_on = begun(text)
    return weights.flat(go_on(go_on(state))), weights.flat(places)


@pytest.mark.slow
def test_a_mesh_changes_no_update():
    """Weights and moments on 8 devices, of which some split a matrix's inputs, some its outputs,
    are those on one, to rounding; Muon's moments lie where their weights do, and stay there."""
    (here, _), (there, places) = stepped("1"), stepped("data=2,fsdp=2,tensor=2")
    for path, x in here.items():
        assert there[path].sharding.is_equivalent_to(places[path], x.ndim), path
        np.testing.assert_allclose(
            there[path], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=path
        )
    moments = [path for path in here if "/muon/" in path and "/mu/" in path]
    assert len(moments) == sum(name_of(path) is not None for path in weights.flat(trees()[0])) > 0
    for path in moments:
        assert places[path].spec == places[f"trainable/{path.partition('/mu/')[2]}"].spec
        assert "fsdp" in str(places[path].spec)


def test_planned_moments():
    """At full size, of which nothing is made, Muon's moments are Adam's but for a second of each
    matrix: of 11.9 G numbers 8.7 G."""
    preset = replace(FLUX_FILL, recipe=replace(FLUX_FILL.recipe, rank=0)).learning
    shapes = {"flux": weights.abstract(Flux, preset.flux)[2]}
    mesh, held = make_mesh(parse_mesh("1")), {}
    for name in ("adam", "muon"):
        state = jax.eval_shape(make_optimizer(CLIP, name=name).init, shapes)
        held[name] = plan.on_device(state, mesh, "moments", "float32")
    matrices = sum(x.size for path, x in weights.flat(shapes).items() if name_of(path))
    assert matrices == 19 * 2 * 12 * 3072**2 + 38 * 12 * 3072**2
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert held["adam"] == 4 * (2 * count + 1)  # its steps are counted, too
    assert held["muon"] == 4 * (2 * count - matrices + 3 + 3)  # counters of three, coefficients


def test_muon_goes_on_to_the_bit(tmp_path):
    """What a checkpoint holds of Muon is all of it: a State that was saved and taken up again goes
    on as the one that never was."""
    state, _, go_on = begun("1")
    state = go_on(state)
    checkpoint.save(tmp_path, 1, state)
    _, restored = checkpoint.restore(tmp_path, state)
    after = weights.flat(go_on(state))
    for path, x in weights.flat(go_on(restored)).items():
        np.testing.assert_array_equal(x, after[path], err_msg=path)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(tmp_path):
    """A run by Muon that stopped and went on is the unbroken one."""
    home = make_home(tmp_path / "home")
    change = dict(rank=0, optimizer="muon", mesh=1, batch=2, save_every=2, preview_every=9)
    for out, steps in (("unbroken", 2), ("run", 1), ("run", 2)):
        assert train.main(flags(home, tmp_path / out, **change, steps=steps)) == 0
    states = [
        checkpoint.load_group(tmp_path / out / "checkpoints/2", "") for out in ("run", "unbroken")
    ]
    assert states[0].keys() == states[1].keys() and any("/muon/" in path for path in states[0])
    for path, x in states[0].items():
        np.testing.assert_array_equal(x, states[1][path], err_msg=path)
    losses = [[line["loss"] for line in metrics(tmp_path / out)] for out in ("run", "unbroken")]
    assert losses[0] == losses[1] and len(losses[0]) == 2
