"""Placements: what each costs and computes, who may influence whom, and that one is one dataclass.

The velocities are those of torch (scripts/fixtures_placements.py), stored and live.
"""

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_mmdit
import tiny
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from test_mmdit import TEXT, close

from vcloze_jax import conditioning, kernels
from vcloze_jax.conditioning import Context, segment_table
from vcloze_jax.data.sources import Example
from vcloze_jax.devices import kernel_on, make_mesh
from vcloze_jax.grid import Grid, Row, Spec
from vcloze_jax.model.mmdit import Flux, Modulation
from vcloze_jax.model.ops import attention, choose_kernel, timestep_embedding
from vcloze_jax.painter import Painter
from vcloze_jax.placement import (
    DEV,
    EXAMPLE,
    EXAMPLE_TARGET,
    FILL,
    FRAMES,
    KONTEXT,
    PLACEMENTS,
    QUERY,
    TARGET,
    Placement,
)
from vcloze_jax.step import encode_batch, loss_fn, make_batch, purpose_key, spread_rows
from vcloze_jax.storage import weights
from vcloze_jax.storage.models import LazyModels, grow

DATA = Path(__file__).parent / "data"
MESH = make_mesh(dict(data=1, fsdp=1, tensor=1))
TORCH = DEV, KONTEXT, FRAMES  # those of which the fixture holds a velocity
CLEAN = [placement for placement in PLACEMENTS.values() if any(placement.clean)]
NOISE = replace(FILL, enters=("text", "noise", "noise", "noise", "noise"))  # FLUX.1-dev's own
NAME = dict(ids=lambda placement: placement.name)


@cache
def stored():
    return load_file(DATA / "placements.safetensors")


@cache
def base(placement, **changes):
    """The fixture's transformer of 64 channels, or a placement's, as it begins."""
    flux = tiny.flux(in_channels=placement.channels, **changes)
    return grow(flux, replace(flux.config, placement=placement), MESH)


def model(placement):
    """The same, with the fixture's weights where the placement has some of its own."""
    graphdef, state = nnx.split(base(placement))
    tree, own = nnx.to_pure_dict(state), {k: x for k, x in stored().items() if "cond/" in k}
    if placement.embeds:
        dense = lambda name: (own[f"cond/{name}.weight"].T, own[f"cond/{name}.bias"])  # noqa: E731
        at = lambda i: dense(f"norms.{i}.linear")  # noqa: E731
        kinds = (tree["double"]["img"], range(2)), (tree["single"], range(2, 4))
        for stream, layers in kinds:
            arrays = map(np.stack, zip(*map(at, layers), strict=True))
            stream["cond_mod"] = dict(zip(("kernel", "bias"), arrays, strict=True))
        tree["cond_in"] = dict(zip(("kernel", "bias"), dense("embedding"), strict=True))
    return nnx.merge(graphdef, tiny.cast(tree, jnp.float32))


def grid(blank=1):
    """The fixture's: two rows of two cells, the query's cell of that column blank."""
    rng, rows = np.random.default_rng(0), []
    for h, w in ((32, 32), (16, 64)):
        rows.append(Row(rng.integers(0, 256, (h, w, 3), np.uint8), np.zeros((h, w), bool)))
    rows[1].mask[:, blank * 32 : blank * 32 + 32] = True
    return Grid(tuple(rows), 2)


def inputs(placement, channels=64):
    """Arguments of test_mmdit.velocity but the model, and its segments."""
    args = test_mmdit.inputs()
    pe = test_mmdit.table(grid().ids(placement))
    segments = segment_table([grid()] * 2, placement, 8)
    args["img"] = args["img"][..., :channels]
    return args | dict(pe=pe, segments=segments)


@jax.jit
def velocity(flux, img, txt, pooled, t, guidance, pe, segments, lengths=None, **_):
    return flux(img, txt, flux.modulation(t, guidance, pooled), pe, lengths, segments)


def run(flux, ids=None, **args):
    return velocity(flux, **args)


