"""Laws of --plan: its counts are those of the programs that run, and reading it loads nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import sample
import train
from vcloze_jax import plan
from vcloze_jax.config import FLUX_FILL, MINI, UserError
from vcloze_jax.data.sources import Shape
from vcloze_jax.devices import make_mesh, parse_mesh
from vcloze_jax.grid import Grid
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.vae import VAE
from vcloze_jax.storage import weights
from vcloze_jax.storage.places import MINI_FOLDER

TERA = 1e12


@pytest.mark.parametrize("image, tera", [(4096, 59.52 + 14.87), (5184, 96.29), (1152, 23.44)])
def test_flops_of_flux(image, tera):
    """At full size: 59.52 TFLOP of linears at 4,608 tokens is what diffusers' own benchmark prints,
    the rest by the same formula; what is neither product nor attention adds less than a half %."""
    assert plan.flux_flops(FLUX_FILL, image) == pytest.approx(tera * TERA, rel=5e-3)


def test_flops_of_the_others():
    """torch's counter gives 1.9 and 4.3 TFLOP for a row of 384 x 1152, 4.8 for the text encoders;
    an adapter of rank 256 adds 7.8 % to a forward at 5,696 tokens."""
    vae = [plan.flops(plan.lower_vae(FLUX_FILL, f, (384, 1152))) for f in (VAE.encode, VAE.decode)]
    np.testing.assert_allclose(vae, [1.9 * TERA, 4.3 * TERA], rtol=0.02)
    assert plan.text_flops(FLUX_FILL) == pytest.approx(4.8 * TERA, rel=0.02)
    plain, adapted = (plan.flux_flops(ranked(FLUX_FILL, rank), 5184) for rank in (0, 256))
    assert adapted / plain == pytest.approx(1.078, rel=1e-3)


def test_flops_of_gradients():
    """A gradient of all weights is two more forwards, to the per cent; that of an adapter needs
    the activations' half of it, and its own."""
    shallow = replace(FLUX_FILL.flux, double_blocks=1, single_blocks=2)
    preset = replace(FLUX_FILL, flux=shallow)
    forward = plan.flux_flops(preset, 1152)
    assert plan.flux_flops(preset, 1152, learning=True) == pytest.approx(3 * forward, rel=0.01)
    assert 2 * forward < plan.flux_flops(ranked(preset, 256), 1152, learning=True) < 3 * forward


def test_a_preset_that_is_here(capsys):
    """--preset mini is the model that ships: its folder says how much text it reads."""
    grid = ["--grid", "examples/1_no_example.json", "--plan"]
    sample.main(grid)
    of_folder = capsys.readouterr().out
    sample.main([*grid, "--preset", "mini"])
    assert capsys.readouterr().out == of_folder
    assert f"+ {weights.load_preset(MINI_FOLDER).t5.max_length} text tokens" in of_folder


@pytest.mark.parametrize("main, flags", [(sample.main, "--grid fox.json"), (train.main, "")])
def test_a_device_is_planned_for(main, flags):
    """--device where nothing is planned is the user's mistake."""
    with pytest.raises(UserError, match="--device: is of --plan; add that"):
        main([*flags.split(), "--device", "24GiB"])


def ranked(preset, rank):
    return replace(preset, flux=replace(preset.flux, rank=rank))


def test_bytes_of_weights():
    """Weights on a device are what its shards hold, to the byte: all of them on one device, on
    eight an eighth of what the table splits."""
    _, _, base = weights.abstract(Flux, tiny.TINY.flux)
    for text in ("1", "8", "fsdp=4,tensor=2"):
        mesh = make_mesh(parse_mesh(text))
        arrays = jax.device_put(
            jax.tree.map(lambda x: np.zeros(x.shape, "bfloat16"), base),
            plan.shardings(base, mesh, "flux/"),
        )
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))
        assert plan.weights_on_device(tiny.TINY, ["flux"], mesh, "bfloat16") == {"flux": held}
        blocks = [arrays[name] for name in ("double", "single")]
        mods = [blocks[0]["img"]["mod"], blocks[0]["txt"]["mod"], blocks[1]["mod"]]
        of = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
        matrices = [[x for x in jax.tree.leaves(tree) if x.ndim > 2] for tree in (blocks, mods)]
        left = held - of(matrices[0]) + of(matrices[1])
        assert plan.offloaded_on_device("flux", tiny.TINY, mesh, "bfloat16") == left
    count = sum(x.size for x in jax.tree.leaves(weights.abstract(Flux, FLUX_FILL.flux)[2]))
    assert count == 11_902_391_360


