"""Placements: what each costs and computes, and who may influence whom.

The velocities are those of torch (scripts/fixtures_placements.py), stored and live.
"""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mmdit
import tiny
from flax import nnx
from placed import (
    DATA,
    NAME,
    NOISE,
    TORCH,
    base,
    grid,
    inputs,
    model,
    run,
    stored,
    velocity,
)
from safetensors.numpy import load_file
from test_attention import draw_kinds
from test_mmdit import TEXT, close

from vcloze_jax import kernels
from vcloze_jax.conditioning import segment_table
from vcloze_jax.config import FluxConfig
from vcloze_jax.inputs.papers import DEV, FRAMES, KLEIN, KONTEXT, PLACEMENTS
from vcloze_jax.model.mmdit import Flux, Modulation
from vcloze_jax.model.ops import attention, timestep_embedding
from vcloze_jax.placement import FILL, kind_of
from vcloze_jax.storage import weights

# --- what the default costs: nothing ---


def plain(flux, img, txt, pooled, t, guidance, pe, lengths):
    """FLUX without placements, as it was written before there were any."""
    vec = flux.time_in(timestep_embedding(t)) + flux.vector_in(pooled.astype(jnp.float32))
    vec = jax.nn.silu(vec + flux.guidance_in(timestep_embedding(guidance))).astype(pooled.dtype)
    each, double = jax.vmap(lambda layer: layer(vec)), flux.double
    mods = each(double.img.mod), each(double.txt.mod), each(flux.single.mod)
    mod = Modulation(*mods, flux.final.mod(vec))
    img, txt = flux.img_in(img), flux.txt_in(txt)
    T = txt.shape[1]
    attend = lambda q, k, v: (attention(q, k, v, lengths), None)  # noqa: E731
    double = lambda x, layer: layer[0](*x, *layer[1:], pe, attend)  # noqa: E731
    (img, txt), _ = jax.lax.scan(double, (img, txt), (flux.double, mod.img, mod.txt), unroll=True)
    single = lambda x, layer: layer[0](x, layer[1], pe, attend)  # noqa: E731
    x = jnp.concatenate([txt, img], 1)
    x, _ = jax.lax.scan(single, x, (flux.single, mod.single), unroll=True)
    return flux.final(x[:, T:], mod.final)


def operations(function, *args):
    """What a program is lowered to, by kind of operation, and its FLOPs."""
    lowered = jax.jit(function).lower(*args)
    words = (
        line.split("=")[1].split()[0] for line in lowered.as_text().splitlines() if "= " in line
    )
    return Counter(words), lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    "placement, lengths", [(FILL, None), (PLACEMENTS["anyrefill"], np.int32([11, 9]))]
)
def test_channels_beside_cost_nothing(placement, lengths):
    """Its program has the operations of one that knows no placement, as many FLOPs, and gives the
    same bits: no token has a vector of its own, and no attention a mask."""
    args = inputs(placement, 384)
    assert args.pop("segments") is None
    args = [args[name] for name in ("img", "txt", "pooled", "t", "guidance", "pe")]
    ours = lambda flux, *args: test_mmdit.velocity(flux, *args)  # noqa: E731
    flux = base(placement)
    assert operations(ours, flux, *args, lengths) == operations(plain, flux, *args, lengths)
    out, expected = (jax.jit(f)(flux, *args, lengths) for f in (ours, plain))
    np.testing.assert_array_equal(out, expected)


def test_one_vector_is_todays_model():
    """A placement of one vector that masks nothing is, to the last bit, the model without it."""
    args = inputs(KONTEXT)
    today = test_mmdit.compiled(base(NOISE), *list_args(args))
    np.testing.assert_array_equal(run(base(KONTEXT), **args), today)


def list_args(args):
    return [args[name] for name in ("img", "txt", "pooled", "t", "guidance", "pe")]


# --- what others compute ---


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_velocity_is_that_of_torch(placement):
    """diffusers' blocks, each token with its own norm, under a mask: of all tokens, clean ones too
    (2e-5 of float32 in another order, as in test_mmdit)."""
    ours = run(model(placement), **inputs(placement))
    assert tiny.relative(ours, stored()[f"{placement.name}/out"]) < 2e-5