# --- what a grid is to a placement ---


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_segments_and_positions(placement):
    """They are those of the fixture: rows as the authors count them, frames from 0, references
    from 1 with the target at 0, as FluxKontextPipeline has it."""
    np.testing.assert_array_equal(
        grid().segments(placement), stored()[f"{placement.name}/segments"]
    )
    np.testing.assert_array_equal(grid().ids(placement), stored()[f"{placement.name}/ids"])


def test_any_cell_may_be_the_target():
    """Blank in the first column: examples' targets are there too, and the target's axis is 0
    wherever it stands; what is partly masked is, token by token, a target or not."""
    first = grid(blank=0)
    across = [EXAMPLE_TARGET, EXAMPLE]
    assert first.segments().tolist() == [*across, *across, TARGET, TARGET, QUERY, QUERY]
    assert first.ids(KONTEXT)[:, 0].tolist() == [1, 1, 2, 2, 0, 0, 3, 3]
    part = grid()
    part.query.mask[:, 48:] = False
    assert part.segments()[4:].tolist() == [QUERY, QUERY, TARGET, QUERY]
    padded = segment_table([part], DEV, 10)
    assert padded.shape == (1, 10) and not padded[0, 8:].any()
    assert segment_table([part], FILL, 10) is None


def test_canvas_is_one_picture():
    """Without rows: AnyRefill's positions of any grid are those of stock Fill's one picture as high
    as all rows."""
    square = Row(np.zeros((32, 64, 3), np.uint8), np.zeros((32, 64), bool))
    tall = Row(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool))
    ids = Grid((square, square), 2).ids(PLACEMENTS["anyrefill"])
    np.testing.assert_array_equal(ids, Grid((tall,), 1, first_row=0).ids())


@pytest.mark.parametrize("placement", [KONTEXT, FRAMES], **NAME)
def test_cells_apart_are_pictures(placement):
    """Each cell is encoded by itself, all cells once, in the order of their tokens."""
    pictures = grid().pictures(placement)
    assert [p.pixels.shape[:2] for p in pictures] == [(32, 16), (32, 16), (16, 32), (16, 32)]
    again = [np.hstack([p.pixels for p in pictures[i : i + 2]]) for i in (0, 2)]
    for row, cells in zip(grid().rows, again, strict=True):
        np.testing.assert_array_equal(row.pixels, cells)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), **NAME)
def test_a_placement_is_whole(placement):
    """Every table has an entry a segment, a segment sees itself, and what is clean is what is not
    the target."""
    tables = placement.enters, placement.time, placement.branch, placement.attends, *placement.sees
    assert {len(table) for table in tables} == {5}
    assert all(row[i] for i, row in enumerate(placement.sees))
    assert placement.enters[TARGET] in ("canvas", "noise") and not placement.clean[0]
    assert len(placement.vectors) == {"dev": 2, "frames": 2}.get(placement.name, 1)


# --- what the default costs: nothing ---


def plain(flux, img, txt, pooled, t, guidance, pe, lengths):
    """FLUX without placements, as it was written before there were any."""
    vec = flux.time_in(timestep_embedding(t)) + flux.vector_in(pooled.astype(jnp.float32))
    vec = jax.nn.silu(vec + flux.guidance_in(timestep_embedding(guidance))).astype(pooled.dtype)
    each, double = jax.vmap(lambda layer: layer(vec)), flux.double
    mods = each(double.img.mod), each(double.txt.mod), each(flux.single.mod)
    mod = Modulation(*mods, flux.final.mod(vec))
    img, txt = flux.img_in(img), flux.txt_in(txt)
    T = txt.shape[1]
    double = lambda x, layer: (layer[0](*x, *layer[1:], pe, (lengths,)), None)  # noqa: E731
    (img, txt), _ = jax.lax.scan(double, (img, txt), (flux.double, mod.img, mod.txt), unroll=True)
    single = lambda x, layer: (layer[0](x, layer[1], pe, (lengths,)), None)  # noqa: E731
    x = jnp.concatenate([txt, img], 1)
    x, _ = jax.lax.scan(single, x, (flux.single, mod.single), unroll=True)
    return flux.final(x[:, T:], mod.final)


