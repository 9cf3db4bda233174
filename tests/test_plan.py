"""Laws of --plan: its counts are those of the programs that run, and reading it loads nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

import sample
import train
from vcloze_jax import plan
from vcloze_jax.conditioning import Context
from vcloze_jax.config import FLUX_FILL, MINI, FluxConfig
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.painter import euler_step
from vcloze_jax.sharding import make_mesh, parse_mesh
from vcloze_jax.storage import places, weights

TERA = 1e12


@pytest.mark.parametrize(
    "image, linear, attention", [(4096, 59.52, 14.87), (5184, 73.57, 22.72), (1152, 21.5, 1.94)]
)
def test_flops_of_flux(image, linear, attention):
    """At full size: 59.52 TFLOP of linears at 4,608 tokens is what diffusers' own benchmark prints;
    the others by the same formula, to the digits given."""
    found = plan.flux_flops(FLUX_FILL.flux, image, 512)
    np.testing.assert_allclose(found, [linear * TERA, attention * TERA], rtol=5e-3)


def test_flops_of_the_others():
    """torch's counter gives 1.9 and 4.3 TFLOP for a row of 384 x 1152, 4.8 for the text encoders;
    an adapter of rank 256 adds 7.8 % to a forward at 5,696 tokens."""
    vae = [plan.vae_flops(FLUX_FILL.vae, kind, 384, 1152) for kind in ("encode", "decode")]
    np.testing.assert_allclose(vae, [1.9 * TERA, 4.3 * TERA], rtol=0.02)
    assert plan.text_flops(FLUX_FILL) == pytest.approx(4.8 * TERA, rel=0.02)
    adapted = replace(FLUX_FILL, flux=replace(FLUX_FILL.flux, rank=256))
    branch = 2 * plan.kernels(plan.shapes_of(adapted, "flux")[0], 5184, 512)
    assert branch / sum(plan.flux_flops(FLUX_FILL.flux, 5184, 512)) == pytest.approx(
        0.078, rel=0.01
    )


def test_bytes_of_weights():
    """Weights on a device are what its shards hold, to the byte: all of them on one device, on
    eight an eighth of what the table splits."""
    _, _, base = weights.abstract(Flux, tiny.TINY.flux)
    for text in ("1", "8", "fsdp=2,tensor=4"):
        mesh = make_mesh(parse_mesh(text))
        arrays = jax.device_put(
            jax.tree.map(lambda x: np.zeros(x.shape, "bfloat16"), base),
            plan.shardings(base, mesh, "flux/"),
        )
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))
        assert plan.on_device(base, mesh, "flux/", "bfloat16") == held
    count = sum(x.size for x in jax.tree.leaves(weights.abstract(Flux, FLUX_FILL.flux)[2]))
    assert count == 11_902_391_360


def test_bytes_of_a_step():
    """XLA's own figure for the temporaries of an Euler step is between a third of the estimate and
    all of it: it is an upper bound that a different fusion must not break, and no wild one."""
    c = FluxConfig(64, 64, 64, 1, 4, 1, 1, 32, 16, (16, 16, 32), remat=False)
    c = replace(c, in_channels=384)
    tokens, text = 448, 64
    flux = nnx.eval_shape(lambda: Flux(c, rngs=nnx.Rngs(0)))

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    vector, lengths = like(1), like(1, dtype=jnp.int32)
    mod = jax.eval_shape(lambda m, t, p: m.modulation(t, t, p), flux, vector, like(1, 16))
    pe = (like(1, text + tokens, 1, 32),) * 2
    context = Context(like(1, tokens, 320), like(1, text, 32), like(1, 16), vector, pe, lengths)
    x = like(1, tokens, 64)
    step = jax.jit(euler_step).lower(flux, x, mod, context, vector, vector)
    found = step.compile().memory_analysis().temp_size_in_bytes
    assert 1 / 3 < found / plan.activations(c, 1, text + tokens, 4) <= 1


def test_remat_keeps_less():
    """At the size of performance figures known from XLA's TPU compiler, 5,696 tokens in bfloat16:
    102 GiB without remat and 4.0 GiB with it, to a tenth."""
    for remat, known in ((False, 102), (True, 4.0)):
        config = replace(FLUX_FILL.flux, remat=remat)
        found = plan.activations(config, 1, 5696, 2, saved=True) / 2**30
        assert found == pytest.approx(known, rel=0.1)


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (12_345_678, "12.3 MB")],
)
def test_units(count, text):
    """Counts are said in powers of a thousand, with three digits."""
    assert plan.si(count, "B") == text


def test_verdict():
    """What does not fit is said with the part that weighs most and what to change."""
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100})
    mesh = SimpleNamespace(devices=np.array([device]))
    stages = {"reading": {"t5": 90}, "painting": {"flux": 30, "activations": 50}}
    assert plan.verdict(stages, mesh)[-1] == "it fits into 100 B"
    stages["painting"]["activations"] = 80
    assert "painting: 110 B (flux 30 B, activations 80 B)" in plan.verdict(stages, mesh)[1]
    assert plan.verdict(stages, mesh)[-1].startswith("it does not fit into 100 B: try a larger --m")


@pytest.fixture
def nothing_loads(monkeypatch):
    """No tensor of a weights folder may be read."""
    monkeypatch.setattr(weights, "load", None)


def test_sample(tmp_path, capsys, nothing_loads):
    """sample.py --plan says tokens and bucket of every grid, and bytes by part; it paints none."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [["a.png", "a.png"], ["a.png", None]]
    spec = {"image": rows, "upsampling": {"width": 128, "height": 64, "num_inference_steps": 10}}
    (tmp_path / "fox.json").write_text(json.dumps(spec))
    sample.main(["--grid", f"{tmp_path}/fox.json", "--out", f"{tmp_path}/out", "--plan"])
    _, *lines = capsys.readouterr().out.splitlines()  # behind what the weights are
    assert lines[0].startswith("fox: 64 image + 96 text tokens, bucket 64, 30 steps of ")
    assert lines[1].startswith("fox_target0: 32 image + 96 text tokens, bucket 32, 4 steps of ")
    assert [line.split()[0] for line in lines[3:6]] == ["reading:", "painting:", "decoding:"]
    assert not any((tmp_path / "out").iterdir())


def test_train(tmp_path, capsys, nothing_loads):
    """train.py --plan says what an adapter, its gradients and its moments take, in float32."""
    argv = ["--out", f"{tmp_path}/run", "--plan", "--data", "graphemoji:gray->fluent_flat"]
    train.main(argv)
    out = capsys.readouterr().out
    mini = weights.check(places.MINI)
    adapted = replace(mini, flux=replace(mini.flux, rank=MINI.recipe.rank))
    adapter = plan.shapes_of(adapted, "flux")[0]
    exact = 4 * sum(x.size for x in jax.tree.leaves(adapter))
    assert f"learnt {plan.si(exact, 'B')}, its gradients {plan.si(2 * exact, 'B')}" in out
    assert "largest grid: rows of " in out and not (tmp_path / "run").exists()