@pytest.mark.parametrize("placement", TORCH, **NAME)
def test_padding_changes_nothing(placement):
    """Tokens padded on the right, with anything, give the unpadded velocity."""
    args, flux = inputs(placement), model(placement)
    expected = run(flux, **args)
    args["img"] = jnp.pad(args["img"], ((0, 0), (0, 4), (0, 0)), constant_values=100)
    args["pe"] = [np.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0))) for x in args["pe"]]
    args["segments"] = segment_table([grid()] * 2, placement, 12)
    out = run(flux, lengths=np.full(2, TEXT + 8, np.int32), **args)
    close(out[:, :8], expected)


def test_remat_changes_nothing():
    """Gradients of a placement with vectors, a mask and an embedding are the same."""

    @partial(jax.jit, static_argnums=0)
    def gradient(graphdef, state, args):
        loss = lambda state: jnp.square(velocity(nnx.merge(graphdef, state), **args)).mean()  # noqa: E731
        return jax.grad(loss)(state)

    args, flux = inputs(FRAMES), model(FRAMES)
    args.pop("ids")
    plain, light, full = (
        gradient(nnx.graphdef(base(FRAMES, remat=way)), nnx.state(flux), args)
        for way in ("none", "light", "full")
    )
    for again in (light, full):
        jax.tree.map(lambda a, b: close(b, a, 2e-5), plain, again)


def test_clean_tokens_are_told_time_0():
    """What modulates them is FLUX's own formula at t = 0, and that of the others at t: vector by
    vector, and as a whole where t is 0 (black-forest-labs/flux:src/flux/model.py)."""
    args = inputs(DEV)
    plain, dev = base(NOISE), base(DEV)
    rest = args["guidance"], args["pooled"]
    modulation = jax.jit(lambda flux, t: flux.modulation(t, *rest))
    ours = modulation(dev, args["t"])
    for k, (_, time) in enumerate(DEV.vectors):
        theirs = modulation(plain, args["t"] * (time == "t"))
        for name in ("img", "single", "final"):
            close(getattr(ours, name)[..., k, :], getattr(theirs, name))
    args["t"] = np.zeros(2, np.float32)
    close(run(dev, **args), test_mmdit.compiled(plain, *list_args(args)))


def test_a_third_branch_begins_as_a_copy():
    """Before a step the condition's branch and embedding change nothing, also with an adapter,
    whose B is zero; after one that moves only them, they do."""
    args = inputs(FRAMES)
    alone = replace(FRAMES, branch=FILL.branch, embeds=False)
    expected = run(base(alone), **args)
    close(run(base(FRAMES), **args), expected, 1e-6)
    graphdef, adapter, _ = weights.abstract(Flux, replace(base(FRAMES).config, rank=2))
    adapter = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, float(path[-1].key == "lora_a")), adapter
    )
    frozen = nnx.to_pure_dict(nnx.state(base(FRAMES)))
    close(run(nnx.merge(graphdef, adapter, frozen), **args), expected, 1e-6)
    for part in (adapter["cond_in"], adapter["single"]["cond_mod"]):
        zeros = part["lora_b"]
        part["lora_b"] = jax.random.normal(jax.random.key(0), zeros.shape)
        assert np.abs(run(nnx.merge(graphdef, adapter, frozen), **args) - expected).max() > 1e-3
        part["lora_b"] = zeros


# --- who may influence whom ---


DEAF = replace(DEV, attends=("11111",) * 4 + ("01111",))


@pytest.mark.parametrize("placement", [FRAMES, KLEIN, DEAF])
def test_a_forbidden_pair_has_no_gradient(placement):
    """In a block, what a token becomes has exactly no gradient by a token that it may not see, and
    some by every other."""
    args, flux = inputs(placement), base(placement)
    block = jax.tree.map(lambda x: x[0], flux.double)
    segments = np.concatenate([np.zeros(TEXT, int), grid().segments(placement)])
    kinds = kind_of(segments)
    sees = np.array(placement.sees)[:, kinds]
    mod = jnp.ones((1, 6 * flux.config.width))

    def attend(q, k, v):
        return attention(q, k, v, None, sees[None], kinds[None]), None

    def become(img, txt):
        (img, txt), _ = block(img, txt, mod, mod, args["pe"], attend)
        return jnp.concatenate([txt, img], 1)[0].sum(-1)

    rng = np.random.default_rng(0)
    streams = (rng.standard_normal((1, n, flux.config.width), np.float32) for n in (8, TEXT))
    of_img, of_txt = jax.jit(jax.jacobian(become, (0, 1)))(*streams)
    reach = jnp.abs(jnp.concatenate([of_txt, of_img], 2)[:, 0]).max(-1) > 0
    np.testing.assert_array_equal(reach, sees[kinds])


