"""Step and transformer on a mesh: the same numbers, and nothing moves but weights and sums."""

import itertools
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import flags, make_home, metrics
from test_sharding import MESHES, MODULES, OF_STATE, abstract
from tiny import filled

import train
from vcloze_jax import flow
from vcloze_jax.config import MINI, CLIPConfig, FluxConfig, T5Config, VAEConfig
from vcloze_jax.devices import make_mesh, parse_mesh, put
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.ops import rope_table
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.sharding import batch_sharding, count_shards, shardings, spec_of
from vcloze_jax.step import Batch, encode_batch, init_state, loss_fn, make_step
from vcloze_jax.storage import weights

# Every kind of layer, at widths that divide over 8 devices.
PRESET = replace(
    MINI,
    flux=FluxConfig(
        width=16,
        heads=2,
        double_blocks=2,
        single_blocks=2,
        text_width=16,
        vec_width=16,
        axes_dim=(2, 2, 4),
        rank=8,
        remat="none",
    ),
    vae=VAEConfig(channels=(4, 4, 4, 4), layers=1, groups=2),
    t5=T5Config(vocab=32, width=16, head_dim=8, heads=2, mlp=32, layers=2, max_length=8),
    clip=CLIPConfig(vocab=32, width=16, heads=2, mlp=32, layers=2, max_length=8, eos=31),
)


# --- the training step on a mesh ---


@cache
def tiny():
    """graphdefs, trainable adapter and frozen base of PRESET, random."""
    graphdefs = {name: weights.abstract(cls, getattr(PRESET, name))[0] for name, cls in MODULES}
    # On the host, because a step donates the arrays that it is given.
    trees = (jax.tree.map(np.asarray, filled(tree)) for tree in abstract(PRESET))
    return graphdefs, *trees


def host_batch():
    """Eight grids of two rows of 16 x 32, the right cell of the query masked more or less."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (2, 8, 16, 32, 3), np.uint8)
    mask = np.zeros((8, 16, 32), bool)
    for i in range(8):
        mask[i, :, 16 + i :] = True
    t5_ids, clip_ids = rng.integers(2, 31, (2, 8, 8)).astype(np.int32)
    clip_ids[:, -1] = 31
    ids = np.zeros((12, 3))
    ids[8:, :] = [(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1)]
    pe = rope_table(ids[None], PRESET.flux.axes_dim, PRESET.flux.theta)
    rows = (pixels[0], None), (pixels[1], mask)
    return rows, t5_ids, clip_ids, np.arange(8, dtype=np.int32), pe


@cache
def step(text):
    """Loss and gradients of a step on a mesh, what it takes to go on with the update, and the
    collectives of the programs that encode and that learn."""
    mesh = make_mesh(parse_mesh(text))
    graphdefs, adapter, base = tiny()
    adapter, base = put(adapter, mesh), put(base, mesh)
    *batch, pe = host_batch()
    batch = Batch(*jax.device_put(tuple(batch), batch_sharding(mesh)), pe)
    tx, statics = make_optimizer(2.0), dict(graphdefs=graphdefs, dtype=jnp.float32)
    init = partial(init_state, tx=tx, ema=0.9)
    places = shardings(jax.eval_shape(init, adapter), mesh)
    loss = partial(loss_fn, region="target", **statics)
    accumulate, update = make_step(tx, loss, places, 0.9)
    zeros = jax.device_put(jax.tree.map(np.zeros_like, tiny()[1]), places.trainable)
    encode = jax.jit(partial(encode_batch, preset=PRESET, **statics))
    with jax.set_mesh(mesh):
        encoded = compiled(encode, base, batch, jax.random.key(0))
        noisy = encoded(base, batch, jax.random.key(0))
        learned = compiled(accumulate, adapter, base, zeros, noisy)
        losses, grads = learned(adapter, base, zeros, noisy)
    host = weights.flat(jax.tree.map(np.asarray, grads))
    state = jax.jit(init, out_shardings=places)(adapter)
    value = float(losses["target"].mean())
    args = update, state, grads, [losses["target"]], np.float32(0.1)
    return value, host, args, collectives(encoded), collectives(learned)


def compiled(f, *args):
    """The program of this call."""
    return f.lower(*args).compile()


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(program):
    """(kind, the line of the program) of all by which its devices exchange numbers."""
    lines = program.as_text().splitlines()
    found = ((re.search(rf" ({KINDS})(-start)?\(", line), line) for line in lines)
    return [(match[1], line) for match, line in found if match]


def equal_to_rounding(there, here):
    """Devices add partial sums, so that float32 rounds in another order: 1e-5 of the loss and of
    each array's largest gradient, of which none is zero."""
    np.testing.assert_allclose(there[0], here[0], rtol=1e-5)
    for path, grad in here[1].items():
        atol = 1e-5 * np.abs(grad).max()
        assert atol > 0, path
        np.testing.assert_allclose(there[1][path], grad, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("text", (MESHES[0], MESHES[2], OF_STATE[0]))
def test_a_mesh_changes_no_number(text):
    """Loss and gradients of the whole step on 8 devices are those on one."""
    equal_to_rounding(step(text), step("1"))


def test_weights_are_gathered_and_sums_added():
    """On every mesh that is all that the devices of a step exchange, also where it encodes
    pictures: nothing changes its place."""
    for text in (MESHES[0], MESHES[2], OF_STATE[0]):
        *_, encoded, learned = step(text)
        for found in (encoded, learned):
            kinds = {kind for kind, _ in found}
            assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"}, found
        assert "all-gather" in dict(learned)


@pytest.mark.parametrize("text", (MESHES[2], OF_STATE[0]))
def test_state_stays_where_the_table_says(text):
    """After a step adapter and optimizer state are sharded as before: nothing gathers silently."""
    _, _, (update, *args), *_ = step(text)
    for tree in compiled(update, *args)(*args)[:2]:
        places = weights.flat(shardings(tree, make_mesh(parse_mesh(text))))
        for path, leaf in weights.flat(tree).items():
            assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), path