def operations(function, *args):
    """What a program is lowered to, by kind of operation, and its FLOPs."""
    lowered = jax.jit(function).lower(*args)
    words = (
        line.split("=")[1].split()[0] for line in lowered.as_text().splitlines() if "= " in line
    )
    return Counter(words), lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("placement", [FILL, PLACEMENTS["anyrefill"]], **NAME)
@pytest.mark.parametrize("lengths", [None, np.int32([11, 9])], ids=["whole", "padded"])
def test_a_canvas_costs_nothing(placement, lengths):
    """Its program has the operations of one that knows no placement, as many FLOPs, and gives the
    same bits: no token has a vector of its own, and no attention a mask."""
    args = inputs(placement, 384)
    assert args.pop("segments") is None
    args = [args[name] for name in ("img", "txt", "pooled", "t", "guidance", "pe")]
    ours = lambda flux, *args: test_mmdit.velocity(flux, *args)  # noqa: E731
    flux = base(placement)
    assert operations(ours, flux, *args, lengths) == operations(plain, flux, *args, lengths)
    out, expected = (jax.jit(f)(flux, *args, lengths) for f in (ours, plain))
    np.testing.assert_array_equal(out, expected)


def test_one_vector_is_todays_model():
    """A placement of one vector that masks nothing is, to the last bit, the model without it."""
    args = inputs(KONTEXT)
    today = test_mmdit.compiled(base(NOISE), *list_args(args))
    np.testing.assert_array_equal(run(base(KONTEXT), **args), today)


def list_args(args):
    return [args[name] for name in ("img", "txt", "pooled", "t", "guidance", "pe")]


# --- what others compute ---


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_velocity_is_that_of_torch(placement):
    """diffusers' blocks, each token with its own norm, under a mask: of all tokens, clean ones too
    (2e-5 of float32 in another order, as in test_mmdit)."""
    ours = run(model(placement), **inputs(placement))
    assert tiny.relative(ours, stored()[f"{placement.name}/out"]) < 2e-5


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_padding_changes_nothing(placement):
    """Tokens padded on the right, with anything, give the unpadded velocity."""
    args, flux = inputs(placement), model(placement)
    expected = run(flux, **args)
    args["img"] = jnp.pad(args["img"], ((0, 0), (0, 4), (0, 0)), constant_values=100)
    args["pe"] = [np.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0))) for x in args["pe"]]
    args["segments"] = segment_table([grid()] * 2, placement, 12)
    out = run(flux, lengths=np.full(2, TEXT + 8, np.int32), **args)
    close(out[:, :8], expected)


@pytest.mark.parametrize("remat", ["light", "full"])
def test_remat_changes_nothing(remat):
    """Gradients of a placement with vectors, a mask and an embedding are the same."""

    @partial(jax.jit, static_argnums=0)
    def gradient(graphdef, state, args):
        loss = lambda state: jnp.square(velocity(nnx.merge(graphdef, state), **args)).mean()  # noqa: E731
        return jax.grad(loss)(state)

    args, flux = inputs(FRAMES), model(FRAMES)
    args.pop("ids")
    plain, again = (
        gradient(nnx.graphdef(base(FRAMES, remat=way)), nnx.state(flux), args)
        for way in ("none", remat)
    )
    jax.tree.map(lambda a, b: close(b, a, 2e-5), plain, again)


def test_clean_tokens_are_told_time_0():
    """What modulates them is FLUX's own formula at t = 0, and that of the others at t: vector by
    vector, and as a whole where t is 0 (black-forest-labs/flux:src/flux/model.py)."""
    args = inputs(DEV)
    plain, dev = base(NOISE), base(DEV)
    rest = args["guidance"], args["pooled"]
    modulation = jax.jit(lambda flux, t: flux.modulation(t, *rest))
    ours = modulation(dev, args["t"])
    for k, (_, time) in enumerate(DEV.vectors):
        theirs = modulation(plain, args["t"] * (time == "t"))
        for name in ("img", "single", "final"):
            close(getattr(ours, name)[..., k, :], getattr(theirs, name))
    args["t"] = np.zeros(2, np.float32)
    close(run(dev, **args), test_mmdit.compiled(plain, *list_args(args)))


