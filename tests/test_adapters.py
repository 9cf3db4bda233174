"""Adapter files: every naming in, ours out, and what is refused."""

import json
import re
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import lorafiles
import numpy as np
import pytest
import tiny
from flax import nnx
from lorafiles import LORA, PLAIN, RANKED, edited, renamed, same_trees
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import FLUX_FILL, FluxConfig, UserError
from vcloze_jax.devices import make_mesh, parse_mesh, put
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import adapters, folding, weights


@pytest.fixture(scope="module")
def tree():
    return lorafiles.adapter()


@pytest.fixture
def file(tree, tmp_path):
    """The random adapter as training writes it."""
    return lorafiles.written(tmp_path, tree)


def test_round_trip_is_bit_identical(tree, file):
    """Our adapter, written for PEFT and read again, is the same to the last bit and can be trained
    on; every fused A is there once for each of its parts."""
    again = adapters.load(file, PLAIN)
    same_trees(tree, again)
    assert adapters.fit(file, again, PLAIN) == RANKED
    there = load_file(file)
    stem = "transformer.single_transformer_blocks.1."
    for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        a = there[f"{stem}{part}.lora_A.weight"]
        np.testing.assert_array_equal(a.T, tree["single"]["linear1"]["lora_a"][1])


def test_written_array_by_array(tmp_path):
    """An adapter that lies on eight devices is written with no more than a few of its stacks on the
    host, and the arrays keep no copy there; its bytes are those of one in NumPy."""
    sizes = dict(width=128, heads=4, text_width=64, vec_width=64, rank=64)
    _, shapes, _ = weights.abstract(Flux, FluxConfig(double_blocks=8, single_blocks=8, **sizes))
    tree, mesh = lorafiles.integers(shapes, 0), make_mesh(parse_mesh("8"))
    there, sizes = put(tree, mesh, "flux/"), [x.nbytes for x in jax.tree.leaves(tree)]
    adapters.save(tmp_path / "host", tree)
    tracemalloc.start()
    adapters.save(tmp_path / "devices", there)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "devices").read_bytes() == (tmp_path / "host").read_bytes()
    assert peak < 3 * max(sizes) + 2**20 < 0.6 * sum(sizes), (peak, max(sizes), sum(sizes))


def test_swap_is_of_outputs_only(tree, file):
    """In the final modulation the halves of B and of its bias are swapped, A is as it is."""
    there, final = load_file(file), tree["final"]["mod"]
    stem = "transformer.norm_out.linear"
    np.testing.assert_array_equal(there[f"{stem}.lora_A.weight"].T, final["lora_a"])
    for key, name in ((".lora_B.weight", "lora_b"), (".lora_B.bias", "lora_bias")):
        shift, scale = np.split(np.asarray(final[name]), 2, -1)
        np.testing.assert_array_equal(there[stem + key].T, np.concatenate([scale, shift], -1))


def test_metadata_says_that_alpha_is_the_rank(file):
    """The header carries a LoraConfig in which alpha equals the rank of each module, clipped ones
    included, so that readers which know one alpha only are not misled."""
    with safe_open(file, "numpy") as f:
        config = json.loads(f.metadata()[LORA])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 11
    ranks = config["transformer.rank_pattern"]
    assert ranks == config["transformer.alpha_pattern"]
    assert ranks == {"^time_text_embed.text_embedder.linear_1": 10}
    assert config["transformer.lora_bias"] and len(config["transformer.target_modules"]) == 50


