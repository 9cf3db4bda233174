"""Adapters: the algebra of A and B."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import FLUX as PLAIN
from jax.extend.core import jaxprs_in_params
from lorafiles import folded, velocity

from vcloze_jax.config import FLUX_FILL
from vcloze_jax.model.layers import Dense, contract
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.ports.tables import lay_out, mmdit
from vcloze_jax.sharding import Split
from vcloze_jax.storage import folding, weights

# 9 stands between the widths 6 and 10 of vector_in and txt_in, so that ranks are mixed.
RANKED = replace(PLAIN, rank=9)


def filled(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), tree
    )


@pytest.fixture(scope="module")
def model():
    """graphdef of the plain and of the ranked model, a random adapter, a random base."""
    graphdef, adapter, base = weights.abstract(Flux, RANKED)
    plain, _, _ = weights.abstract(Flux, PLAIN)
    return plain, graphdef, filled(adapter), filled(base, 1)


def equal(left, right):
    left, right = weights.flat(left), weights.flat(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_zero_b_is_the_identity(model):
    """An adapter whose B and bias are zero, branch or folded, changes no bit of the output."""
    plain, ranked, adapter, base = model
    zero = {path: 0 if "lora_b" in path else 1 for path in weights.flat(adapter)}
    leaves = [x * zero[path] for path, x in weights.flat(adapter).items()]
    zero = jax.tree.unflatten(jax.tree.structure(adapter), leaves)
    with jax.disable_jit():  # a compiler may fuse, thus round, two programs differently
        bare = np.asarray(velocity(nnx.merge(plain, base)))
        branch = velocity(nnx.merge(ranked, zero, base))
        sums = velocity(nnx.merge(plain, folded(base, zero)))
    assert np.asarray(branch).tobytes() == bare.tobytes()
    assert np.asarray(sums).tobytes() == bare.tobytes()


def test_folded_layer_equals_its_branch(monkeypatch):
    """x (W + A B) + (b + b_B) = x W + b + (x A) B + b_B within float32, in one layer."""
    monkeypatch.setattr(Dense, "folding_is_cheaper", lambda *_: False)
    dense = Dense(24, 40, rank=8, rngs=nnx.Rngs(0))
    graphdef, adapter, base = folding.split(dense)
    adapter, x = filled(adapter), filled(jnp.zeros((3, 24)))
    with_branch = nnx.merge(graphdef, adapter, base)(x)
    sums = folded({"dense": base}, {"dense": adapter})["dense"]
    np.testing.assert_allclose(x @ sums["kernel"] + sums["bias"], with_branch, atol=1e-6)


@pytest.mark.parametrize("tokens", [(5, 7), (5,)], ids=["tokens", "vectors"])
@pytest.mark.parametrize(
    ("into", "out"), [((24,), (40,)), ((40,), (24,)), ((3, 8), (40,)), ((24,), (2, 20))]
)
def test_derivative_of_a_product_is_that_of_autodiff(into, out, tokens):
    """The hand-written derivative by x, W and bias, over any number of axes, is autodiff's, whether
    W has more rows than columns or fewer, of tokens and of vectors."""
    shapes = (*tokens, *into), (*into, *out), out
    args = [filled(jnp.zeros(shape), i) for i, shape in enumerate(shapes)]
    n, axes = len(into), (None,) * len(into + out)
    ours = lambda x, w, bias: contract(x, w, bias, n, axes)  # noqa: E731
    plain = lambda x, w, bias: jnp.tensordot(x, w, n) + bias  # noqa: E731
    gradients = [
        jax.grad(lambda *args: jnp.sin(product(*args)).sum(), (0, 1, 2))(*args)  # noqa: B023
        for product in (ours, plain)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("into", "out"), [((24,), (40,)), ((3, 8), (40,)), ((24,), (2, 20))])
def test_folding_before_the_product_changes_nothing(into, out, monkeypatch):
    """A layer gives the same output, and its adapter and input the same gradients to 1e-5, whether
    A B is folded into W or stands beside it."""
    split = Split(*((None,) * len(features) for features in (into, out)))
    graphdef, adapter, base = folding.split(Dense(into, out, split=split, rank=8, rngs=nnx.Rngs(0)))
    adapter, base, x = filled(adapter), filled(base, 1), filled(jnp.zeros((5, *into)), 2)
    results = []
    for folds in (True, False):
        monkeypatch.setattr(Dense, "folding_is_cheaper", lambda *_: folds)  # noqa: B023
        loss = lambda adapter, x: jnp.sin(nnx.merge(graphdef, adapter, base)(x)).sum()  # noqa: E731
        results.append(jax.value_and_grad(loss, (0, 1))(adapter, x))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_where_an_adapter_is_folded_before_the_product():
    """Where it saves time and rounds nothing: in float32, at a rank that is high for the width;
    never in bfloat16, nor at FLUX's width and rank."""
    small, flux = (
        nnx.eval_shape(lambda w=w, r=r: Dense(w, w, rank=r, rngs=nnx.Rngs(0)))
        for w, r in ((128, 32), (FLUX_FILL.flux.width, FLUX_FILL.recipe.rank))
    )
    assert small.folding_is_cheaper(jnp.float32) and not flux.folding_is_cheaper(jnp.float32)
    assert not small.folding_is_cheaper(jnp.bfloat16)


