"""Laws of ops.py: packing, positions, time features, norms."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import stored

from vcloze_jax.model import ops

AXES = (16, 56, 56)  # FLUX's


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- packing ---


def test_packing_is_that_of_diffusers():
    """Latents and masks lie where FluxFillPipeline puts them, element by element."""
    latent = np.arange(16 * 4 * 6).reshape(16, 4, 6).transpose(1, 2, 0)
    np.testing.assert_array_equal(ops.pack(latent[None])[0], stored()["pack/latent"])
    mask = np.arange(32 * 48).reshape(1, 32, 48)
    np.testing.assert_array_equal(ops.pack_mask(mask)[0], stored()["pack/mask"])


def test_mask_packing_by_hand():
    """A token's 256 mask channels: pixel of the 8 x 8 block first, then the 2 x 2 blocks."""
    first = ops.pack_mask(np.arange(16 * 32).reshape(1, 16, 32))[0, 0]
    np.testing.assert_array_equal(first[:8], [0, 8, 256, 264, 1, 9, 257, 265])


@pytest.mark.parametrize("shape", [(1, 2, 2, 16), (2, 4, 6, 16), (3, 6, 2, 5)])
def test_unpack_is_the_inverse_of_pack(shape):
    """Packing and unpacking, in either order, moves every element back."""
    x = normal(*shape)
    tokens = ops.pack(x)
    np.testing.assert_array_equal(ops.unpack(tokens, *shape[1:3]), x)
    np.testing.assert_array_equal(ops.pack(ops.unpack(tokens, *shape[1:3])), tokens)


def test_masks_lie_on_their_latents():
    """A masked block of 16 x 16 pixels is the whole of one token and no part of another, that
    which its latents become."""
    mask, latent = np.zeros((1, 48, 32)), np.zeros((1, 6, 4, 16))
    mask[:, 16:32, 16:], latent[:, 2:4, 2:] = 1, 1
    tokens, latents = ops.pack_mask(mask)[0], ops.pack(latent)[0]
    assert tokens.min(1).tolist() == tokens.max(1).tolist() == [0, 0, 0, 1, 0, 0]
    np.testing.assert_array_equal(tokens.mean(1), latents.mean(1))


# --- positions ---


def test_rope_tables_are_those_of_diffusers():
    """Angles of rows 0 to 4 and positions up to 1023 equal FluxPosEmbed's (one unit of float32:
    both compute in float64)."""
    cos, sin = ops.rope_table(stored()["rope/ids"], AXES, 10_000)
    for ours, theirs in ((cos, "rope/cos"), (sin, "rope/sin")):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours[:, 0], stored()[theirs], rtol=0, atol=6e-8)


def ids(*rows):
    return np.array(rows, np.float32)[None]


def test_rope_is_a_rotation():
    """Lengths stay, the origin changes nothing, and scores know differences of positions only, on
    every axis alone (float32 sums of 128 products)."""
    q, k = normal(1, 3, 2, 128), normal(1, 3, 2, 128, seed=1)

    def scores(positions):
        pe = ops.rope_table(positions, AXES, 10_000)
        return np.einsum("blhk,bmhk->bhlm", ops.rope(q, pe), ops.rope(k, pe))

    origin = ids(*[(0, 0, 0)] * 3)
    np.testing.assert_array_equal(ops.rope(q, ops.rope_table(origin, AXES, 10_000)), q)
    here, there = ids((1, 0, 0), (1, 2, 5), (2, 7, 1)), ids((3, 9, 40), (3, 11, 45), (4, 16, 41))
    turned = ops.rope(q, ops.rope_table(here, AXES, 10_000))
    lengths = np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), lengths, rtol=1e-6)
    np.testing.assert_allclose(scores(here), scores(there), atol=1e-4)
    for axis in np.eye(3, dtype=np.float32):
        assert np.abs(scores(here) - scores(here * (1 + axis))).max() > 0.1


def test_rope_rotates_in_float32():
    """bfloat16 queries keep their dtype and are rounded once, after the rotation: neighbours 256
    and 257, which bfloat16 cannot tell apart, differ."""
    q = jnp.ones((1, 2, 2, 128), jnp.bfloat16)
    pe = ops.rope_table(ids((0, 256, 0), (0, 257, 0)), AXES, 10_000)
    turned = ops.rope(q, pe)
    assert turned.dtype == jnp.bfloat16
    exact = ops.rope(q.astype(jnp.float32), pe).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned, exact)
    assert np.abs(np.float32(turned[:, 0] - turned[:, 1])).max() > 0.5


# --- time and norms ---


def test_time_features_round_their_argument():
    """cos then sin of 1000 t f, where 1000 t, f and their product are float32 each: at 30 (a
    guidance) the product is 30,000 and its last bit is worth 2e-3 radians."""
    t = np.float32([0.0, 0.3, 1.0, 30.0])
    out = np.asarray(ops.timestep_embedding(t))
    assert out.shape == (4, 256) and out.dtype == np.float32
    np.testing.assert_array_equal(out[0], np.repeat([1, 0], 128))
    freqs = np.exp(np.float64(-np.log(np.float32(1e4)) * np.arange(128, dtype=np.float32) / 128))
    angles = np.float64((np.float32(1000) * t)[:, None] * freqs.astype(np.float32))
    np.testing.assert_allclose(out, np.hstack([np.cos(angles), np.sin(angles)]), atol=1e-6)


def test_layer_norm_and_modulate():
    """(x - mean) / sqrt(var + 1e-6), then (1 + scale) and shift, per sample; statistics stay
    float32 for bfloat16 input (1e-6: float32 sums of 24 numbers)."""
    x = 3 + normal(2, 5, 24)
    centred = x - x.mean(-1, keepdims=True, dtype=np.float64)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ops.layer_norm(x), normed, atol=3e-6)
    shift, scale = normal(2, 1, 24, seed=1), normal(2, 1, 24, seed=2)
    modulated = (1 + scale) * normed + shift
    np.testing.assert_allclose(ops.modulate(x, shift, scale), modulated, atol=1e-5)
    low = ops.layer_norm(jnp.asarray(x, jnp.bfloat16))
    exact = ops.layer_norm(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(low, exact.astype(jnp.bfloat16))