@pytest.mark.parametrize("learning", [False, True])
def test_activations_are_split(learning):
    """Eight grids on eight devices need on each what one grid needs on one."""
    one, eight = (make_mesh(parse_mesh(text)) for text in ("1", "data=8"))
    single = plan.flux_temporaries(tiny.TINY, 1, 64, one, "float32", learning=learning)
    split = plan.flux_temporaries(tiny.TINY, 8, 64, eight, "float32", learning=learning)
    assert split == pytest.approx(single, rel=0.1)


def test_activations_of_a_gradient():
    """A gradient keeps what a velocity lets go, block by block, and with remat a fraction of it."""
    mesh, deep = make_mesh(parse_mesh("1")), replace(tiny.TINY.flux, single_blocks=5)
    ways = [replace(tiny.TINY, flux=replace(deep, remat=x)) for x in ("none", "light", "full")]
    size = 4, 64, mesh, "float32"
    velocity = plan.flux_temporaries(ways[2], *size)
    none, light, full = (plan.flux_temporaries(x, *size, learning=True) for x in ways)
    assert velocity < full < light < none and full < none / 2


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
    assert plan.verdict(stages, mesh, None, {})[-1] == "it fits into 100 B"
    stages["painting"]["activations"] = 80
    assert (
        "painting: 110 B (flux 30 B, activations 80 B)" in plan.verdict(stages, mesh, None, {})[1]
    )
    assert plan.verdict(stages, mesh, None, {})[-1].startswith(
        "it does not fit into 100 B: try a larger --m"
    )
    for spared, remedy in ((1, f"--offload, or {plan.MESH}"), (0, plan.MESH)):
        told = plan.verdict({"a step": {"flux": 101}}, mesh, None, {"a step": spared})[-1]
        assert told.endswith(f"try {remedy}")


