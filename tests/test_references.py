"""References that are computed once for all steps: what is painted is what the plain loop paints,
with less work; who they are, and that nothing gets to them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from placed import MESH, grid, inputs, model, stored
from test_mmdit import TEXT
from test_placement_grids import SIXTH, SMALL

from vcloze_jax import kernels, plan, references
from vcloze_jax.conditioning import Context
from vcloze_jax.config import MINI
from vcloze_jax.devices import make_mesh
from vcloze_jax.grid import Grid, Row, Spec
from vcloze_jax.inputs.papers import FRAMES, KLEIN, PLACEMENTS
from vcloze_jax.model.ops import attention
from vcloze_jax.painter import Painter
from vcloze_jax.placement import QUERY, TARGET, kind_of
from vcloze_jax.references import (
    OncePainter,
    are_constant,
    choose_painter,
    prepare_parts,
)
from vcloze_jax.storage import weights
from vcloze_jax.storage.models import LazyModels

# Mini's transformer, cut to 64 channels, between encoders that compile fast.
SIZES = dict(in_channels=64, text_width=16, vec_width=16)
PRESET = replace(tiny.TINY, flux=replace(MINI.flux, **SIZES))


@pytest.mark.parametrize("placement", [*PLACEMENTS.values(), SIXTH], ids=lambda p: p.name)
def test_who_is_constant(placement):
    """Clean tokens that are told time 0 and see themselves alone, where all else sees all: those of
    klein, and of a placement like it; not so once any of that is otherwise."""
    assert are_constant(placement) == (placement.name in ("klein", "sixth"))
    is_ours = choose_painter(replace(PRESET, flux=replace(PRESET.flux, placement=placement)))
    assert (is_ours is OncePainter) == are_constant(placement)


@pytest.mark.parametrize(
    "change",
    [
        dict(time=("t",) * 5),
        dict(time=("0", "0", "0", "0", "t")),
        dict(attends=("11111", "01111", "01110", "01110", "11111")),
        dict(attends=("11111", "01110", "01110", "01110", "00111")),
        dict(attends=("11111", "01000", "01110", "01110", "11111")),
        dict(branch=FRAMES.branch),
        dict(embeds=True),
    ],
)
def test_who_is_not(change):
    """Each of what must hold is asked for."""
    assert not are_constant(replace(KLEIN, **change))


# --- a step ---


def batch(dtype=jnp.float32, flux=None):
    """The fixture's two samples in klein, in a dtype: model, tokens, modulation, Context."""
    flux = flux or model(KLEIN)
    args = inputs(KLEIN)
    cast = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    mod = flux.modulation(args["t"], args["guidance"], cast(args["pooled"]))
    pe = tuple(np.broadcast_to(x, (2, *x.shape[1:])) for x in args["pe"])
    nothing, lengths = jnp.zeros((2, 8, 0), dtype), np.full(2, TEXT + 8, np.int32)
    rest = cast(args["pooled"]), args["guidance"], pe, lengths, args["segments"]
    return flux, args["img"], mod, Context(nothing, cast(args["txt"]), *rest)


@jax.jit
def prepared_step(flux, x, mod, context):
    return references.prepared_velocity(flux, x, mod, prepare_parts(flux, x, context, (4, 10)))


def test_velocity_is_that_of_torch():
    """Of the target's tokens it is the fixture's, under one mask (2e-5 of float32 in another order,
    as there); what is clean stands still."""
    out, is_target = prepared_step(*batch()), stored()["klein/segments"] == TARGET
    assert tiny.relative(out[:, is_target], stored()["klein/out"][:, is_target]) < 2e-5
    assert not np.any(out[:, ~is_target])


def test_in_bfloat16():
    """Against torch in float32 it loses no more than test_mmdit's budget, 1.5 times what diffusers
    does; and that it does lose."""
    out, is_target = prepared_step(*batch(jnp.bfloat16)), stored()["klein/segments"] == TARGET
    error = tiny.relative(out[:, is_target], stored()["klein/out"][:, is_target])
    assert 1e-4 < error < 1.5 * tiny.stored()["out/fill_bf16"]