def test_a_third_branch_begins_as_a_copy():
    """Before a step the condition's branch and embedding change nothing, also with an adapter,
    whose B is zero; after one that moves only them, they do."""
    args = inputs(FRAMES)
    alone = replace(FRAMES, branch=FILL.branch, embeds=False)
    expected = run(base(alone), **args)
    close(run(base(FRAMES), **args), expected, 1e-6)
    graphdef, adapter, _ = weights.abstract(Flux, replace(base(FRAMES).config, rank=2))
    adapter = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, float(path[-1].key == "lora_a")), adapter
    )
    frozen = nnx.to_pure_dict(nnx.state(base(FRAMES)))
    close(run(nnx.merge(graphdef, adapter, frozen), **args), expected, 1e-6)
    for part in (adapter["cond_in"], adapter["single"]["cond_mod"]):
        zeros = part["lora_b"]
        part["lora_b"] = jax.random.normal(jax.random.key(0), zeros.shape)
        assert np.abs(run(nnx.merge(graphdef, adapter, frozen), **args) - expected).max() > 1e-3
        part["lora_b"] = zeros


# --- who may influence whom ---


@pytest.mark.parametrize("placement", [FRAMES, replace(DEV, attends=("11111",) * 4 + ("01111",))])
def test_a_forbidden_pair_has_no_gradient(placement):
    """In a block, what a token becomes has exactly no gradient by a token that it may not see, and
    some by every other."""
    args, flux = inputs(placement), base(placement)
    block = jax.tree.map(lambda x: x[0], flux.double)
    segments = np.concatenate([np.zeros(TEXT, int), grid().segments(placement)])
    pairs = np.array(placement.sees)[segments[:, None], segments][None]
    mod = jnp.ones((1, 6 * flux.config.width))

    def become(img, txt):
        img, txt = block(img, txt, mod, mod, args["pe"], (None, pairs))
        return jnp.concatenate([txt, img], 1)[0].sum(-1)

    rng = np.random.default_rng(0)
    streams = (rng.standard_normal((1, n, flux.config.width), np.float32) for n in (8, TEXT))
    of_img, of_txt = jax.jit(jax.jacobian(become, (0, 1)))(*streams)
    reach = jnp.abs(jnp.concatenate([of_txt, of_img], 2)[:, 0]).max(-1) > 0
    np.testing.assert_array_equal(reach, pairs[0])


