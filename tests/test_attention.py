"""Laws of attention: all kernels compute one formula, and platform and dtype choose which."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcloze_jax import kernels
from vcloze_jax.devices import make_mesh, parse_mesh
from vcloze_jax.model.ops import attention, choose_kernel


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax_attention(q, k, v, lengths):
    """The definition, sample by sample, in float64."""
    out = np.zeros_like(q, np.float64)
    for b, n in enumerate(lengths):
        scores = np.einsum("lhk,mhk->hlm", q[b], k[b, :n]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[b] = np.einsum("hlm,mhk->lhk", weights, v[b, :n])
    return out


def test_attention_is_softmax_over_the_real_tokens():
    """Scores are divided by sqrt(K), heads stay outermost, and keys past a sample's length have no
    weight at all, whatever stands there."""
    q, k, v = (normal(3, 7, 2, 8, seed=seed) for seed in range(3))
    full = np.array([7, 7, 7], np.int32)
    np.testing.assert_allclose(attention(q, k, v), softmax_attention(q, k, v, full), atol=1e-6)
    lengths = np.array([7, 4, 1], np.int32)
    out = attention(q, k, v, lengths)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, lengths), atol=1e-6)
    past = np.arange(7)[None, :, None, None] >= lengths[:, None, None, None]
    other = attention(q, np.where(past, 1e3, k), np.where(past, 1e3, v), lengths)
    np.testing.assert_array_equal(other, out)


def test_padding_gets_no_gradient():
    """Keys and values past a sample's length get a gradient of exactly 0."""
    q, k, v = (normal(2, 5, 2, 8, seed=seed) for seed in range(3))
    lengths = np.array([5, 3], np.int32)
    grads = jax.grad(lambda k, v: attention(q, k, v, lengths).sum(), (0, 1))(k, v)
    for grad in grads:
        assert not np.any(grad[1, 3:]) and np.any(grad[1, :3])


@pytest.mark.parametrize(
    ("text", "lengths"), [(None, None), (None, (200, 131)), ("fsdp=2,tensor=2", (131, 200))]
)
def test_splash_is_the_formula(text, lengths):
    """The TPU's kernel, interpreted, gives the formula's result and gradients, padded rows and
    all, where tokens do not fill its blocks, for samples of two lengths, and on a mesh."""
    q, k, v = (normal(2, 200, 2, 128, seed=seed) for seed in range(3))
    weight = normal(2, 200, 2, 128, seed=3)
    lengths = lengths and np.array(lengths, np.int32)

    def value_and_gradients(kernel):
        def loss(q, k, v):
            out = kernel(q, k, v, lengths)
            return (out * weight).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    expected = value_and_gradients(attention)(q, k, v)
    splash = value_and_gradients(partial(kernels.splash, interpret=True))
    if text is None:
        found = splash(q, k, v)
    else:
        with jax.set_mesh(make_mesh(parse_mesh(text))):
            found = splash(q, k, v)
    for ours, theirs in zip(jax.tree.leaves(found)[1:], jax.tree.leaves(expected)[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


# Grids of n pictures of 384², with 512 tokens of text: their length, and a block of their keys.
TABLE = {2: (1664, 1664), 3: (2304, 1152), 4: (2816, 1408), 5: (3456, 1152), 6: (4096, 2048)}
TABLE |= {7: (4608, 1536), 8: (5120, 1280), 9: (5760, 1920), 10: (6400, 1280), 12: (7680, 1920)}


def test_tokens_are_cut_into_blocks():
    """Lengths grow by 4 % at most, from 128 tokens on, and are cut into equal blocks of multiples
    of 128, which what is worked on at once divides; grids of the paper get large ones."""
    for n, (length, keys) in TABLE.items():
        assert kernels.padded_length(576 * n + 512) == length
        assert kernels.choose_blocks(length)[1] == keys
    for tokens in (1, 128, 129, 300, 4096, 9728, 12800):
        length = kernels.padded_length(tokens)
        blocks = kernels.choose_blocks(length)
        assert tokens <= length <= max(1.04 * tokens, tokens + 127)
        assert all(length % n == n % 128 == 0 for n in blocks) and blocks[1] % blocks[2] == 0


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "kernel"),
    [
        ("cpu", "float32", 128, "xla"),
        ("gpu", "bfloat16", 128, "cudnn"),
        ("gpu", "bfloat16", 32, "cudnn"),
        ("gpu", "float32", 128, "xla"),
        ("tpu", "bfloat16", 128, "splash"),
        ("tpu", "bfloat16", 32, "xla"),
    ],
)
def test_the_platform_chooses(platform, dtype, head_dim, kernel):
    """Accelerators' kernels take what accelerators compute in; splash fills whole lanes."""
    assert choose_kernel(platform, jnp.dtype(dtype), head_dim) == kernel


@pytest.mark.parametrize("lengths", [None, [7, 4]])
def test_cudnn_is_asked_for_an_even_number_of_tokens(monkeypatch, lengths):
    """Its gradient refuses an odd one: what is computed of one more token is the same."""

    def even_alone(q, k, v, implementation, key_value_seq_lengths):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        return attention(q, k, v, key_value_seq_lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", even_alone)
    q, k, v = (jnp.asarray(normal(2, 7, 1, 8, seed=seed)) for seed in range(3))
    lengths = lengths and jnp.array(lengths)
    out, expected = kernels.cudnn(q, k, v, lengths), attention(q, k, v, lengths)
    np.testing.assert_allclose(out, expected, atol=1e-6)  # float32, in another order


def test_the_mesh_says_which_platform(monkeypatch):
    """A program is made for the devices of the mesh in use, not for those of this machine."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "cudnn", lambda q, k, v, lengths: v)
    q, v = (jnp.asarray(normal(1, 4, 1, 8, seed=seed), jnp.bfloat16) for seed in range(2))
    assert jnp.array_equal(attention(q, q, v), v)
    with jax.set_mesh(make_mesh(parse_mesh("1"))):
        assert not jnp.array_equal(attention(q, q, v), v)