def count_numbers(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture
def nothing_loads(monkeypatch):
    """No tensor of a weights folder may be read."""
    monkeypatch.setattr(weights, "read_tree", None)


def test_sample(tmp_path, capsys, nothing_loads):
    """sample.py --plan says tokens and bucket of every grid, and bytes by part; it paints none."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [["a.png", "a.png"], ["a.png", None]]
    spec = {"image": rows, "upsampling": {"width": 128, "height": 64, "num_inference_steps": 10}}
    (tmp_path / "fox.json").write_text(json.dumps(spec))
    sample.main(["--grid", f"{tmp_path}/fox.json", "--out", f"{tmp_path}/out", "--plan"])
    _, _, *lines = capsys.readouterr().out.splitlines()  # behind what the weights and adapters are
    assert lines[0].startswith("fox: 64 image + 32 text tokens, bucket 64, 30 steps of ")
    assert lines[1].startswith("fox_target0: 32 image + 32 text tokens, bucket 32, 4 steps of ")
    assert [line.split()[0] for line in lines[3:6]] == ["reading:", "painting:", "decoding:"]
    assert not (tmp_path / "out").exists()
    argv = ["--grid", f"{tmp_path}/fox.json", "--out", f"{tmp_path}/out", "--plan"]
    for device, remedy in (("16MB", "--offload, or "), ("5MB", "")):  # where that is enough
        sample.main([*argv, "--device", device])
        assert capsys.readouterr().out.endswith(f"try {remedy}{plan.MESH}\n")
    sample.main([*argv, "--device", "16MB", "--offload"])
    assert capsys.readouterr().out.endswith("it fits into 16 MB\n")


def test_train(tmp_path, capsys, nothing_loads):
    """train.py --plan says what an adapter, its gradients and its moments take, in float32, and of
    text encoders whose blocks wait in host memory what is left of them."""
    folder = tiny.weights_folder(tmp_path / "weights")
    argv = ["--out", f"{tmp_path}/run", "--plan", "--weights", f"{folder}", "--data"]
    train.main([*argv, "graphemoji:gray->fluent_flat", "--offload"])
    out = capsys.readouterr().out
    flux = ranked(weights.checked_preset(folder), MINI.recipe.rank).flux
    _, adapter, _ = weights.abstract(Flux, flux)
    exact = 4 * count_numbers(adapter)
    assert f"learnt {plan.si(exact, 'B')}, its gradients {plan.si(2 * exact, 'B')}" in out
    assert "its average" not in out
    assert "largest grid: rows of " in out and not (tmp_path / "run").exists()
    for name in ("t5", "clip"):
        _, _, base = weights.abstract(weights.MODULES[name], getattr(tiny.TINY, name))
        matrices = [x for x in jax.tree.leaves(base["blocks"]) if x.ndim > 2]
        rest = 4 * (count_numbers(base) - count_numbers(matrices))
        assert f", {name} {plan.si(rest, 'B')}" in out
    train.main([*argv, "examples/pairs", "--cache", f"{tmp_path}/cache", "--ema", "0.9"])
    out = capsys.readouterr().out  # the encoders have gone; the autoencoder paints previews
    assert f"its average {plan.si(exact, 'B')}" in out
    assert ", vae " in out and ", t5 " not in out and ", clip " not in out
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_full_size():
    """Nothing of full size is made to plan for it; a mesh of eight splits all but the autoencoder
    and the activations of one grid."""
    mesh = make_mesh(parse_mesh("8"))
    up = SimpleNamespace(num_inference_steps=30, strength=0.4, tokens=4096, height=1024, width=1024)
    mask = np.zeros((3, 3, 1, 1), bool)
    mask[-1, 0] = True
    grid = Grid.from_cells(np.zeros((3, 3, 384, 384, 3), np.uint8), mask)
    spec = SimpleNamespace(name="fox", grid=grid, num_inference_steps=30, upsampling=up)
    text = plan.sampling(FLUX_FILL, [spec], mesh)
    assert "fox: 5184 image + 512 text tokens, bucket 5760, 30 steps of 109 TFLOP" in text
    assert "fox_target0: 4096 image + 512 text tokens, bucket 4608, 12 steps of 84.7 TFLOP" in text
    assert "(flux 5.96 GB, vae 335 MB, activations " in text
    data = SimpleNamespace(shapes=lambda: [Shape(3, 3, 384, 384)])
    preset = replace(FLUX_FILL, recipe=replace(FLUX_FILL.recipe, micro_batch=8))
    text = plan.training(preset, data, mesh)
    assert "largest grid: rows of 1152x384, 1152x384, 1152x384; 5184 image" in text
    assert ", t5 2.38 GB, clip 62.2 MB, learnt 631 MB, its gradients 1.26 GB, its moments " in text


def test_share_of_the_peak():
    """MFU is the gradient's FLOPs as a share of what all devices could do; what remat does again is
    in the TFLOP/s alone."""
    device = SimpleNamespace(device_kind="NVIDIA H200")
    mesh = SimpleNamespace(size=4, devices=np.array([device] * 4))
    preset = replace(tiny.TINY, flux=replace(tiny.TINY.flux, rank=4, remat="full"))
    needed, done = plan.gradient_flops(preset, 16)
    assert done == needed + plan.flux_flops(preset, 16)
    seconds = 2 * needed / (4 * 989e12 * 0.4)  # of two grids at 40 % of the peak
    speed = plan.training_speed(preset, [16, 16], seconds, mesh)
    assert speed["mfu"] == 0.4
    assert speed["tflops"] == pytest.approx(0.4 * 4 * 989 * done / needed, rel=1e-3)


def test_nothing_is_counted_that_is_not_done(monkeypatch):
    """Tracing takes half a second a program: the forward pass alone is counted, beside a gradient,
    only where remat runs it again."""
    counted = []
    monkeypatch.setattr(plan, "flux_flops", lambda *of, **how: counted.append(how) or 1)
    for remat, forward in (("none", []), ("light", []), ("full", [{}])):
        preset = replace(tiny.TINY, flux=replace(tiny.TINY.flux, remat=remat))
        assert plan.gradient_flops(preset, 16) == (1, 1 + len(forward))
        assert counted == [{"learning": True}, *forward]
        counted.clear()