def test_who_is_not_seen_is_masked():
    """The formula under pairs and lengths is a softmax over who is seen; cuDNN is asked for the
    same; on a TPU, whose segment ids cannot say it, the formula is asked."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 6, 1, 8)).astype(np.float32)
    pairs = rng.random((2, 6, 6)) < 0.5
    pairs[:, range(6), range(6)] = pairs[:, :, 0] = True
    lengths = np.int32([6, 4])
    scores = np.einsum("bqhk,bshk->bqs", q, k) / 8**0.5
    seen = pairs & (np.arange(6) < lengths[:, None, None])
    share = np.where(seen, np.exp(scores), 0)
    expected = np.einsum("bqs,bshk->bqhk", share / share.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attention(q, k, v, lengths, pairs), expected, atol=1e-6)
    assert choose_kernel("tpu", jnp.dtype("bfloat16"), 128, masked=True) == "xla"
    assert choose_kernel("gpu", jnp.dtype("bfloat16"), 128, masked=True) == "cudnn"
    preset = replace(reference.PRESET, flux=replace(tiny.FLUX, placement=FRAMES))
    assert kernel_on(MESH, preset) == "xla"


@pytest.mark.parametrize("tokens", [6, 7])
def test_cudnn_gets_the_mask(monkeypatch, tokens):
    """Its call says what the formula computes, of an odd number of tokens, too."""

    def formula(q, k, v, implementation, key_value_seq_lengths, mask):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        return attention(q, k, v, key_value_seq_lengths, mask[:, 0])

    monkeypatch.setattr(jax.nn, "dot_product_attention", formula)
    rng = np.random.default_rng(0)
    q, k, v = map(jnp.asarray, rng.standard_normal((3, 2, tokens, 1, 8)).astype(np.float32))
    pairs = jnp.asarray(rng.random((2, tokens, tokens)) < 0.5).at[:, :, 0].set(True)
    expected = attention(q, k, v, None, pairs)
    np.testing.assert_allclose(kernels.cudnn(q, k, v, None, pairs), expected, atol=1e-6)


# --- grids on their way ---


# Another paper is one more table: OminiControl's, with conditions that see themselves alone
# (Yuanshi9815/OminiControl:omini/pipeline/flux_omini.py, `independent_condition`).
SIXTH = Placement(
    "sixth",
    enters=KONTEXT.enters,
    time=("t", "0", "0", "0", "t"),
    attends=("11111", "01110", "01110", "01110", "11111"),
    axis0="frame",
)
SMALL = replace(tiny.TINY, flux=replace(tiny.TINY.flux, in_channels=64))


@pytest.mark.parametrize("placement", [*CLEAN, SIXTH], **NAME)
def test_what_is_clean_stays(placement):
    """It enters as its own latent, to the last bit, and stands still: nothing of the noise gets
    there, and no channel beside it."""
    x, condition = np.ones((2, 8, 64), np.float32), np.full((2, 8, 320), 2, np.float32)
    segments = segment_table([grid()] * 2, placement, 8)
    entered, beside = conditioning.enter(x, condition, segments, placement)
    is_target = segments == TARGET
    assert beside.shape == (2, 8, 0) and is_target.sum() == 4
    np.testing.assert_array_equal(entered[..., 0], np.where(is_target, 1, 2))
    context = Context(beside, *[None] * 4, segments=segments)
    flux = Mock(side_effect=lambda img, *_: img, config=replace(SMALL.flux, placement=placement))
    out = conditioning.velocity(flux, entered, None, context)
    np.testing.assert_array_equal(out[..., 0], is_target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of 64 channels."""
    return tiny.weights_folder(tmp_path_factory.mktemp("clean") / "weights", preset=SMALL)


def ready(folder, placement):
    """A Painter in a placement."""
    preset = weights.checked_grid_preset(folder, placement)
    models = LazyModels(folder, preset, [], MESH)
    return Painter(preset, models, models.text_reader(), MESH)


@pytest.mark.parametrize("placement", [DEV, FRAMES, SIXTH], **NAME)
def test_paint(folder, placement):
    """Grids of other sizes paint as one batch: what is given is, before and after, what the
    autoencoder makes of it, in whole rows or cell by cell; what is blank becomes a picture that
    depends on the noise."""
    painter = ready(folder, placement)
    one_row = Grid((grid(blank=0).query,), 2)
    ways = (grid(), 0), (grid(), 1), (one_row, 0)
    canvases = painter([Spec(g, "a fox", 2, 4.0, seed) for g, seed in ways])
    assert len({canvas.spec.grid.tokens for canvas in canvases}) == 2
    for canvas in canvases:
        pictures = canvas.spec.grid.pictures(placement)
        vae = painter.models.vae
        tokens = [painter.encode_condition(vae, p.pixels[None], p.mask[None]) for p in pictures]
        given = np.concatenate(tokens, 1)[0, :, :64]
        clean = canvas.spec.grid.segments(placement) != TARGET
        np.testing.assert_array_equal(canvas.latents[clean], given[clean])
        assert np.abs(canvas.latents[~clean] - given[~clean]).min() > 0
        assert canvas.pixels.shape == canvas.spec.grid.query.pixels.shape
    first, second, _ = canvases
    assert np.any(first.targets[0] != second.targets[0])


