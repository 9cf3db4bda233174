"""The MMDiT: parity with diffusers (stored), and what may influence what."""

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny import FLUX, cast, flux, part, relative, stored

from vcloze_jax.config import FLUX_FILL
from vcloze_jax.devices import make_mesh
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.ops import attention, rope_table
from vcloze_jax.painter import modulate_steps
from vcloze_jax.storage import weights

TEXT = 3  # tokens
# How the model differs, and times and guidances where they are not those of the fixture.
CASES = {
    "fill": ({}, {}),
    "high": ({}, dict(t=np.float32([0.3, 0.9]), guidance=np.float32([30, 50]))),
    "dev": (dict(in_channels=64), {}),
    "unguided": (dict(guidance_embed=False), {}),
}


def inputs(samples=2, dtype=jnp.float32):
    """Of the fixture: img [B, 8, 384], txt [B, 3, 12] and pooled [B, 10] in dtype, t and guidance
    float32 [B], ids [8, 3]."""
    arrays = {k: x[:samples] for k, x in part("in/").items()}
    arrays["img"] = arrays["img"] / np.float32(32)
    cast = {k: jnp.asarray(arrays[k], dtype) for k in ("img", "txt", "pooled")}
    return arrays | cast | {"ids": stored()["grid/ids"]}


def table(ids):
    """Position tables of the text and of image tokens at ids [N, 3]."""
    return rope_table(np.concatenate([np.zeros((TEXT, 3)), ids])[None], FLUX.axes_dim, FLUX.theta)


def velocity(model, img, txt, pooled, t, guidance, pe, lengths=None):
    return model(img, txt, model.modulation(t, guidance, pooled), pe, lengths)


compiled = jax.jit(velocity)


def run(model, lengths=None, **inputs):
    return compiled(model, pe=table(inputs.pop("ids")), lengths=lengths, **inputs)


def close(ours, theirs, share=1e-5):
    """Equal within a share of the largest: float32 sums in another order."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=share * np.abs(theirs).max())


# --- parity ---


@pytest.mark.parametrize("name", CASES)
def test_velocity_is_that_of_diffusers(name):
    """A grid of two rows through FluxTransformer2DModel: with and without guidance, with 384 and
    64 channels. Relative 2e-5 is float32 in another order (gains of 1.5 amplify it); at guidance
    30 torch's exponential is one unit off in two frequencies, which 30 * 1000 makes 1e-3 radians.
    """
    changes, other = CASES[name]
    model, theirs = flux(**changes), stored()[f"out/{name}"]
    args = inputs(len(theirs)) | other
    args["img"] = args["img"][..., : model.config.in_channels]
    assert relative(run(model, **args), theirs) < (1e-3 if name == "high" else 2e-5)


def test_bfloat16_error_budget():
    """Against diffusers in float32, our bfloat16 is no worse than 1.5 times diffusers' own; that
    is over eight samples, as the errors of one are a matter of luck."""
    ours = run(cast(flux(), jnp.bfloat16), **inputs(8, jnp.bfloat16))
    assert ours.dtype == jnp.bfloat16
    assert relative(ours, stored()["out/fill"]) <= 1.5 * stored()["out/fill_bf16"]


@pytest.mark.parity
def test_the_fixture_is_what_diffusers_makes(tmp_path, monkeypatch):
    """The installed diffusers, run again, makes every array of the stored fixture, within what
    test_velocity_is_that_of_diffusers allows: torch's exponential and the order of its sums are
    another CPU's, too."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import fixtures_models

    monkeypatch.setattr(fixtures_models, "DATA", tmp_path)
    fixtures_models.main()
    again = load_file(tmp_path / "models.safetensors")
    assert again.keys() == stored().keys()
    for name, array in stored().items():
        if name.endswith("_bf16"):
            np.testing.assert_allclose(again[name], array, rtol=0.5, err_msg=name)
        else:
            budget = (1e-3 if "high" in name else 2e-5) * np.linalg.norm(array)
            assert np.linalg.norm(np.float64(again[name]) - array) <= budget, name


def test_adapter_count():
    """Rank 256 on every Dense of FLUX.1-Fill has 1,241,012,288 parameters, as the authors'."""
    _, adapter, _ = weights.abstract(Flux, replace(FLUX_FILL.flux, rank=256))
    assert sum(x.size for x in jax.tree.leaves(adapter)) == 1_241_012_288


# --- the same function, computed in other ways ---


def test_scan_equals_a_loop():
    """Scanned blocks compute what a Python loop over the slices of their weights does."""
    args = inputs()

    @jax.jit
    def loop(model, img, txt, pooled, t, guidance, pe):
        mod = model.modulation(t, guidance, pooled)
        img, txt = model.img_in(img), model.txt_in(txt)
        at = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731
        attend = lambda q, k, v: (attention(q, k, v), None)  # noqa: E731
        for i in range(FLUX.double_blocks):
            (img, txt), _ = at(model.double, i)(img, txt, mod.img[i], mod.txt[i], pe, attend)
        x = jnp.concatenate([txt, img], 1)
        for i in range(FLUX.single_blocks):
            x, _ = at(model.single, i)(x, mod.single[i], pe, attend)
        return model.final(x[:, TEXT:], mod.final)

    expected = run(flux(), **args)
    close(loop(flux(), pe=table(args.pop("ids")), **args), expected)