@cache
def encode_on_one():
    """encode_batch of PRESET, for one device."""
    statics = dict(graphdefs=tiny()[0], preset=PRESET, dtype=jnp.float32)
    return jax.jit(partial(encode_batch, **statics))


def test_regions_of_the_loss(monkeypatch):
    """`target` weighs each token by its masked share, `grid` all tokens of all rows the same."""
    monkeypatch.setattr(flow, "masked_loss", lambda out, target, weight: weight)
    graphdefs, adapter, base = tiny()
    noisy = encode_on_one()(base, Batch(*host_batch()), jax.random.key(0))
    loss = partial(loss_fn, region="target", graphdefs=graphdefs, dtype=jnp.float32)
    _, weight = jax.jit(loss)(adapter, base, noisy)
    np.testing.assert_array_equal(weight["grid"], np.ones((8, 4)))
    expected = np.zeros((8, 4))
    expected[:, 3] = 1 - np.arange(8) / 16
    np.testing.assert_allclose(weight["target"], expected, rtol=1e-6)


def test_noise_is_drawn_for_each_grid_alone():
    """What is drawn for a grid depends on its number in the run, not on the grids beside it."""
    (_, _, base), encode_some = tiny(), encode_on_one()
    rows, *ids, numbers, pe = host_batch()
    whole = encode_some(base, Batch(rows, *ids, numbers, pe), jax.random.key(0))
    part = [(pixels[2:4], None if mask is None else mask[2:4]) for pixels, mask in rows]
    half = encode_some(
        base, Batch(part, *(x[2:4] for x in ids), numbers[2:4], pe), jax.random.key(0)
    )
    for name in ("t", "velocity", "x_t"):
        here, there = getattr(half, name), getattr(whole, name)[2:4]
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)  # the encoder's sums
    assert len(set(np.asarray(whole.t).tolist())) == 8


# --- the transformer on every mesh ---

# Mini's widths: the loss was wrong there, on one of these meshes only, for one row only.
FLUX = replace(MINI.flux, double_blocks=1, single_blocks=2, rank=MINI.recipe.rank)
ROWS = {1: 32, 2: 66, 3: 99}  # image tokens; with an odd count, and 96 of text, 195 in all
MESHES_OF_FLUX = "8", "data=4,fsdp=2", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"
MESHES_OF_FLUX += "state=8", "state=2,fsdp=4", "state=2,fsdp=2,tensor=2"
# Mesh, rows, samples on each device, and remat, of which each mesh has every kind.
PLACES, REMATS = itertools.product(MESHES_OF_FLUX, ROWS, (1, 2)), ("none", "full", "light")
EVERY = list(zip(PLACES, itertools.cycle(REMATS), strict=False))
FAST = [  # of two shapes, each once on one device
    (("8", 1, 1), "none"),
    (("data=4,fsdp=2", 3, 1), "full"),
    (("data=2,fsdp=2,tensor=2", 3, 2), "light"),
    (("fsdp=4,tensor=2", 1, 2), "full"),
    (("state=8", 3, 1), "full"),
]


@cache
def weights_of_flux():
    """Random adapter and base of FLUX, on the host: a mesh takes them without a program."""
    _, adapter, base = weights.abstract(Flux, FLUX)
    return jax.tree.map(np.asarray, (filled(adapter), filled(base, 1)))