def test_nothing_gets_to_a_reference():
    """What is kept of references has exactly no gradient by a noisy token or the text, and some by
    their own tokens."""
    flux, x, _, context = batch()
    is_target = stored()["klein/segments"] == TARGET

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(x, txt):
        prepared = prepare_parts(flux, x, context._replace(txt=txt), (4, 10))
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(prepared.kept))

    of_x, of_txt = gradient(jnp.asarray(x), context.txt)
    assert not np.any(of_txt) and not np.any(of_x[:, is_target])
    assert np.all(np.any(of_x[:, ~is_target] != 0, -1))


def test_a_step_is_less_work():
    """Of a grid of 3 x 2 of mini's cells, one of them asked, a step's program has at most 0.6 of
    the FLOPs, as it has 112 of 192 tokens; what comes before has no more than the rest."""
    preset = replace(PRESET, flux=replace(PRESET.flux, placement=KLEIN))
    once, ours = references.parts_flops(preset, 96, (16, 80))
    plain = plan.flux_flops(preset, 96)
    assert ours < 0.6 * plain and once + ours < 1.05 * plain


@pytest.mark.slow
def test_it_is_planned(monkeypatch):
    """A plan tells what is done once, what a step is, and what is kept between."""
    for name in ("flux_temporaries", "temporaries"):  # which are compiled for
        monkeypatch.setattr(plan, name, lambda *_: 0)
    small = replace(SMALL, flux=replace(SMALL.flux, placement=KLEIN))
    first, *rest = plan.sampling(small, SPECS[:1], MESH).splitlines()
    once, step = references.parts_flops(small, 32, (16, 16))
    told = f"{plan.si(once, 'FLOP')} once, 3 steps of {plan.si(step, 'FLOP')}"
    assert first.endswith(f"8 image + 32 text tokens, bucket 32, {told}")
    layers = small.flux.double_blocks + small.flux.single_blocks
    kept = plan.si(2 * 16 * layers * small.flux.width * 4, "B")
    assert any(f"activations {kept}" in line for line in rest)


@pytest.mark.parametrize("tokens", [(6, 10), (7, 10), (6, 11)])
def test_cudnn_gets_more_keys_than_queries(monkeypatch, tokens):
    """Its call says what the formula computes under one row of who is real, for even numbers."""

    def formula(q, k, v, implementation, key_value_seq_lengths, mask):
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0 and mask.shape[2:] == (q.shape[1], k.shape[1])
        return attention(q, k, v, key_value_seq_lengths, mask[:, 0, :1])

    monkeypatch.setattr(jax.nn, "dot_product_attention", formula)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 1, 8), np.float32) for n in (*tokens, tokens[1]))
    real = jnp.asarray(rng.random((2, 1, tokens[1])) < 0.5).at[:, :, 0].set(True)
    expected = attention(q, k, v, None, real)
    assert expected.shape == q.shape
    np.testing.assert_allclose(kernels.cudnn(q, k, v, None, real), expected, atol=1e-6)


# --- whole grids ---


def both_blank():
    """The query's cells are both asked."""
    asked = grid()
    asked.query.mask[:] = True
    return asked