def test_who_is_not_seen_is_masked():
    """The formula under kinds and lengths is a softmax over who is seen."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 1, 8)).astype(np.float32)
    sees, kinds = draw_kinds(6, 6)
    lengths = np.int32([6, 4])
    scores = np.einsum("bqhk,bshk->bqs", q, k) / 8**0.5
    pairs = np.stack([table[kind] for table, kind in zip(sees, kinds, strict=True)])
    seen = pairs & (np.arange(6) < lengths[:, None, None])
    share = np.where(seen, np.exp(scores), 0)
    expected = np.einsum("bqs,bshk->bqhk", share / share.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attention(q, k, v, lengths, sees, kinds), expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [6, 7])
def test_cudnn_gets_the_mask(monkeypatch, tokens):
    """Its call says what the formula computes, of an odd number of tokens, too."""

    def formula(q, k, v, implementation, key_value_seq_lengths, mask):
        assert implementation == "cudnn" and (L := q.shape[1]) % 2 == 0
        each = jnp.arange(L)[None].repeat(2, 0)
        return attention(q, k, v, key_value_seq_lengths, mask[:, 0], each)

    monkeypatch.setattr(jax.nn, "dot_product_attention", formula)
    rng = np.random.default_rng(0)
    q, k, v = map(jnp.asarray, rng.standard_normal((3, 2, tokens, 1, 8)).astype(np.float32))
    seen = draw_kinds(tokens, tokens)
    expected = attention(q, k, v, None, *seen)
    np.testing.assert_allclose(kernels.cudnn(q, k, v, None, *seen), expected, atol=1e-6)


FUSED = {
    "tpu": {"splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals"},
    "gpu": {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"},
}


@pytest.mark.parametrize("platform", FUSED)
@pytest.mark.parametrize("placement", [FRAMES, KLEIN])
def test_accelerators_compute_masks_in_their_kernels(monkeypatch, platform, placement):
    """The program of a gradient, made here for another platform, calls its kernel under a mask,
    too, and holds no scores of all tokens by all."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    # No library of NVIDIA's is here to be asked for its version.
    library = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", library)
    sizes = dict(width=256, heads=2, double_blocks=1, single_blocks=1, text_width=64, vec_width=32)
    config = FluxConfig(**sizes, in_channels=64, placement=placement, remat="full")
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((2, *s), dtype)  # noqa: E731
    graphdef, _, frozen = weights.abstract(Flux, config)
    frozen = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), frozen)

    def loss(img, frozen, txt, pooled, t, angles, segments):
        flux = nnx.merge(graphdef, frozen)
        out = flux(img, txt, flux.modulation(t, t, pooled), (angles, angles), None, segments)
        return out.astype(jnp.float32).sum()

    t, angles = shape(dtype=jnp.float32), shape(200, 1, 64, dtype=jnp.float32)
    args = shape(190, 64), frozen, shape(10, 64), shape(32), t, angles
    traced = jax.jit(jax.grad(loss)).trace(*args, shape(190, dtype=jnp.int32))
    text = traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)).as_text()
    assert set(re.findall(r"splash_mha_\w+|__cudnn\$\w+", text)) == FUSED[platform]
    assert not re.search(r"2x2x(200x200|256x256)xf32", text)


# --- against diffusers itself ---


@pytest.mark.parity
def test_the_fixture_is_what_torch_makes(tmp_path, monkeypatch):
    """The installed diffusers makes the stored velocities again; and its blocks, put together as
    the fixture does it, are FluxTransformer2DModel where no token is told anything of its own."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import fixtures_models
    import fixtures_placements
    import torch

    (tmp_path / "models.safetensors").write_bytes((DATA / "models.safetensors").read_bytes())
    monkeypatch.setattr(fixtures_placements, "DATA", tmp_path)
    fixtures_placements.main()
    again = load_file(tmp_path / "placements.safetensors")
    assert again.keys() == stored().keys()
    for name, array in stored().items():
        difference = np.linalg.norm(np.float64(again[name]) - array)
        assert difference <= 2e-5 * np.linalg.norm(np.float64(array)), name
    flux, ids = (
        fixtures_models.flux(fixtures_models.flux(), in_channels=64),
        stored()["kontext/ids"],
    )
    with torch.no_grad():
        whole = fixtures_models.velocity(flux, tiny.stored(), ids)
    assert tiny.relative(again["kontext/out"], whole) < 1e-6  # by the same CPU