@cache
def transformer(text, tokens, batch, remat):
    """Loss, gradients and collectives of the MMDiT alone."""
    mesh, rng = make_mesh(parse_mesh(text)), np.random.default_rng(3)
    graphdef, _, _ = weights.abstract(Flux, replace(FLUX, remat=remat))
    adapter, base = (put(tree, mesh, "flux/") for tree in weights_of_flux())
    txt = rng.standard_normal((batch, 96, FLUX.text_width), np.float32)
    img = rng.standard_normal((batch, tokens, FLUX.in_channels), np.float32)
    pooled = rng.standard_normal((batch, FLUX.vec_width), np.float32)
    t = rng.uniform(size=batch).astype(np.float32)
    ids = np.arange(96 + tokens)[:, None] // [96, 8, 1] % [4, 8, 8]
    pe = rope_table(ids[None], FLUX.axes_dim, FLUX.theta)

    @jax.jit
    @jax.value_and_grad
    def loss(adapter, base, img, txt, pooled, t):
        model = nnx.merge(graphdef, adapter, base)
        return jnp.square(model(img, txt, model.modulation(t, 30 * t, pooled), pe)).mean()

    inputs = jax.device_put((img, txt, pooled, t), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        program = compiled(loss, adapter, base, *inputs)
        value, grads = program(adapter, base, *inputs)
    return float(value), weights.flat(jax.tree.map(np.asarray, grads)), collectives(program)


@pytest.mark.parametrize(
    ("text", "rows", "samples", "remat"),
    [pytest.param(*c, r, marks=[] if (c, r) in FAST else pytest.mark.slow) for c, r in EVERY],
)
def test_the_transformer_on_every_mesh(text, rows, samples, remat):
    """Loss and every gradient are those of one device without remat, and no activation moves from
    device to device: weights are gathered over fsdp, and sums added, nothing else. The kernels of
    modulations, which are of all layers at once, and their B stay where they are."""
    sizes = parse_mesh(text)
    batch = samples * count_shards(make_mesh(sizes))
    there = transformer(text, ROWS[rows], batch, remat)
    equal_to_rounding(there, transformer("1", ROWS[rows], batch, "none"))
    assert {kind for kind, _ in there[2]} <= {"all-gather", "all-reduce", "reduce-scatter"}
    _, adapter, base = weights.abstract(Flux, FLUX)
    for path, x in (weights.flat(adapter) | weights.flat(base)).items():
        spec = spec_of(f"flux/{path}")
        kept = "tensor" in str(spec) and (sizes["tensor"] > 1 or "mod/" in path)
        if kept and not path.startswith(
            "final/"
        ):  # which is of the shape of half a layer of an MLP
            whole = {squeeze(x.shape), squeeze(x.shape[-len(spec) :])}
            assert not gathers(there[2]) & whole, path


def test_no_base_is_gathered_where_it_is_whole():
    """On a mesh of state the devices exchange an adapter and sums: nothing that is gathered has the
    shape of a weight of the base, of a layer or of a stack, unless a part of the adapter has it."""
    found = gathers(transformer("state=8", ROWS[3], 8, "full")[2])
    _, adapter, base = weights.abstract(Flux, FLUX)
    shapes = [
        {squeeze(shape) for x in jax.tree.leaves(tree) for shape in (x.shape, x.shape[1:])}
        for tree in (base, adapter)
    ]
    assert found and not found & (shapes[0] - shapes[1])


def gathers(found):
    """The shapes of all that is gathered, without axes of length 1."""
    lines = (line.split(" all-gather")[0] for kind, line in found if kind == "all-gather")
    texts = (text for line in lines for text in re.findall(r"\w\[([\d,]*)\]", line))
    return {squeeze(map(int, text.split(","))) for text in texts if text}


def squeeze(shape):
    return tuple(n for n in shape if n > 1)


@pytest.mark.slow
def test_a_base_that_is_whole(tmp_path):
    """Ten steps on a mesh whose devices all hold the base, and split what is learnt, are those of
    one that splits both, to rounding; a run may change from one to the other as it goes on."""
    home = make_home(tmp_path / "home")
    argv = dict(save_every=5, preview_every=10)
    assert train.main(flags(home, tmp_path / "split", mesh=4, steps=10, **argv)) == 0
    for steps, mesh in ((5, "state=4"), (10, "state=2,fsdp=2")):
        assert train.main(flags(home, tmp_path / "whole", mesh=mesh, steps=steps, **argv)) == 0
    here, there = (metrics(tmp_path / name) for name in ("whole", "split"))
    assert [line["step"] for line in here] == [*range(1, 11)]
    for ours, theirs in zip(here, there, strict=True):
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5)