@cache
def influence(remat="none"):
    """Gradients of one image token's squared velocity, (0, 5), by every weight and every input."""
    model = nnx.merge(nnx.graphdef(flux(remat=remat)), nnx.state(flux()))
    args = inputs()
    pe = table(args.pop("ids"))

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(model, args):
        return jnp.square(velocity(model, pe=pe, **args)[0, 5]).sum()

    of_model, of_args = gradient(model, args)
    return weights.flat(nnx.to_pure_dict(nnx.state(of_model))), of_args


def test_no_layer_is_copied():
    """Weights by layer make the same velocity, to the bit, by a program that slices no kernel and
    stacks none: of stacked ones a CPU copies each layer's slice at every call."""
    args, config = inputs(), replace(FLUX, remat="none")
    args["pe"] = table(args.pop("ids"))
    tree = nnx.to_pure_dict(nnx.state(flux(remat="none")))
    outs, copies = [], []
    for weighed in (tree, weights.by_layer(tree, config, make_mesh())):
        model = weights.build(Flux, config, weighed)
        program = jax.jit(velocity).lower(model, **args).compile()
        outs.append(program(model, **args))
        lines = [
            s for s in program.as_text().splitlines() if re.search(r"fusion\(%model.*kernel", s)
        ]
        copies.append([s for s in lines if '/slice"' in s or '/stack"' in s])
    np.testing.assert_array_equal(*outs)
    assert copies[0] and not copies[1], copies


@pytest.mark.parametrize("remat", ["light", "full"])
def test_remat_changes_nothing(remat):
    """Recomputing in the backward pass gives the same gradients by weights and inputs."""
    for plain, again in zip(influence(), influence(remat), strict=True):
        for name, grad in plain.items():
            close(again[name], grad, 2e-5)


def test_modulations_of_all_steps_at_once():
    """modulate_steps gives, at step i, the modulation of time i alone (float32 sums)."""
    model, args = flux(), inputs()
    rest = args["guidance"], args["pooled"]
    times = np.float32([[1.0, 0.8, 0.3, 0.0], [1.0, 0.9, 0.5, 0.0]])
    all_steps = jax.jit(modulate_steps)(model, times, *rest)
    assert all_steps.single.shape == (3, FLUX.single_blocks, 2, 3 * FLUX.width)
    modulation = jax.jit(lambda model, *args: model.modulation(*args))
    for i in range(3):
        for some, alone in zip(all_steps, modulation(model, times[:, i], *rest), strict=True):
            close(some[i], alone)


# --- what may influence what ---


def test_padding_changes_nothing():
    """Image tokens padded on the right, with anything, give the unpadded velocity; samples of a
    batch may have different lengths."""
    args, whole = inputs(), run(flux(), **inputs())
    padded = jnp.concatenate([args["img"], jnp.full((2, 4, 384), 100.0)], 1)
    args |= dict(ids=np.concatenate([args["ids"], np.zeros((4, 3))]))
    lengths = np.array([TEXT + 8, TEXT + 6], np.int32)
    first, second = (
        run(flux(), lengths, **args | dict(img=padded.at[1, 6:].set(x))) for x in (-100, 7)
    )
    close(first[0, :8], whole[0])
    np.testing.assert_array_equal(first[1, :6], second[1, :6])
    assert np.abs(first[1, :6] - whole[1, :6]).max() > 1e-3


def test_samples_are_independent():
    """A batch of one is an element of a batch."""
    args = inputs()
    both, ids = run(flux(), **args), args.pop("ids")
    for i in range(2):
        close(run(flux(), ids=ids, **{k: x[i : i + 1] for k, x in args.items()})[0], both[i])


def test_everything_reaches_every_image_token():
    """One image token's velocity depends on every weight, on every token of image and text, on
    the pooled text, on time and guidance, of its own sample only."""
    by_weight, by_input = influence()
    assert all(np.any(grad) for grad in by_weight.values())
    for name, grad in by_input.items():
        per_token = np.abs(grad[0]).max(-1) if grad.ndim == 3 else np.abs(grad[0])
        assert np.all(per_token > 0) and not np.any(grad[1]), name


def test_every_axis_of_the_ids_matters():
    """Rows, y and x are told apart: moving one token along one axis changes other tokens."""
    args = inputs()
    before = run(flux(), **args)
    for axis in np.eye(3):
        ids = args["ids"].copy()
        ids[0] += axis
        assert np.abs(run(flux(), **args | dict(ids=ids)) - before)[:, 1:].max() > 1e-3


def test_tokens_are_a_set():
    """Positions enter by the ids alone: tokens in another order, with their ids, give the same
    velocities in that order."""
    args, order = inputs(), np.random.default_rng(0).permutation(8)
    expected = run(flux(), **args)[:, order]
    args |= dict(img=args["img"][:, order], ids=args["ids"][order])
    close(run(flux(), **args), expected)
