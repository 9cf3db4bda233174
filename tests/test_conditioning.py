"""Laws of conditioning.py: what the model may see of a grid, in sampling and in training."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FLUX, stored, vae

from vcloze_jax import conditioning
from vcloze_jax.conditioning import Context, position_table, to_model, to_pixels
from vcloze_jax.grid import Grid, Row
from vcloze_jax.model.ops import pack, rope_table

encode_condition = jax.jit(conditioning.encode_condition)


def encode_training(vae, rows, fill, keys):
    return conditioning.draw_training(conditioning.encode_rows(vae, rows, fill), keys)


train = jax.jit(encode_training)
KEY = jax.random.key(0)[None]  # of a batch of one


def grid():
    """The fixture's grid: a row of 32 x 32, a query of 16 x 64 with holes in its right cell."""
    rows = [Row(stored()[f"grid/pixels{r}"], stored()[f"grid/mask{r}"]) for r in range(2)]
    return Grid(tuple(rows), 2)


def training_rows(query=None):
    """The fixture's rows as a micro-batch of one; the context row is never masked."""
    context, last = grid().rows
    pixels = last.pixels if query is None else query
    return (context.pixels[None], None), (pixels[None], last.mask[None])


def tokens(x):
    """The part of the tokens [1, 8, C] that is the query's; the first four are the context's."""
    return np.asarray(x)[:, 4:]


# --- pixels ---


def test_pixels_round_trip():
    """Every uint8 comes back through model range; what lies outside is clipped, halves go to even;
    NaN and infinity are an error, never a picture."""
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(to_model(pixels)), pixels)
    x = to_model(pixels)
    assert x.dtype == jnp.float32 and x[0] == -1 and x[-1] == 1
    assert to_pixels(np.float32([-1.5, 1.5])).tolist() == [0, 255]
    halves = 2 * np.float64([0.5, 1.5, 2.5]) / 255 - 1
    assert np.abs(to_pixels(halves) - np.float64([0.5, 1.5, 2.5])).max() <= 0.5
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            to_pixels(np.array([0, bad]))


# --- sampling ---