GRIDS = (grid(), grid(blank=0), both_blank(), Grid((grid(blank=0).query,), 2))
SPECS = [Spec(each, "a fox", 3, 4.0, seed) for seed, each in enumerate(GRIDS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of 64 channels."""
    return tiny.weights_folder(tmp_path_factory.mktemp("klein") / "weights", preset=SMALL)


def ready(folder, cls=OncePainter, mesh=MESH, placement=KLEIN, offload=False):
    """A Painter of a class, in a placement."""
    preset = weights.checked_grid_preset(folder, placement)
    models = LazyModels(folder, preset, [], mesh, offload)
    return cls(preset, models, models.text_reader(), mesh)


@pytest.fixture(scope="module")
def painter(folder):
    return ready(folder)


@pytest.fixture(scope="module")
def plain(folder):
    """One that asks of all tokens at every step, under a mask."""
    return ready(folder, Painter)


@pytest.fixture(scope="module")
def once(painter):
    """What is painted, and the labels of its batches."""
    labels = []
    return painter(SPECS, lambda steps, label: labels.append(label) or steps), labels


def assert_alike(ours, theirs):
    """1e-5 of float32, whose sums are of other lengths; what is given, to the last bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.latents.shape == other.latents.shape
        assert tiny.relative(one.latents, other.latents) < 1e-5
        np.testing.assert_array_equal(one.latents[clean(one)], other.latents[clean(other)])


def test_once_is_every_time(once, plain):
    """Unlike grids, with one target cell or two, paint as one padded batch what the plain loop
    paints."""
    ours, labels = once
    assert labels == ["4 x 32 tokens"]
    assert_alike(ours, plain(SPECS))


@pytest.mark.slow
@pytest.mark.parametrize("placement", [KLEIN, SIXTH], ids=lambda p: p.name)
def test_once_is_every_time_on_mini(tmp_path, placement):
    """The same by mini's transformer, and in a placement like klein."""
    folder = tiny.weights_folder(tmp_path / "mini", preset=PRESET)
    assert_alike(*(ready(folder, c, placement=placement)(SPECS) for c in (OncePainter, Painter)))


def clean(canvas):
    return np.array(KLEIN.clean)[kind_of(canvas.spec.grid.segments(KLEIN))]


def test_alone_is_in_a_batch(painter, once):
    """One grid by itself is what it is beside others."""
    assert_alike(painter(SPECS[2:3]), once[0][2:3])


def test_nothing_given(painter, plain):
    """A grid without a reference is painted beside one that has some, each as its own batch."""
    blank = Row(np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), bool))
    specs = [Spec(Grid((blank,), 1), "a fox", 3, 4.0), SPECS[0]]
    assert_alike(painter(specs), plain(specs))


def test_on_a_mesh(folder, once):
    """Eight devices, two of them for each sample's heads, paint what one paints."""
    assert_alike(ready(folder, mesh=make_mesh(dict(data=2, fsdp=2, tensor=2)))(SPECS), once[0])


def test_offload(folder, once):
    """Blocks that wait in host memory change no bit."""
    for one, other in zip(once[0], ready(folder, offload=True)(SPECS), strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)


def test_who_looks_on_sees_whole_grids(painter):
    """Whatever a step computes, its watcher is told of all tokens; what is given stands still."""
    seen = []
    canvases = painter(SPECS, watch=lambda canvases, i, *latents: seen.append(latents[-1]))
    assert [latents.shape for latents in seen] == [(4, 32, 64)] * 3
    for before, after in zip(seen, seen[1:], strict=False):
        for canvas, was, now in zip(canvases, before, after, strict=True):
            moved = np.any(was != now, -1)[: len(canvas.latents)]
            np.testing.assert_array_equal(moved, ~clean(canvas))
    np.testing.assert_array_equal(seen[-1][0][:8], canvases[0].latents)


# --- against diffusers itself ---


@pytest.mark.parity
def test_who_sees_whom_is_as_in_klein():
    """Attention under klein's table, and of kept keys and values, is that of diffusers' blocks:
    of text, references and noisy tokens in their order, and from their cache."""
    pytest.importorskip("diffusers")
    import torch
    from diffusers.models.transformers import transformer_flux2 as flux2

    rng, counts = np.random.default_rng(0), (3, 5, 4)
    q, k, v = rng.standard_normal((3, 2, 12, 2, 8)).astype(np.float32)
    segments = np.repeat([0, QUERY, TARGET], counts)
    seen = np.array(KLEIN.sees)[:, segments][None].repeat(2, 0), segments[None].repeat(2, 0)
    theirs = partial(flux2._flux2_kv_causal_attention, num_txt_tokens=3)
    whole = theirs(*map(torch.tensor, (q, k, v)), num_ref_tokens=5)
    np.testing.assert_allclose(attention(q, k, v, None, *seen), whole, atol=1e-6)
    is_reference = segments == QUERY
    cache = flux2.Flux2KVLayerCache()
    cache.store(*(torch.tensor(x[:, is_reference]) for x in (k, v)))
    few = [torch.tensor(x[:, ~is_reference]) for x in (q, k, v)]
    again = theirs(*few, num_ref_tokens=0, kv_cache=cache)
    real = np.ones((2, 1, 12), bool)
    ours = attention(q[:, ~is_reference], k, v, None, real)
    np.testing.assert_allclose(ours, again, atol=1e-6)
