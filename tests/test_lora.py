"""Adapters: the algebra of A and B, and PEFT's files in and out."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ports import lora as names
from vcloze_jax import lora, weights
from vcloze_jax.config import FLUX_FILL, FluxConfig, UserError
from vcloze_jax.layers import Dense
from vcloze_jax.mmdit import Flux
from vcloze_jax.ops import rope_table

# 9 stands between the widths 6 and 10 of vector_in and txt_in, so that ranks are mixed.
PLAIN = FluxConfig(
    width=24,
    heads=2,
    double_blocks=2,
    single_blocks=3,
    text_width=10,
    vec_width=6,
    axes_dim=(4, 4, 4),
    remat=False,
)
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


@pytest.fixture
def file(model, tmp_path):
    """The random adapter in PEFT's naming."""
    weights.write_lora(tmp_path / "lora.safetensors", model[2])
    return tmp_path / "lora.safetensors"


def inputs():
    rng = np.random.default_rng(1)
    ids = np.zeros((9, 3))
    ids[5:, 0], ids[5:, 2] = 1, np.arange(4)
    shapes = (2, 4, 384), (2, 5, 10), (2, 6)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes], ids


@jax.jit
def velocity(model):
    (img, txt, vec), ids = inputs()
    t, guidance = jnp.float32([0.3, 0.9]), jnp.float32([1.0, 3.5])
    pe = rope_table(ids[None], PLAIN.axes_dim, PLAIN.theta)
    return model(jnp.asarray(img), jnp.asarray(txt), model.modulation(t, guidance, vec), pe)


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
    bare = np.asarray(velocity(nnx.merge(plain, base)))
    assert np.asarray(velocity(lora.combine(ranked, zero, base))).tobytes() == bare.tobytes()
    assert np.asarray(velocity(nnx.merge(plain, lora.fold(base, zero)))).tobytes() == bare.tobytes()


def test_folded_layer_equals_its_branch():
    """x (W + A B) + (b + b_B) = x W + b + (x A) B + b_B within float32, in one layer."""
    dense = Dense(24, 40, rank=8, rngs=nnx.Rngs(0))
    graphdef, adapter, base = lora.split(dense)
    adapter, x = filled(adapter), filled(jnp.zeros((3, 24)))
    with_branch = lora.combine(graphdef, adapter, base)(x)
    folded = lora.fold({"dense": base}, {"dense": adapter})["dense"]
    np.testing.assert_allclose(x @ folded["kernel"] + folded["bias"], with_branch, atol=1e-6)


def test_folded_model_equals_its_branches(model):
    """The whole model, folded, is the model with branches (float32; outputs are about 1, a chain
    of 5 blocks adds up some ten roundings)."""
    plain, ranked, adapter, base = model
    small = jax.tree.map(lambda x: 0.5 * x, adapter)
    branches = velocity(lora.combine(ranked, small, base))
    folded = velocity(nnx.merge(plain, lora.fold(base, small)))
    scale = float(jnp.abs(branches).max())
    np.testing.assert_allclose(folded / scale, branches / scale, rtol=0, atol=3e-6)


