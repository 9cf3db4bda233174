"""Grids in each placement: segments, positions, what stays clean; and that one is one table."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from placed import CLEAN, MESH, NAME, TORCH, grid, stored

from vcloze_jax import conditioning
from vcloze_jax.conditioning import Context, segment_table
from vcloze_jax.data.sources import Example
from vcloze_jax.grid import Grid, Row, Spec
from vcloze_jax.inputs.papers import DEV, FRAMES, KONTEXT, PLACEMENTS
from vcloze_jax.painter import Painter
from vcloze_jax.placement import EXAMPLE, EXAMPLE_TARGET, FILL, QUERY, TARGET, Placement, kind_of
from vcloze_jax.step import encode_batch, loss_fn, make_batch, purpose_key, spread_rows
from vcloze_jax.storage import weights
from vcloze_jax.storage.models import LazyModels

# --- what a grid is to a placement ---


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_segments_and_positions(placement):
    """They are those of the fixture: rows as the authors count them, frames from 0, references
    from 1 with the target at 0, as FluxKontextPipeline has it."""
    segments = grid().segments(placement)
    np.testing.assert_array_equal(kind_of(segments), stored()[f"{placement.name}/segments"])
    np.testing.assert_array_equal(grid().ids(placement), stored()[f"{placement.name}/ids"])


def test_any_cell_may_be_the_target():
    """Blank in the first column: examples' targets are there too, and the target's axis is 0
    wherever it stands; what is partly masked is, token by token, a target or not."""
    first = grid(blank=0)
    across = [EXAMPLE_TARGET, EXAMPLE]
    assert kind_of(first.segments()).tolist() == [*across, *across, TARGET, TARGET, QUERY, QUERY]
    assert first.ids(KONTEXT)[:, 0].tolist() == [1, 1, 2, 2, 0, 0, 3, 3]
    part = grid()
    part.query.mask[:, 48:] = False
    assert kind_of(part.segments())[4:].tolist() == [QUERY, QUERY, TARGET, QUERY]
    padded = segment_table([part], DEV, 10)
    assert padded.shape == (1, 10) and not padded[0, 8:].any()
    assert segment_table([part], FILL, 10) is None


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_each_example_has_segments_of_its_own(placement):
    """Three rows: tokens of two cells are of one segment where they are of one row and show alike,
    and nowhere else, also of more rows than a byte could number."""
    row = grid().query
    for rows in (3, 60):
        tall = Grid((replace(row, mask=np.zeros_like(row.mask)),) * (rows - 1) + (row,), 2)
        segments = tall.segments(placement)
        cells = np.sort(segments.reshape(2 * rows, -1), 0)
        assert (cells == cells[:, :1]).all() and len(np.unique(cells)) == 2 * rows
        assert {QUERY, TARGET} == set(kind_of(np.unique(cells)[-2:]))


def test_a_page_is_one_picture():
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
    assert placement.enters[TARGET] in ("beside", "noise") and not placement.clean[0]
    assert len(placement.vectors) == {"dev": 2, "frames": 2, "klein": 2}.get(placement.name, 1)


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
    is_target = kind_of(segments) == TARGET
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
        clean = kind_of(canvas.spec.grid.segments(placement)) != TARGET
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
    lengths = preset.t5.max_length, preset.clip.max_length
    tokenizers = lambda texts: (*(np.zeros((len(texts), n), np.int32) for n in lengths), None)  # noqa: E731
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