def test_condition_and_ids_are_those_of_diffusers():
    """A grid of two rows of different sizes becomes the tokens and ids of diffusers' VisualCloze
    pipeline: rows encoded in one piece, black where masked, latent before mask, rows counted from
    1 (float32 sums in another order)."""
    ours = [encode_condition(vae(), r.pixels[None], r.mask[None])[0] for r in grid().rows]
    ours, theirs = np.concatenate(ours), stored()["grid/condition"]
    np.testing.assert_allclose(ours[:, :64], theirs[:, :64], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(ours[:, 64:], theirs[:, 64:])
    np.testing.assert_array_equal(grid().ids(), stored()["grid/ids"])


def other_truth():
    """The query with other pixels under its mask."""
    pixels, mask = grid().query.pixels, grid().query.mask
    return np.where(mask[..., None], 255 - pixels, pixels)


def test_blank_pixels_are_never_seen():
    """Whatever stands under the mask, the condition is the same to the last bit; what is given
    matters."""
    query = grid().query
    condition, other = (
        encode_condition(vae(), pixels[None], query.mask[None])
        for pixels in (query.pixels, other_truth())
    )
    np.testing.assert_array_equal(condition, other)
    given = np.where(query.mask[..., None], query.pixels, 255 - query.pixels)
    assert np.any(encode_condition(vae(), given[None], query.mask[None]) != condition)


def test_channels_are_latent_condition_mask():
    """The MMDiT reads 64 noisy | 64 condition | 256 mask channels, in the condition's dtype."""
    x, condition = jnp.ones((1, 4, 64)), jnp.full((1, 4, 320), 2, jnp.bfloat16)
    img = conditioning.velocity(lambda img, *_: img, x, None, Context(condition, *[None] * 4))
    assert img.dtype == jnp.bfloat16
    np.testing.assert_array_equal(img[0, 0].astype(int), [1] * 64 + [2] * 320)


def test_positions_of_text_image_and_padding():
    """Text and padding stand at the origin, image tokens at the grid's ids; each grid of a batch
    has its own."""
    small = Grid((grid().query,), 2)
    cos, sin = position_table([grid(), small], FLUX, 3, 10)
    assert cos.shape == sin.shape == (2, 13, 1, 4)
    for i, g in enumerate((grid(), small)):
        for ours, theirs in zip((cos, sin), rope_table(g.ids(), (2, 2, 4), 10_000), strict=True):
            np.testing.assert_array_equal(ours[i, 3 : 3 + g.tokens], theirs)
        origin = np.r_[0:3, 3 + g.tokens : 13]
        assert np.all(cos[i, origin] == 1) and np.all(sin[i, origin] == 0)


# --- training ---


def test_training_shapes():
    """Latents [B, S, 64], condition [B, S, 320] and the masked share of each token [B, S], which is
    the mean over its 16 x 16 pixels, and 0 in rows that are never masked."""
    latents, condition, share = train(vae(), training_rows(), -1.0, KEY)
    assert (latents.shape, condition.shape, share.shape) == ((1, 8, 64), (1, 8, 320), (1, 8))
    blocks = grid().query.mask.reshape(1, 16, 4, 16).mean((1, 3))
    np.testing.assert_allclose(tokens(share), blocks, rtol=1e-6)
    assert not np.any(share[:, :4]) and 0 < share[0, 6] < 1
    np.testing.assert_allclose(condition[..., 64:].mean(-1), share, rtol=1e-6)


def test_truth_under_the_mask_is_target_only():
    """In training other pixels under the mask change the clean latents, not one bit of the
    condition or of the shares."""
    latents, *seen = train(vae(), training_rows(), -1.0, KEY)
    others, *also_seen = train(vae(), training_rows(other_truth()), -1.0, KEY)
    for one, other in zip(seen, also_seen, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.all(np.any(tokens(latents) != tokens(others), -1))


def test_masked_pixels_take_the_fill():
    """`fill` stands under the mask: -1 is the black of sampling, 0 the authors' gray. With the
    posterior's mean in place of a draw, training at -1 is the sampler's condition."""
    query = grid().query

    @jax.jit
    def condition(vae, fill):
        mean = SimpleNamespace(
            config=vae.config,
            scaled=vae.scaled,
            moments=lambda x: (vae.moments(x)[0], jnp.zeros((2, 2, 8, 16))),  # clean and blanked
        )
        return encode_training(mean, [(query.pixels[None], query.mask[None])], fill, KEY)[1]

    black, gray = condition(vae(), -1.0), condition(vae(), 0.0)
    sampling = encode_condition(vae(), query.pixels[None], query.mask[None])
    np.testing.assert_allclose(black, sampling, rtol=0, atol=2e-5)
    assert np.abs(black - gray).max() > 0.05


def test_latent_and_condition_are_two_draws():
    """Clean latent and condition are (z - mean) / std apart: draws of their own, for each row of
    its own, even where it is the same posterior; the same key gives the same draws. Over 256
    numbers independent draws correlate by less than 0.3 (5 deviations)."""
    query = grid().query.pixels[None]
    rows = ((query, None), (query, None))
    latents, condition, _ = train(vae(), rows, -1.0, KEY)
    moments = jax.jit(lambda vae, x: vae.moments(x))
    mean, std = moments(vae(), to_model(query))
    scaled = vae().config
    draws = [latents[:, :4], condition[:, :4, :64], latents[:, 4:], condition[:, 4:, :64]]
    noise = [
        np.ravel((np.asarray(z) / scaled.scale + scaled.shift - pack(mean)) / pack(std))
        for z in draws
    ]
    correlation = np.corrcoef(noise)
    assert np.abs(correlation - np.eye(4)).max() < 0.3
    np.testing.assert_allclose(np.std(noise, 1), 1, atol=0.25)
    np.testing.assert_array_equal(train(vae(), rows, -1.0, KEY)[0], latents)
    assert np.any(train(vae(), rows, -1.0, jax.random.key(1)[None])[0] != latents)


def test_unmasked_rows_are_encoded_once():
    """A row without a mask, encoded once, gives what an empty mask and two encodings give (float32
    sums in another order)."""
    pixels = grid().query.pixels[None]
    once = train(vae(), ((pixels, None),), -1.0, KEY)
    twice = train(vae(), ((pixels, np.zeros(pixels.shape[:3], bool)),), -1.0, KEY)
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_equal_shapes_share_a_pass():
    """Pictures of one shape go through the autoencoder together, and come back in order."""
    rng, calls = np.random.default_rng(0), []
    pictures = [rng.random((2, h, 16, 3)) for h in (16, 32, 16)]
    spy = SimpleNamespace(moments=lambda x: calls.append(len(x)) or (x, -x))
    for x, (mean, std) in zip(pictures, conditioning.encode_each(spy, pictures), strict=True):
        np.testing.assert_allclose(mean, x, rtol=1e-6)
        np.testing.assert_allclose(std, -x, rtol=1e-6)
    assert calls == [4, 2]