def test_folded_model_equals_its_branches(model, monkeypatch):
    """The whole model, folded, is the model with branches (float32; outputs are about 1, a chain
    of 5 blocks adds up some ten roundings)."""
    monkeypatch.setattr(Dense, "folding_is_cheaper", lambda *_: False)
    plain, ranked, adapter, base = model
    small = jax.tree.map(lambda x: 0.5 * x, adapter)
    branches = velocity(nnx.merge(ranked, small, base))
    sums = velocity(nnx.merge(plain, folded(base, small)))
    scale = float(jnp.abs(branches).max())
    np.testing.assert_allclose(sums / scale, branches / scale, rtol=0, atol=3e-6)


def test_fold_scales_and_keeps_dtype(model):
    """fold(s) adds s times the delta, in float32, and returns the dtype of the base; what has no
    branch stays the very same array; a layer that the base lacks is an error."""
    _, _, adapter, base = model
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    out = folded(half, adapter, 0.5)
    qkv, branch = half["double"]["img"]["qkv"], adapter["double"]["img"]["qkv"]
    a, b = np.float64(branch["lora_a"]), np.float64(branch["lora_b"])
    exact = np.float64(qkv["kernel"]) + 0.5 * np.einsum("lir,lr...->li...", a, b)
    got = out["double"]["img"]["qkv"]["kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), exact, rtol=2**-8, atol=1e-6)  # one rounding
    scale = half["double"]["img"]["q_norm"]["scale"]
    assert out["double"]["img"]["q_norm"]["scale"] is scale
    with pytest.raises(ValueError, match="nowhere"):
        folded(base, {"nowhere": branch})


def test_a_whole_norm_takes_the_place_of_the_base(model):
    """A norm that an adapter gives whole is the new one at scale 1, bit for bit, and halfway to it
    at scale 0.5; everything else stays the very same array."""
    base = model[3]
    old = base["double"]["img"]["q_norm"]["scale"]
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = jax.tree.map(lambda x: x.astype(dtype), base)  # noqa: B023
        new = np.float32(np.arange(old.size).reshape(old.shape))
        adapter = {"double": {"img": {"q_norm": {"scale": new}}}}
        out = folded(tree, adapter)["double"]["img"]
        np.testing.assert_array_equal(out["q_norm"]["scale"], new)
        assert out["q_norm"]["scale"].dtype == dtype
        assert out["qkv"]["kernel"] is tree["double"]["img"]["qkv"]["kernel"]
        half = folded(tree, adapter, 0.5)["double"]["img"]["q_norm"]["scale"]
        before = np.float32(tree["double"]["img"]["q_norm"]["scale"])
        np.testing.assert_array_equal(half, ((before + new) / 2).astype(dtype))


def eqns(jaxpr):
    """All equations of a jaxpr that yield something, those of loops and recomputed blocks too."""
    for eqn in filter(lambda eqn: eqn.outvars, jaxpr.eqns):
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from eqns(inner)


@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_gradients_are_float32_from_the_dot_on(remat):
    """Where layers compute in bfloat16, the gradients of A, B and b_B are sums in float32: of
    two bfloat16 factors if the layer computes in it, and never rounded on their way."""
    rank, batch = 8, 17  # no other axis is as long: what has the rank but no batch is an A or B
    config = replace(PLAIN, rank=rank, remat=remat)
    graphdef, adapter, base = weights.abstract(Flux, config)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    inputs = [
        jax.ShapeDtypeStruct((batch, *shape), jnp.bfloat16)
        for shape in ((11, config.in_channels), (13, config.text_width), (config.vec_width,), ())
    ]
    pe = np.ones((2, 1, 24, 1, config.head_dim // 2), np.float32)

    def loss(adapter, base, img, txt, pooled, t):
        model = nnx.merge(graphdef, adapter, base)
        mod = model.modulation(t.astype(jnp.float32), t.astype(jnp.float32), pooled)
        return model(img, txt, mod, pe).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter, base, *inputs)
    dots = 0
    for eqn in eqns(jaxpr.jaxpr):
        shape, dtype = eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype
        name, before = eqn.primitive.name, [x.aval.dtype for x in eqn.invars if hasattr(x, "aval")]
        if rank in shape and batch not in shape:
            if name == "dot_general":
                dots += before[0] == before[1] == jnp.bfloat16
                assert dtype == jnp.float32, eqn
            assert not (name == "convert_element_type" and before[0] == jnp.bfloat16), eqn
        if name == "reduce_sum" and batch in eqn.invars[0].aval.shape and batch not in shape:
            assert dtype == jnp.float32, eqn
    kinds = {path.rpartition("/")[0] for path in weights.flat(adapter)}
    embedders = sum("_in/" in path for path in kinds)  # in float32 throughout
    assert dots == 2 * (len(kinds) - embedders)


def test_split(model):
    """A model is the union of the trees that split gives, and the two share no array."""
    _, ranked, adapter, base = model
    _, adapter2, base2 = folding.split(nnx.merge(ranked, adapter, base))
    equal(adapter, adapter2)
    equal(base, base2)
    names = {path.rsplit("/")[-1] for path in weights.flat(adapter)}
    assert names == {"lora_a", "lora_b", "lora_bias"}
    assert not names & {path.rsplit("/")[-1] for path in weights.flat(base)}


def test_new_adapter():
    """A layer's own adapter: A inside +-1/sqrt(in), B and its bias zero; another key, another A."""
    first, second = (folding.split(Dense(24, 40, rank=8, rngs=nnx.Rngs(i)))[1] for i in range(2))
    assert weights.shapes(first) == {"lora_a": (24, 8), "lora_b": (8, 40), "lora_bias": (40,)}
    assert not np.any(first["lora_b"]) and not np.any(first["lora_bias"])
    assert 0.9 < np.abs(first["lora_a"]).max() * 24**0.5 <= 1
    assert np.all(first["lora_a"] != second["lora_a"])


def test_axes_change_no_number():
    """A layer whose inputs and outputs have axes draws what the flat one draws and says what it
    says, with its branch; folded, its sums are the same."""
    x = filled(jnp.zeros((3, 24)))
    flat = Dense(24, 40, rank=8, rngs=nnx.Rngs(0))
    split = Split((None,) * 3, (None,) * 2)
    axes = Dense((2, 3, 4), (5, 8), split=split, rank=8, rngs=nnx.Rngs(0))
    assert axes.lora_a.shape == (2, 3, 4, 8) and axes.lora_b.shape == (8, 5, 8)
    for name in ("kernel", "lora_a"):
        here, there = getattr(axes, name)[...], getattr(flat, name)[...]
        np.testing.assert_array_equal(here.reshape(there.shape), there)
    flat.lora_b[...] = filled(flat.lora_b[...])
    axes.lora_b[...] = flat.lora_b.reshape(8, 5, 8)
    there = flat(x).reshape(3, 5, 8)
    np.testing.assert_allclose(axes(x.reshape(3, 2, 3, 4)), there, rtol=0, atol=1e-5)
    _, adapter, base = folding.split(axes)
    sums = folded({"dense": base}, {"dense": adapter})["dense"]
    out = jnp.tensordot(x.reshape(3, 2, 3, 4), sums["kernel"], 3) + sums["bias"]
    np.testing.assert_allclose(out, there, rtol=0, atol=1e-5)


def test_count_at_full_size():
    """Rank 256 on FLUX.1-Fill: 56 arrays a third of which are A; 504 modules in diffusers."""
    _, adapter, _ = weights.abstract(Flux, replace(FLUX_FILL.flux, rank=256))
    shapes = weights.shapes(adapter)
    stems = {
        piece.key
        for path, shape in shapes.items()
        if path.endswith("/lora_a")
        for piece in lay_out(mmdit.DIFFUSERS, path.replace("lora_a", "kernel"), shape).pieces
    }
    assert len(stems) == 504
    assert shapes["final/linear/lora_a"] == (3072, 64)  # the rank is clipped
    count = sum(x.size for x in jax.tree.leaves(adapter))
    assert count == sum(np.prod(shape) for shape in shapes.values())