def test_fold_scales_and_keeps_dtype(model):
    """fold(s) adds s times the delta, in float32, and returns the dtype of the base; what has no
    branch stays the very same array; a layer that the base lacks is an error."""
    _, _, adapter, base = model
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    out = lora.fold(half, adapter, 0.5)
    qkv, branch = half["double"]["img"]["qkv"], adapter["double"]["img"]["qkv"]
    a, b = np.float64(branch["lora_a"]), np.float64(branch["lora_b"])
    exact = np.float64(qkv["kernel"]) + 0.5 * a @ b
    got = out["double"]["img"]["qkv"]["kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), exact, rtol=2**-8, atol=1e-6)  # one rounding
    scale = half["double"]["img"]["q_norm"]["scale"]
    assert out["double"]["img"]["q_norm"]["scale"] is scale
    with pytest.raises(ValueError, match="nowhere"):
        lora.fold(base, {"nowhere": branch})


def test_split_and_combine(model):
    """combine is the inverse of split, and the two trees share no array."""
    _, ranked, adapter, base = model
    _, adapter2, base2 = lora.split(lora.combine(ranked, adapter, base))
    equal(adapter, adapter2)
    equal(base, base2)
    names = {path.rsplit("/")[-1] for path in weights.flat(adapter)}
    assert names == {"lora_a", "lora_b", "lora_bias"}
    assert not names & {path.rsplit("/")[-1] for path in weights.flat(base)}


def test_new_adapter():
    """init gives the module's own adapter: A inside +-1/sqrt(in), B and its bias zero; another key,
    another A."""
    layer = lambda rngs: Dense(24, 40, rank=8, rngs=rngs)  # noqa: E731
    first, second = (lora.init(layer, jax.random.key(i)) for i in range(2))
    assert weights.shapes(first) == {"lora_a": (24, 8), "lora_b": (8, 40), "lora_bias": (40,)}
    assert not np.any(first["lora_b"]) and not np.any(first["lora_bias"])
    assert 0.9 < np.abs(first["lora_a"]).max() * 24**0.5 <= 1
    assert np.all(first["lora_a"] != second["lora_a"])


def test_count_at_full_size():
    """Rank 256 on FLUX.1-Fill: 56 arrays a third of which are A; 504 modules in diffusers."""
    _, adapter, _ = weights.abstract(Flux, replace(FLUX_FILL.flux, rank=256))
    shapes = weights.shapes(adapter)
    stems = {
        piece.key.rsplit(".lora")[0]
        for path, shape in shapes.items()
        for piece in names.leaf(names.PEFT, path, shape).pieces
    }
    assert len(stems) == 504
    assert shapes["final/linear/lora_a"] == (3072, 64)  # the rank is clipped
    assert lora.count(adapter) == sum(np.prod(shape) for shape in shapes.values())


def test_round_trip_is_bit_identical(model, file):
    """Our adapter, written for PEFT and read again, is the same to the last bit and can be trained
    on; every fused A is there once for each of its parts."""
    adapter = model[2]
    again = weights.read_lora(file, PLAIN)
    equal(adapter, again)
    assert weights.fit_lora(file, again, PLAIN) == RANKED
    there = load_file(file)
    stem = "transformer.single_transformer_blocks.1."
    for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        a = there[f"{stem}{part}.lora_A.weight"]
        np.testing.assert_array_equal(a.T, adapter["single"]["linear1"]["lora_a"][1])


def test_swap_is_of_outputs_only(model, file):
    """In the final modulation the halves of B and of its bias are swapped, A is as it is."""
    there, final = load_file(file), model[2]["final"]["mod"]
    stem = "transformer.norm_out.linear"
    np.testing.assert_array_equal(there[f"{stem}.lora_A.weight"].T, final["lora_a"])
    for key, name in ((".lora_B.weight", "lora_b"), (".lora_B.bias", "lora_bias")):
        shift, scale = np.split(np.asarray(final[name]), 2, -1)
        np.testing.assert_array_equal(there[stem + key].T, np.concatenate([scale, shift], -1))


def test_metadata_says_that_alpha_is_the_rank(file):
    """The header carries a LoraConfig in which alpha equals the rank of each module, clipped ones
    included, so that readers which know one alpha only are not misled."""
    with safe_open(file, "numpy") as f:
        config = json.loads(f.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 9
    ranks = config["transformer.rank_pattern"]
    assert ranks == config["transformer.alpha_pattern"]
    assert ranks == {"^time_text_embed.text_embedder.linear_1": 6}
    assert config["transformer.lora_bias"] and len(config["transformer.target_modules"]) > 50


def foreign(rng, alphas=True, prefix="transformer."):
    """An adapter as others train it: q and v of one block, each with a rank and an A of its own,
    a single block's MLP with a bias, the final modulation; alphas as tensors."""
    rows = {
        "transformer_blocks.1.attn.to_q": (3, 24, 24, 6.0),
        "transformer_blocks.1.attn.to_v": (2, 24, 24, 1.0),
        "single_transformer_blocks.0.proj_mlp": (4, 24, 96, 4.0),
        "norm_out.linear": (2, 24, 48, 3.0),
    }
    out, deltas = {}, {}
    for stem, (r, fan_in, fan_out, alpha) in rows.items():
        a, b = rng.standard_normal((r, fan_in)), rng.standard_normal((fan_out, r))
        bias = rng.standard_normal(fan_out) * (stem == "norm_out.linear")
        out[f"{prefix}{stem}.lora_A.weight"] = a.astype(np.float32)
        out[f"{prefix}{stem}.lora_B.weight"] = b.astype(np.float32)
        if stem == "norm_out.linear":
            out[f"{prefix}{stem}.lora_B.bias"] = bias.astype(np.float32)
        if alphas:
            out[f"{prefix}{stem}.alpha"] = np.array(alpha, np.float32)
        scale = alpha / r if alphas else 1.0
        deltas[stem] = (scale * (b @ a).T, scale * bias)
    return out, deltas


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("alphas", [True, False])
def test_foreign_adapters_fold_exactly(model, tmp_path, alphas, prefix):
    """Any PEFT file is W + alpha / r B A in the columns that it names, nothing elsewhere: with an A
    per part, mixed ranks, some layers only, and no alpha meaning alpha = r."""
    base = model[3]
    tensors, deltas = foreign(np.random.default_rng(5), alphas, prefix)
    save_file(tensors, tmp_path / "theirs.safetensors")
    adapter = weights.read_lora(tmp_path / "theirs.safetensors", PLAIN)
    folded = lora.fold(jax.tree.map(jnp.zeros_like, base), adapter)
    expected = {path: np.zeros(x.shape) for path, x in weights.flat(base).items()}
    qkv = expected["double/img/qkv/kernel"][1]
    qkv[:, :24] = deltas["transformer_blocks.1.attn.to_q"][0]
    qkv[:, 48:] = deltas["transformer_blocks.1.attn.to_v"][0]
    mlp = deltas["single_transformer_blocks.0.proj_mlp"]
    expected["single/linear1/kernel"][0][:, 72:] = mlp[0]
    last = deltas["norm_out.linear"]
    expected["final/mod/kernel"] = np.roll(last[0], 24, -1)
    expected["final/mod/bias"] = np.roll(last[1], 24, -1)
    for path, x in weights.flat(folded).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=path)
    with pytest.raises(UserError, match="cannot be trained on"):
        weights.fit_lora(tmp_path / "theirs.safetensors", adapter, PLAIN)


Q = "transformer.transformer_blocks.0.attn.to_q"


def header(file, config):
    save_file(load_file(file), file, metadata={names.METADATA: json.dumps(config)})


def test_alpha_of_the_header(model, file):
    """Alphas of PEFT's header count as PEFT counts them: the first pattern that fits, else one for
    all; divided by the root of the rank where the header says so."""
    before = weights.read_lora(file, PLAIN)["final"]["linear"]["lora_b"]
    alpha = {"transformer.lora_alpha": 18, "transformer.alpha_pattern": {"^proj_out": 3, "out": 7}}
    header(file, alpha)
    tree = weights.read_lora(file, PLAIN)
    np.testing.assert_allclose(tree["final"]["linear"]["lora_b"], before * 3 / 9, rtol=1e-6)
    theirs = model[2]["single"]["linear2"]["lora_b"]
    np.testing.assert_allclose(tree["single"]["linear2"]["lora_b"], theirs * 18 / 9, rtol=1e-6)
    header(file, alpha | {"transformer.use_rslora": True})
    tree = weights.read_lora(file, PLAIN)
    np.testing.assert_allclose(tree["final"]["linear"]["lora_b"], before * 3 / 3, rtol=1e-6)


def without(key):
    return lambda d: {k: x for k, x in d.items() if k != key}


SPOILED = {
    "half, no B": (without(f"{Q}.lora_B.weight"), [f"{Q}.lora_B.weight is missing"]),
    "half, no A": (without(f"{Q}.lora_A.weight"), [f"{Q}.lora_A.weight is missing"]),
    "transposed": (
        lambda d: d | {f"{Q}.lora_A.weight": d[f"{Q}.lora_A.weight"].T.copy()},
        [f"{Q}.lora_A.weight is [24, 9]"],
    ),
    "ranks differ": (
        lambda d: d | {f"{Q}.lora_A.weight": d[f"{Q}.lora_A.weight"][:5]},
        [f"{Q}.lora_A.weight is [5, 24], expected [9, 24]"],
    ),
    "rank 0": (
        lambda d: (
            d | {f"{Q}.lora_A.weight": np.zeros((0, 24)), f"{Q}.lora_B.weight": np.zeros((24, 0))}
        ),
        [f"{Q}.lora_A.weight is [0, 24]"],
    ),
    "deeper model": (
        lambda d: d | {Q.replace("0", "2") + ".lora_A.weight": d[f"{Q}.lora_A.weight"]},
        ["transformer_blocks.2.attn.to_q.lora_A.weight [9, 24] is unknown"],
    ),
    "text encoder": (
        lambda d: d | {"text_encoder.q.lora_A.weight": d[f"{Q}.lora_A.weight"]},
        ["text_encoder.q.lora_A.weight"],
    ),
    "DoRA": (
        lambda d: d | {f"{Q}.lora_magnitude_vector": np.ones(24)},
        ["lora_magnitude_vector"],
    ),
    "wrong bias": (
        lambda d: d | {f"{Q}.lora_B.bias": np.ones((24, 1))},
        [f"{Q}.lora_B.bias is [24, 1], expected [24]"],
    ),
    "no adapter": (lambda d: {"transformer.nothing.lora_A.weight": np.ones(3)}, ["nothing"]),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_adapters_are_refused(file, kind):
    """An adapter that does not fit is one line that names the key, and is never half applied."""
    spoil, words = SPOILED[kind]
    save_file(spoil(load_file(file)), file)
    with pytest.raises(UserError) as error:
        weights.check_lora(file, PLAIN)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_adapter_of_another_base(file):
    """An adapter of FLUX.1-Fill (384 channels) on FLUX.1-dev (64) says just that."""
    with pytest.raises(UserError, match=re.escape("[9, 384], expected [9, 64] (64 input channels")):
        weights.check_lora(file, replace(PLAIN, in_channels=64))


def test_broken_headers_and_tensors(file):
    """NaN is named; a header that is no LoraConfig, and DoRA, are errors."""
    good = load_file(file)
    save_file(good | {f"{Q}.lora_B.weight": np.full((24, 9), np.nan, np.float32)}, file)
    with pytest.raises(UserError, match=f"{Q}.lora_B.weight holds NaN"):
        weights.read_lora(file, PLAIN)
    save_file(good, file)
    for config in ([], {"transformer.lora_alpha": []}, {"transformer.alpha_pattern": {"(": 1}}):
        header(file, config)
        with pytest.raises(UserError, match="is not a LoraConfig"):
            weights.read_lora(file, PLAIN)
    header(file, {"transformer.use_dora": True})
    with pytest.raises(UserError, match="DoRA"):
        weights.read_lora(file, PLAIN)


@pytest.mark.parity
def test_diffusers_applies_our_adapter(model, file, tmp_path):
    """load_lora_weights of diffusers at scale 1 gives our velocity (float32, outputs about 10)."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("peft")
    plain, ranked, adapter, base = model
    preset = replace(FLUX_FILL, flux=PLAIN)
    weights.save_pipeline(tmp_path, preset, {"flux": nnx.merge(plain, base)}, "float32")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    empty = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxFillPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
        **dict.fromkeys(empty),
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    (img, txt, vec), ids = inputs()
    with torch.no_grad():
        there = transformer(
            hidden_states=torch.tensor(img),
            encoder_hidden_states=torch.tensor(txt),
            pooled_projections=torch.tensor(vec),
            timestep=torch.tensor([0.3, 0.9]),
            guidance=torch.tensor([1.0, 3.5]),
            img_ids=torch.tensor(ids[5:]),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0].numpy()
    here = velocity(lora.combine(ranked, adapter, base))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)