def foreign(rng, alphas=True, prefix="transformer."):
    """An adapter as others train it: q and v of one block, each with a rank and an A of its own,
    a single block's MLP with a bias, the final modulation; alphas as tensors."""
    rows = {
        "transformer_blocks.1.attn.to_q": (3, 16, 16, 6.0),
        "transformer_blocks.1.attn.to_v": (2, 16, 16, 1.0),
        "single_transformer_blocks.0.proj_mlp": (4, 16, 64, 4.0),
        "norm_out.linear": (2, 16, 32, 3.0),
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


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
@pytest.mark.parametrize("alphas", [True, False])
def test_foreign_adapters_fold_exactly(tmp_path, alphas, prefix):
    """Any PEFT file is W + alpha / r B A in the columns that it names, nothing elsewhere: with an A
    per part, mixed ranks, some layers only, and no alpha meaning alpha = r."""
    base = lorafiles.base()
    tensors, deltas = foreign(np.random.default_rng(5), alphas, prefix)
    save_file(tensors, tmp_path / "theirs.safetensors")
    adapter = adapters.load(tmp_path / "theirs.safetensors", PLAIN)
    folded = lorafiles.folded(jax.tree.map(jnp.zeros_like, base), adapter)
    expected = {path: np.zeros(x.shape) for path, x in weights.flat(base).items()}
    qkv = expected["double/img/qkv/kernel"][1]
    for i, part in ((0, "to_q"), (2, "to_v")):
        qkv[:, i] = deltas[f"transformer_blocks.1.attn.{part}"][0].reshape(qkv[:, i].shape)
    mlp = expected["single/linear1/kernel"][0][:, 3:]
    mlp[...] = deltas["single_transformer_blocks.0.proj_mlp"][0].reshape(mlp.shape)
    last = deltas["norm_out.linear"]
    expected["final/mod/kernel"] = np.roll(last[0], 16, -1)
    expected["final/mod/bias"] = np.roll(last[1], 16, -1)
    for path, x in weights.flat(folded).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=path)
    with pytest.raises(UserError, match="cannot be trained on"):
        adapters.fit(tmp_path / "theirs.safetensors", adapter, PLAIN)


