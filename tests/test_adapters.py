"""Adapter files: every naming in, ours out."""

import json
import re
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import lorafiles
import numpy as np
import pytest
from lorafiles import LORA, PLAIN, RANKED, K, Q, edited, renamed, same_trees
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import FluxConfig, UserError
from vcloze_jax.devices import make_mesh, parse_mesh, put
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import adapters, weights


def test_round_trip_is_bit_identical(adapter_tree, adapter_file):
    """Our adapter, written for PEFT and read again, is the same to the last bit and can be trained
    on; every fused A is there once for each of its parts."""
    again = adapters.load(adapter_file, PLAIN)
    same_trees(adapter_tree, again)
    assert adapters.fit(adapter_file, again, PLAIN) == RANKED
    there = load_file(adapter_file)
    stem = "transformer.single_transformer_blocks.1."
    for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        a = there[f"{stem}{part}.lora_A.weight"]
        np.testing.assert_array_equal(a.T, adapter_tree["single"]["linear1"]["lora_a"][1])


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


def test_swap_is_of_outputs_only(adapter_tree, adapter_file):
    """In the final modulation the halves of B and of its bias are swapped, A is as it is."""
    there, final = load_file(adapter_file), adapter_tree["final"]["mod"]
    stem = "transformer.norm_out.linear"
    np.testing.assert_array_equal(there[f"{stem}.lora_A.weight"].T, final["lora_a"])
    for key, name in ((".lora_B.weight", "lora_b"), (".lora_B.bias", "lora_bias")):
        shift, scale = np.split(np.asarray(final[name]), 2, -1)
        np.testing.assert_array_equal(there[stem + key].T, np.concatenate([scale, shift], -1))


def test_metadata_says_that_alpha_is_the_rank(adapter_file):
    """The header carries a LoraConfig in which alpha equals the rank of each module, clipped ones
    included, so that readers which know one alpha only are not misled."""
    with safe_open(adapter_file, "numpy") as f:
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


def test_alpha_of_the_header(adapter_tree, adapter_file):
    """Alphas of PEFT's header count as PEFT counts them: the first pattern that fits, else one for
    all; divided by the root of the rank where the header says so."""
    alpha = {"lora_alpha": 22, "alpha_pattern": {"^proj_out": 3, "out": 7}}
    for slora, last, others in ((False, 3 / 11, 2), (True, 3 / 11**0.5, 22 / 11**0.5)):
        edited(adapter_file, lambda d: d, **alpha, use_rslora=slora)
        got = adapters.load(adapter_file, PLAIN)
        for path, scale in (("final/linear", last), ("single/linear1", others)):
            block, name = path.split("/")
            exact = np.float64(adapter_tree[block][name]["lora_b"]) * scale
            np.testing.assert_allclose(got[block][name]["lora_b"], exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int64", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_of_any_type(adapter_tree, adapter_file, dtype, shape):
    """An alpha is a number, whatever the type and however many axes of length 1 it is written in;
    but true and false are none."""
    for good in (True, False):
        alpha = np.full(shape, 22, dtype) if good else np.full(shape, True)
        edited(adapter_file, lambda d, alpha=alpha: d | {f"{Q}.alpha": alpha})
        if good:
            b = adapters.load(adapter_file, PLAIN)["double"]["img"]["qkv"]["lora_b"][0]
            exact = np.float64(adapter_tree["double"]["img"]["qkv"]["lora_b"][0])
            exact[:, 0] *= 2
            np.testing.assert_array_equal(b.sum(0), exact.sum(0))
        else:
            with pytest.raises(UserError, match=f"{Q}.alpha is of type BOOL"):
                adapters.check(adapter_file, PLAIN)


@pytest.mark.parametrize("alpha", [11, 22, 3])
def test_a_difference_of_a_bias_is_added_whole(adapter_tree, tmp_path, alpha):
    """ComfyUI adds `diff_b` to the bias of the base, whatever alpha / r is; so do we. Where alpha
    is 0 it has no place, and is refused."""
    plain = renamed(lorafiles.written(tmp_path, adapter_tree, bias=False), "kohya")
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
def test_adapter_of_another_base(adapter_tree, tmp_path, to):
    """An adapter of FLUX.1-Fill (384 channels) on FLUX.1-dev (64) says just that, in each naming;
    so does one of a deeper and of a wider model."""
    file = lorafiles.written(tmp_path, adapter_tree, bias=False)
    file = file if to == "diffusers" else renamed(file, to)
    for config, words in (
        (replace(PLAIN, in_channels=64), "[11, 384], expected [11, 64] (64 input channels"),
        (replace(PLAIN, single_blocks=1), "is unknown"),
        (replace(PLAIN, width=32, axes_dim=(4, 4, 8)), "is [11, 16], expected [11, 32]"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            adapters.check(file, config)