@pytest.mark.parametrize("placement", [*PLACEMENTS.values(), SIXTH], **NAME)
def test_a_step_is_traced(placement):
    """A training step of every placement, and of one more: of pixels, by shapes alone. Grids with
    other cells blank are one batch."""
    flux = replace(tiny.TINY.flux, placement=placement, in_channels=placement.channels)
    preset = replace(tiny.TINY, flux=flux, recipe=replace(tiny.TINY.recipe, rank=2))
    tokenizers = lambda texts: (*(np.zeros((len(texts), n), np.int32) for n in (96, 77)), None)  # noqa: E731
    examples = [Example(grid(blank), "a fox", "kind") for blank in (0, 1)]
    read_rows = partial(spread_rows, mesh=MESH, placement=placement)
    batch = make_batch(examples, range(2), read_rows, tokenizers, preset, MESH)
    assert len(batch.rows) == (4 if placement.apart else 2)
    parts = {
        n: weights.abstract(m, getattr(preset.learning, n)) for n, m in weights.MODULES.items()
    }
    graphdefs, adapters, frozen = ({n: p[i] for n, p in parts.items()} for i in range(3))
    trainable, statics = {"flux": adapters["flux"]}, dict(graphdefs=graphdefs, dtype="float32")
    encode = partial(encode_batch, preset=preset, **statics)
    noisy = jax.eval_shape(encode, frozen, batch, purpose_key(0, "draws"))
    assert noisy.context.condition.shape == (2, 8, placement.channels - 64)
    loss = jax.grad(partial(loss_fn, region="target", **statics), has_aux=True)
    grads, _ = jax.eval_shape(loss, trainable, frozen, noisy)
    assert jax.tree.map(np.shape, grads) == jax.tree.map(np.shape, trainable)
    assert ("cond_mod" in grads["flux"]["single"]) == placement.embeds


# --- against diffusers itself ---


@pytest.mark.parity
def test_the_fixture_is_what_torch_makes(tmp_path, monkeypatch):
    """The installed diffusers makes the stored velocities again; and its blocks, put together as
    the fixture does it, are FluxTransformer2DModel where no token is told anything of its own."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import fixtures_models
    import fixtures_placements
    import torch

    (tmp_path / "models.safetensors").write_bytes((DATA / "models.safetensors").read_bytes())
    monkeypatch.setattr(fixtures_placements, "DATA", tmp_path)
    fixtures_placements.main()
    again = load_file(tmp_path / "placements.safetensors")
    assert again.keys() == stored().keys()
    for name, array in stored().items():
        difference = np.linalg.norm(np.float64(again[name]) - array)
        assert difference <= 2e-5 * np.linalg.norm(np.float64(array)), name
    flux, ids = (
        fixtures_models.flux(fixtures_models.flux(), in_channels=64),
        stored()["kontext/ids"],
    )
    with torch.no_grad():
        whole = fixtures_models.velocity(flux, tiny.stored(), ids)
    assert tiny.relative(stored()["kontext/out"], whole) < 1e-6


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 4])
def test_kontext_is_that_of_diffusers(folder, steps):
    """FluxKontextPipeline, given a reference and our noise, gives the latents that we paint: its
    positions, its order of tokens, its shift of times, which counts the target's tokens alone."""
    pytest.importorskip("diffusers")
    import torch
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    asked = Grid((Row(np.hstack([picture] * 2), np.arange(64) // 32 * np.ones((32, 1)) > 0),), 2)
    noise = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    (ours,) = ready(folder, KONTEXT)([Spec(asked, "a fox", steps, 4.0, latents=noise)])
    theirs = pipeline(
        image=Image.fromarray(picture),
        prompt="a fox",
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=4.0,
        latents=torch.tensor(noise[None, 4:]),
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        max_area=32 * 32,
        _auto_resize=False,
        output_type="latent",
    ).images
    np.testing.assert_allclose(ours.latents[4:], theirs[0].numpy(), rtol=0, atol=2e-3)
