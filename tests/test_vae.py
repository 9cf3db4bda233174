"""The autoencoder: parity with diffusers (stored), and why a row is encoded in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import VAE_CONFIG, cast, relative, stored, vae

from vcloze_jax.config import FLUX_FILL, MINI
from vcloze_jax.model import vae as room
from vcloze_jax.model.vae import VAE, GroupNorm
from vcloze_jax.storage import weights

moments = jax.jit(lambda vae, x: vae.moments(x))
encode = jax.jit(lambda vae, x: vae.encode(x))
decode = jax.jit(lambda vae, z: vae.decode(z))


def rows():
    """The fixture's pictures, [4, 16, 32, 3] in [-1, 1]."""
    return (stored()["row/pixels"] / 127.5 - 1).astype(np.float32)


def model_latent():
    """The fixture's raw mean as a model latent."""
    return (stored()["row/mean"] - VAE_CONFIG.shift) * VAE_CONFIG.scale


def test_moments_and_pictures_are_those_of_diffusers():
    """Mean and deviation of rows of 16 x 32, and the pictures of those means, equal AutoencoderKL's
    (float32 sums in another order)."""
    mean, std = moments(vae(), rows())
    np.testing.assert_allclose(mean, stored()["row/mean"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(std, stored()["row/std"], rtol=2e-5)
    pictures = decode(vae(), model_latent())
    np.testing.assert_allclose(pictures, stored()["row/picture"], rtol=0, atol=2e-5)


def test_attention_in_parts(monkeypatch):
    """The queries of a large picture are taken in parts, the last one smaller: the same sums, to
    float32 rounding."""
    attention = jax.jit(lambda attention, x: attention(x))
    block, x = vae().decoder.mid.attn, np.random.default_rng(0).standard_normal((2, 4, 6, 8))
    whole = attention(block, x.astype(np.float32))
    monkeypatch.setattr(room, "QUERIES", 10)  # of 24
    parts = jax.jit(lambda attention, x: attention(x))(block, x.astype(np.float32))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_bfloat16_error_budget():
    """Against diffusers in float32, our bfloat16 is no worse than 1.5 times diffusers' own; that
    is over four rows, as the errors of one are a matter of luck."""
    low, x = cast(vae(), jnp.bfloat16), jnp.asarray(rows(), jnp.bfloat16)
    mean, std = moments(low, x)
    picture = decode(low, jnp.asarray(model_latent(), jnp.bfloat16))
    for name, ours in (("mean", mean), ("std", std), ("picture", picture)):
        assert ours.dtype == jnp.bfloat16
        budget = 1.5 * stored()[f"row/{name}_bf16"]
        assert relative(ours, stored()[f"row/{name}"]) <= budget, name


def test_counts():
    """FLUX's autoencoder has 83,819,683 parameters."""
    shapes = weights.shapes(weights.abstract(VAE, FLUX_FILL.vae)[2])
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_819_683


def test_shift_and_scale():
    """encode is (mean - shift) * scale of the raw mean; FLUX's constants are 0.1159 and 0.3611."""
    np.testing.assert_allclose(encode(vae(), rows()), model_latent(), atol=1e-5)
    assert (FLUX_FILL.vae.shift, FLUX_FILL.vae.scale) == (0.1159, 0.3611)


@pytest.mark.parametrize("offset", [0, 1000])
def test_group_norm(offset):
    """Channels of a group share mean and variance over the whole picture; eps is 1e-6. A mean of a
    thousand deviations does not drown the variance (its float32 unit is 6e-5)."""
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32) + offset
    norm = GroupNorm(8, 2)
    norm.scale[...], norm.bias[...] = jnp.arange(8.0), jnp.arange(8.0)[::-1]
    groups = np.float64(x).reshape(2, 4, 6, 2, 4)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    var = np.square(centred).mean((1, 2, 4), keepdims=True)
    normed = (centred / np.sqrt(var + 1e-6)).reshape(x.shape)
    expected = normed * np.arange(8) + np.arange(8)[::-1]
    np.testing.assert_allclose(norm(x), expected, atol=2e-3 if offset else 1e-5)


def test_a_row_is_more_than_its_cells():
    """Cells encoded alone are not the parts of their row encoded whole: convolutions and the
    attention of the middle cross cell borders, norms pool over the row. So a row is encoded and
    decoded in one piece, at its exact width, as the model was trained."""
    left, right = np.split(rows(), 2, 2)
    apart = np.concatenate([encode(vae(), left), encode(vae(), right)], 2)
    assert np.abs(encode(vae(), rows()) - apart).mean() > 0.05
    z = model_latent()
    apart = np.concatenate([decode(vae(), half) for half in np.split(z, 2, 2)], 2)
    assert np.abs(decode(vae(), z) - apart).mean() > 0.05


def test_pictures_are_independent():
    """A batch of one is an element of a batch (float32 sums in another order)."""
    together = encode(vae(), rows())
    for x, z in zip(rows(), together, strict=True):
        np.testing.assert_allclose(encode(vae(), x[None])[0], z, atol=1e-5)


@pytest.mark.parametrize("config", [MINI.vae, FLUX_FILL.vae], ids=["mini", "flux-fill"])
def test_sides_are_eighths(config):
    """Pictures of h x w have latents of h/8 x w/8 in 16 channels, and come back at h x w."""
    graphdef, _, base = weights.abstract(VAE, config)

    def there_and_back(base, x):
        vae = nnx.merge(graphdef, base)
        z = vae.encode(x)
        return z, vae.decode(z)

    z, y = jax.eval_shape(there_and_back, base, jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32))
    assert z.shape == (2, 4, 6, 16) and y.shape == (2, 32, 48, 3)
