"""Laws of attention: all kernels compute one formula, and platform and dtype choose which."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chips import v5e
from jax.sharding import NamedSharding

from vcloze_jax import kernels
from vcloze_jax.devices import make_mesh, parse_mesh
from vcloze_jax.model.ops import attention, choose_kernel, keep_products
from vcloze_jax.sharding import BATCH


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


def test_only_scores_are_multiplied_again():
    """Of the formula's products, remat light computes that of the scores again, and no other."""
    q = jnp.zeros((1, 64, 2, 8))

    def count_products(attention):
        gradient = jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(q, q, q).as_text().count("stablehlo.dot_general")

    light = jax.checkpoint(attention, policy=keep_products)
    assert count_products(light) == count_products(attention) + 1


def test_padding_gets_no_gradient():
    """Keys and values past a sample's length get a gradient of exactly 0."""
    q, k, v = (normal(2, 5, 2, 8, seed=seed) for seed in range(3))
    lengths = np.array([5, 3], np.int32)
    grads = jax.grad(lambda k, v: attention(q, k, v, lengths).sum(), (0, 1))(k, v)
    for grad in grads:
        assert not np.any(grad[1, 3:]) and np.any(grad[1, :3])


def result_and_gradients(kernel, qkv, *who):
    """What a kernel gives for q, k, v and who is seen, and three gradients of its weighted sum."""
    weight = normal(*qkv[0].shape, seed=3)

    def loss(q, k, v):
        out = kernel(q, k, v, *who)
        return (out.astype(jnp.float32) * weight).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def draw_kinds(queries, keys):
    """Whom three kinds of queries see, the first key all of them, and kinds: of two samples."""
    rng = np.random.default_rng(4)
    sees = rng.random((2, 3, keys)) < 0.5
    sees[:, :, 0] = True
    return sees, rng.integers(0, 3, (2, queries)).astype(np.int32)


SPLASH = partial(kernels.splash, interpret=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("text", "lengths"), [(None, None), (None, (200, 131)), ("fsdp=2,tensor=2", (131, 200))]
)
def test_splash_is_the_formula(text, lengths, masked):
    """The TPU's kernel, interpreted, gives the formula's result and gradients, padded rows and
    all, where tokens do not fill its blocks, for samples of two lengths, and on a mesh; also where
    kinds of queries see some keys alone, of which the others get a gradient of exactly 0."""
    qkv = [normal(2, 200, 2, 128, seed=seed) for seed in range(3)]
    who = [lengths and np.array(lengths, np.int32), *(draw_kinds(200, 200) if masked else ())]
    if masked:
        who[1][:, :, 7] = False
    expected = result_and_gradients(attention, qkv, *who)
    with nullcontext() if text is None else jax.set_mesh(make_mesh(parse_mesh(text))):
        found = result_and_gradients(SPLASH, qkv, *who)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    assert all(np.any(gradient[:, 7]) != masked for gradient in found[2:])


@pytest.mark.parametrize("masked", [False, True])
def test_splash_rounds_as_bfloat16_does(masked):
    """In bfloat16, which keeps 8 bits, nothing is off by more than one in 64 of the largest: scaled
    queries are rounded, and so is what comes out."""
    qkv = [jnp.asarray(normal(2, 200, 2, 128, seed=seed), jnp.bfloat16) for seed in range(3)]
    who = None, *(draw_kinds(200, 200) if masked else ())
    exact = result_and_gradients(attention, [x.astype(jnp.float32) for x in qkv], *who)
    for ours, theirs in zip(result_and_gradients(SPLASH, qkv, *who), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=np.abs(theirs).max() / 64)


def test_splash_takes_more_keys_than_queries():
    """Kept keys stand beside a step's own, and all queries see what is real of them, anywhere."""
    qkv = [normal(2, n, 2, 128, seed=seed) for seed, n in enumerate((70, 200, 200))]
    sees = draw_kinds(70, 200)[0][:, :1]
    expected = result_and_gradients(attention, qkv, None, sees)
    for ours, theirs in zip(result_and_gradients(SPLASH, qkv, None, sees), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_splash_makes_no_nan_of_nothing():
    """A kind that sees nobody gets numbers, and leaves those of the others as they are, and the
    gradients that come of these."""
    qkv = [normal(2, 200, 2, 128, seed=seed) for seed in range(3)]
    sees, kinds = draw_kinds(200, 200)
    blind = np.where(np.arange(3)[:, None] == 1, False, sees)
    listens = (kinds != 1)[..., None, None]
    of_others = lambda *args: jnp.where(listens, SPLASH(*args), 0)  # noqa: E731
    out, *gradients = result_and_gradients(SPLASH, qkv, None, blind, kinds)
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    out, *gradients = result_and_gradients(of_others, qkv, None, blind, kinds)
    expected, *theirs = result_and_gradients(of_others, qkv, None, sees, kinds)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(gradients, theirs, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "masked"), [(5696, False), (5696, True), (10240, True)])
def test_splash_fits_into_a_v5e(monkeypatch, tokens, masked):
    """TPUs' own compiler takes its kernels, forwards and backwards, of two samples on each chip:
    what they hold at once, of any number of heads, has place in a v5e's vector memory, the least of
    all. Tokens are those of 3 x 3 cells of 384², and as many as have the largest tile."""
    gradients = jax.grad(lambda *args: kernels.splash(*args).astype("float32").sum(), (0, 1, 2))
    with v5e(monkeypatch) as mesh:
        how = dict(sharding=NamedSharding(mesh, BATCH))
        shape = lambda *s, dtype: jax.ShapeDtypeStruct((16, *s), dtype, **how)  # noqa: E731
        q = shape(tokens, 2, 128, dtype="bfloat16")
        who = [shape(dtype="int32")]
        if masked:
            who += shape(5, tokens, dtype="bool"), shape(tokens, dtype="int32")
        text = jax.jit(gradients).lower(q, q, q, *who).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * 2


# Grids of n pictures of 384², with 512 tokens of text: their length, and a block of their keys.
TABLE = {2: (1664, 1664), 3: (2304, 1152), 4: (2816, 1408), 5: (3456, 1152), 6: (4096, 2048)}
TABLE |= {7: (4608, 1536), 8: (5120, 1280), 9: (5760, 1920), 10: (6400, 1280), 12: (7680, 1920)}


def test_tokens_are_cut_into_blocks():
    """Lengths grow by 4 % at most, from 128 tokens on, and are cut into equal blocks of multiples
    of 128, which what is worked on at once divides; grids of the paper get large ones."""
    for n, (length, keys) in TABLE.items():
        assert kernels.padded_length(576 * n + 512) == length
        assert kernels.choose_blocks(length, length, kernels.BLOCK)[1] == keys
    for tokens in (1, 128, 129, 300, 4096, 9728, 12800):
        length = kernels.padded_length(tokens)
        blocks = kernels.choose_blocks(length, length, kernels.BLOCK)
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
    monkeypatch.setattr(kernels, "cudnn", lambda q, k, v, *_: v)
    q, v = (jnp.asarray(normal(1, 4, 1, 8, seed=seed), jnp.bfloat16) for seed in range(2))
    assert jnp.array_equal(attention(q, q, v), v)
    with jax.set_mesh(make_mesh(parse_mesh("1"))):
        assert not jnp.array_equal(attention(q, q, v), v)