Q, V = (f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qv")


def test_alpha_of_the_header(tree, file):
    """Alphas of PEFT's header count as PEFT counts them: the first pattern that fits, else one for
    all; divided by the root of the rank where the header says so."""
    alpha = {"lora_alpha": 22, "alpha_pattern": {"^proj_out": 3, "out": 7}}
    for slora, last, others in ((False, 3 / 11, 2), (True, 3 / 11**0.5, 22 / 11**0.5)):
        edited(file, lambda d: d, **alpha, use_rslora=slora)
        got = adapters.load(file, PLAIN)
        for path, scale in (("final/linear", last), ("single/linear1", others)):
            block, name = path.split("/")
            exact = np.float64(tree[block][name]["lora_b"]) * scale
            np.testing.assert_allclose(got[block][name]["lora_b"], exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int64", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_of_any_type(tree, file, dtype, shape):
    """An alpha is a number, whatever the type and however many axes of length 1 it is written in;
    but true and false are none."""
    for good in (True, False):
        alpha = np.full(shape, 22, dtype) if good else np.full(shape, True)
        edited(file, lambda d, alpha=alpha: d | {f"{Q}.alpha": alpha})
        if good:
            b = adapters.load(file, PLAIN)["double"]["img"]["qkv"]["lora_b"][0]
            exact = np.float64(tree["double"]["img"]["qkv"]["lora_b"][0])
            exact[:, 0] *= 2
            np.testing.assert_array_equal(b.sum(0), exact.sum(0))
        else:
            with pytest.raises(UserError, match=f"{Q}.alpha is of type BOOL"):
                adapters.check(file, PLAIN)


def test_a_fault_is_told_once(file):
    """What is wrong with all in the same way is said of the first, and how many there are."""
    halves = {"F64": np.float64, "I32": np.int32}
    for kind, dtype in halves.items():
        edited(file, lambda d, dtype=dtype: {key: x.astype(dtype) for key, x in d.items()})
        with pytest.raises(UserError) as error:
            adapters.check(file, PLAIN)
        assert str(error.value).count(f"is of type {kind}") == 1
        assert str(error.value).endswith(", and 149 others likewise")
    edited(
        file, lambda d: d | {f"{Q}.dora_scale": np.ones(16), f"{V}.dora_scale": np.ones((16, 1))}
    )
    with pytest.raises(UserError, match=r"a DoRA.*PEFT\), and 1 others likewise$"):
        adapters.check(file, PLAIN)


def without(key):
    return lambda d: {k: x for k, x in d.items() if k != key}


def other(**tensors):
    return lambda d: d | {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}


# what is done to training's file, or to it in kohya's naming -> what the error must say
SPOILED = {
    "half, no B": (without(f"{Q}.lora_B.weight"), [f"{Q}.lora_B.weight is missing"]),
    "half, no A": (without(f"{Q}.lora_A.weight"), [f"{Q}.lora_A.weight is missing"]),
    "transposed": (
        lambda d: d | {f"{Q}.lora_A.weight": d[f"{Q}.lora_A.weight"].T.copy()},
        [f"{Q}.lora_A.weight is [16, 11]"],
    ),
    "ranks differ": (
        lambda d: d | {f"{Q}.lora_A.weight": d[f"{Q}.lora_A.weight"][:5]},
        [f"{Q}.lora_A.weight is [5, 16], expected [11, 16]"],
    ),
    "rank 0": (
        other(**{f"{Q}.lora_A.weight": (0, 16), f"{Q}.lora_B.weight": (16, 0)}),
        [f"{Q}.lora_A.weight is [0, 16]"],
    ),
    "deeper model": (
        other(**{Q.replace("0", "2") + ".lora_A.weight": (11, 16)}),
        ["transformer_blocks.2.attn.to_q.lora_A.weight [11, 16] is unknown"],
    ),
    "text encoder": (
        other(**{"text_encoder.q.lora_A.weight": (2, 2)}),
        ["text_encoder.q.lora_A.weight [2, 2] is unknown (for a text encoder"],
    ),
    "DoRA": (
        other(**{f"{Q}.lora_magnitude_vector": (16,)}),
        ["lora_magnitude_vector [16] is unknown (a DoRA"],
    ),
    "wrong bias": (
        other(**{f"{Q}.lora_B.bias": (16, 1)}),
        [f"{Q}.lora_B.bias is [16, 1], expected [16]"],
    ),
    "bias without factors": (
        lambda d: {k: x for k, x in d.items() if not k.startswith(f"{Q}.lora_") or "bias" in k},
        [f"{Q}.lora_A.weight is missing", f"{Q}.lora_B.weight is missing"],
    ),
    "wrong alpha": (other(**{f"{Q}.alpha": (2,)}), [f"{Q}.alpha is [2], expected a number"]),
    "integers": (
        lambda d: d | {f"{Q}.lora_A.weight": np.zeros((11, 16), np.int32)},
        [f"{Q}.lora_A.weight is of type I32"],
    ),
    "two namings": (
        other(**{"double_blocks.0.img_attn.qkv.lora_A.weight": (11, 16)}),
        ["read as an adapter in diffusers' naming: double_blocks.0.img_attn.qkv"],
    ),
    "with and without prefix": (
        other(**{Q.removeprefix("transformer.") + ".lora_A.weight": (11, 16)}),
        ["transformer_blocks.0.attn.to_q.lora_A.weight [11, 16] is unknown"],
    ),
    "no adapter": (
        lambda d: {"transformer.nothing.lora_A.weight": np.ones(3)},
        ["no adapter of FLUX", "transformer.nothing.lora_A.weight"],
    ),
    "a transformer": (
        lambda d: {"double_blocks.0.img_attn.qkv.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "a transformer in BFL's naming"],
    ),
    "XLabs": (
        lambda d: {"double_blocks.0.processor.qkv_lora1.down.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "XLabs"],
    ),
    "IA3": (lambda d: {f"{Q}.ia3_l": np.ones((1, 3))}, ["fold it into weights"]),
    "FLUX.2": (
        lambda d: {"single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": np.ones(3)},
        ["no adapter of FLUX", "(of FLUX.2)"],
    ),
    "Wan": (
        lambda d: {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "(of Wan)"],
    ),
    "empty": (lambda d: {}, ["no adapter of FLUX"]),
    "everything unknown": (
        lambda d: {f"{k}_": x for k, x in d.items()},
        ["no adapter", "and 140 more"],
    ),
}
K = "lora_unet_double_blocks_0_img_attn_qkv"
KOHYA = {
    "half": (without(f"{K}.lora_up.weight"), [f"{K}.lora_up.weight is missing"]),
    "wider": (
        other(**{f"{K}.lora_up.weight": (51, 11)}),
        ["in kohya's naming", f"{K}.lora_up.weight is [51, 11], expected [48, 11]"],
    ),
    "difference": (
        other(**{f"{K}.diff": (48, 16)}),
        [f"{K}.diff [48, 16] is unknown (a difference of weights"],
    ),
    "bias": (other(**{f"{K}.diff_b": (16,)}), [f"{K}.diff_b is [16], expected [48]"]),
    "LoKr": (other(**{f"{K}.lokr_w1": (4, 4)}), ["lokr_w1 [4, 4] is unknown (of LoKr", "fold it"]),
    "CLIP": (
        other(lora_te1_text_model_encoder_layers_0_mlp_fc1=(2, 2)),
        ["is unknown (for a text encoder", "kohya's with --network_train_unet_only"],
    ),
    "a number": (
        other(**{"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ()}),
        ["fc1.alpha is unknown (for a text encoder"],
    ),
    "Stable Diffusion": (
        lambda d: {"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "for Stable Diffusion"],
    ),
    "LyCORIS": (  # its many alphas, of float32, stand first in its header
        lambda d: {
            f"lycoris_transformer_blocks_{i}_attn_to_q.{leaf}": np.ones(2, dtype)
            for i in range(12)
            for leaf, dtype in (("alpha", np.float32), ("lokr_w1", np.float16))
        },
        ["no adapter of FLUX", "to_q.lokr_w1 (of LoKr", "fold it", "and 11 others likewise"],
    ),
    "layer of a million": (
        other(**{K.replace("0", "1000000") + ".lora_down.weight": (11, 16)}),
        ["lora_unet_double_blocks_1000000_img_attn_qkv.lora_down.weight [11, 16] is unknown"],
    ),
}


@pytest.mark.parametrize(
    ("to", "kind"), [("diffusers", kind) for kind in SPOILED] + [("kohya", kind) for kind in KOHYA]
)
def test_spoiled_adapters_are_refused(tree, tmp_path, to, kind):
    """An adapter that does not fit is one line that names the key, and is never half applied."""
    kohya = to == "kohya"
    file = lorafiles.written(tmp_path, tree, bias=not kohya)
    file = renamed(file, "kohya") if kohya else file
    spoil, words = (KOHYA if kohya else SPOILED)[kind]
    save_file(spoil(load_file(file)), file)
    with pytest.raises(UserError) as error:
        adapters.check(file, PLAIN)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert len(message.split("; ")) <= 12


@pytest.mark.parametrize("alpha", [11, 22, 3])
def test_a_difference_of_a_bias_is_added_whole(tree, tmp_path, alpha):
    """ComfyUI adds `diff_b` to the bias of the base, whatever alpha / r is; so do we. Where alpha
    is 0 it has no place, and is refused."""
    plain = renamed(lorafiles.written(tmp_path, tree, bias=False), "kohya")
    file, wanted = tmp_path / "more.safetensors", np.arange(48, dtype=np.float32)
    change = {f"{K}.diff_b": wanted, f"{K}.alpha": np.array(alpha, np.float32)}
    save_file(load_file(plain) | change, file)
    got = adapters.load(file, PLAIN)["double"]["img"]["qkv"]["lora_bias"]
    np.testing.assert_allclose(got[0].ravel(), wanted, rtol=1e-6)
    assert not got[1:].any()
    save_file(load_file(plain) | change | {f"{K}.alpha": np.array(0, np.float32)}, file)
    with pytest.raises(UserError, match=f"{K}.diff_b: has no bias on B, as alpha is 0"):
        adapters.load(file, PLAIN)


@pytest.mark.parametrize("to", lorafiles.NAMINGS)
def test_adapters_of_dev_see_the_noise_alone(tmp_path, to, capsys):
    """An adapter of FLUX.1-dev, whose input layer has 64 channels, is loaded onto Fill's 384 with
    zeros for the other 320, which come after them, and says so in one line; the rest of it, and on
    dev itself all of it, is as it was, without a word. Of 128 channels it is refused."""
    dev = replace(RANKED, in_channels=64)
    tree = lorafiles.integers(weights.abstract(Flux, dev)[1], 3)
    tree = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "lora_bias" in str(path[-1]) else x, tree
    )
    file = lorafiles.written(tmp_path, tree, bias=False)
    file = file if to == "diffusers" else renamed(file, to)
    adapters.check(file, replace(PLAIN, in_channels=64))
    assert capsys.readouterr().out == ""
    same_trees(adapters.load(file, replace(PLAIN, in_channels=64)), tree)
    adapters.check(file, PLAIN)
    line = f"lora: {file}: made for FLUX.1-dev, of 64 input channels; with zeros for the other 320"
    assert capsys.readouterr().out == line + "\n"
    got, a = adapters.load(file, PLAIN), tree["img_in"]["lora_a"]
    np.testing.assert_array_equal(got["img_in"]["lora_a"], np.concatenate([a, np.zeros((320, 11))]))
    got["img_in"]["lora_a"] = a
    same_trees(got, tree)
    tree["img_in"]["lora_a"] = np.concatenate([a, a])
    with pytest.raises(UserError, match=re.escape("is [11, 128], expected [11, 384]")):
        adapters.check(lorafiles.written(tmp_path, tree), PLAIN)


@pytest.mark.parametrize("to", lorafiles.NAMINGS)
def test_adapter_of_another_base(tree, tmp_path, to):
    """An adapter of FLUX.1-Fill (384 channels) on FLUX.1-dev (64) says just that, in each naming;
    so does one of a deeper and of a wider model."""
    file = lorafiles.written(tmp_path, tree, bias=False)
    file = file if to == "diffusers" else renamed(file, to)
    for config, words in (
        (replace(PLAIN, in_channels=64), "[11, 384], expected [11, 64] (64 input channels"),
        (replace(PLAIN, single_blocks=1), "is unknown"),
        (replace(PLAIN, width=32, axes_dim=(4, 4, 8)), "is [11, 16], expected [11, 32]"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            adapters.check(file, config)


def test_broken_headers_and_tensors(file):
    """NaN is named; a header that is no LoraConfig, DoRA, a folder and no file are errors."""
    good = load_file(file)
    save_file(good | {f"{Q}.lora_B.weight": np.full((16, 11), np.nan, np.float32)}, file)
    with pytest.raises(UserError, match=f"{Q}.lora_B.weight holds NaN"):
        adapters.load(file, PLAIN)
    save_file(good, file)
    for config in (dict(lora_alpha=[]), dict(alpha_pattern={"(": 1}), dict(lora_alpha=1e999)):
        with pytest.raises(UserError, match="is not a LoraConfig"):
            adapters.load(edited(file, lambda d: d, **config), PLAIN)
    with pytest.raises(UserError, match="DoRA"):
        adapters.load(edited(file, lambda d: d, use_dora=True), PLAIN)
    with pytest.raises(UserError, match="a folder"):
        adapters.check(file.parent, PLAIN)
    with pytest.raises(UserError, match="nowhere"):
        adapters.check(file.with_name("nowhere"), PLAIN)
    for data in (b"", b"GGUF" + bytes(100), b"<html>" * 9, b"version https://git-lfs" + bytes(40)):
        file.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(file))):
            adapters.check(file, PLAIN)


@pytest.mark.parity
def test_diffusers_applies_our_adapter(tmp_path):
    """load_lora_weights of diffusers at scale 1 gives our velocity (float32, outputs about 10)."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pytest.importorskip("peft")
    plain, _, base = weights.abstract(Flux, PLAIN)
    _, adapter, _ = weights.abstract(Flux, RANKED)
    base, adapter = tiny.filled(base), tiny.filled(adapter, 1)
    preset = replace(FLUX_FILL, flux=PLAIN)
    weights.save_pipeline(tmp_path, preset, {"flux": nnx.merge(plain, base)}, "float32")
    file = lorafiles.written(tmp_path, adapter)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    empty = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxFillPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
        **dict.fromkeys(empty),
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    (img, txt, vec), ids = lorafiles.inputs(PLAIN)
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
    tree = jax.tree.map(jnp.asarray, base)
    folding.fold(tree, jax.tree.map(jnp.asarray, adapter))
    here = lorafiles.velocity(nnx.merge(plain, tree))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)
