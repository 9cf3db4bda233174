"""Placements by the commands: train.py trains in one, and sample.py is told it by the adapter."""

import shutil
from dataclasses import replace

import pytest
import tiny
from runs import flags, make_home, metrics
from safetensors import safe_open
from safetensors.numpy import save_file

import sample
import train
from vcloze_jax.config import MINI, UserError
from vcloze_jax.inputs.papers import ANYREFILL, DEV, FRAMES, KONTEXT, PLACEMENTS
from vcloze_jax.pipeline import load_painter
from vcloze_jax.placement import FILL
from vcloze_jax.ports import export
from vcloze_jax.ports.diagnose import PortError
from vcloze_jax.ports.tables.namings import NAMINGS
from vcloze_jax.storage import adapters, places, weights

CLEAN = replace(tiny.TINY, flux=replace(tiny.TINY.flux, in_channels=64))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Grids, and weights of 64 channels."""
    return make_home(tmp_path_factory.mktemp("home"), CLEAN)


def adapter(folder, placement, config=CLEAN.flux):
    """A file of ours that was trained in a placement, or does not say which (None)."""
    ranked = replace(config, rank=2, placement=placement or FILL)
    graphdef, tree, _ = weights.abstract(weights.Flux, ranked)
    file = folder / f"{placement.name if placement else 'old'}.safetensors"
    note = placement and {"placement": placement.name}
    adapters.save(file, tiny.filled(tree), note=note)
    return file


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.get)
def test_an_adapter_says_its_placement(tmp_path, placement):
    """And comes back as it was, the modulations of frames included, on a base of its channels."""
    config = replace(CLEAN.flux, in_channels=placement.channels, placement=placement)
    file = adapter(tmp_path, placement, config)
    assert adapters.told_placement(file) == placement
    (tmp_path / "folder").mkdir()
    for name in ("pytorch_lora_weights.safetensors", "adapter.sft"):
        shutil.copy(file, tmp_path / "folder" / name)
    for named in ("folder", "folder/adapter.sft"):
        assert adapters.told_placement(tmp_path / named) == placement
    adapters.check(file, config)
    tree = adapters.load(file, config)
    _, wanted, _ = weights.abstract(weights.Flux, replace(config, rank=2))
    assert weights.shapes(tree) == weights.shapes(wanted)
    assert ("cond_mod" in tree["single"]) == placement.embeds


def refused(main, argv):
    with pytest.raises(UserError) as caught:
        main([str(arg) for arg in argv])
    return str(caught.value)


def test_what_does_not_fit_is_named(home, tmp_path):
    """A base of other channels, adapters of two placements, a placement that is not known, an
    adapter of another one to go on from, and frames without an adapter."""
    spec, weights_64 = (
        places.MINI_FOLDER.parents[1] / "examples/3_two_examples.json",
        home / "weights",
    )
    dev, frames = adapter(tmp_path, DEV), adapter(tmp_path, FRAMES)
    paint = ["--grid", spec, "--check", "--lora"]
    message = "384 input channels; placement dev needs a model of 64, FLUX.1-dev"
    assert message in refused(sample.main, [*paint, dev, "--weights", places.MINI_FOLDER])
    both = [*paint, dev, "--lora", frames, "--weights", weights_64]
    assert f"{dev} of dev, {frames} of frames" in refused(sample.main, both)
    odd = tmp_path / "odd.safetensors"
    save_file({}, odd, {"placement": "none of ours"})
    assert "none of fill, anyrefill, dev" in refused(sample.main, [*paint, odd])
    go_on = flags(home, tmp_path / "run", placement="kontext", lora=dev, rank=2)
    assert refused(train.main, go_on) == f"{dev}: of placement dev; add --placement dev"
    fresh = flags(home, tmp_path / "run", placement="frames", rank=0)
    assert "--placement frames: its conditions' modulations" in refused(train.main, fresh)
    whole = flags(home, tmp_path / "run", placement="dev", loss_region="grid")
    assert "--loss-region grid: with --placement dev" in refused(train.main, whole)
    shifted = flags(home, tmp_path / "run", placement="kontext") + ["--time-shift"]
    assert "--time-shift: with --placement kontext" in refused(train.main, shifted)
    assert "64 input channels; grids need a model of 384" in refused(
        train.main, flags(home, tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()


def test_adapters_of_others_say_nothing(tmp_path):
    """One without a placement goes with any: a style for FLUX.1-dev, say."""
    files = [adapter(tmp_path, KONTEXT), adapter(tmp_path, None)]
    assert adapters.agreed_placement(files) == KONTEXT
    assert adapters.agreed_placement(files[1:]) is None and adapters.agreed_placement([]) is None


def test_fill_is_a_placement_too(tmp_path):
    """Of a run in the default the header names no placement; it is none that another's may decide:
    mini's own adapter, and one of another run."""
    any_refill = adapter(tmp_path, ANYREFILL, tiny.TINY.flux)
    ours = tmp_path / "ours.safetensors"
    save_file({}, ours, {"step": "3", "weights": "last"})
    for fill in (ours, places.MINI_LORA):
        assert adapters.told_placement(fill) == FILL
        with pytest.raises(UserError, match="of fill, .* of anyrefill"):
            adapters.agreed_placement([fill, any_refill])


def test_a_copy_says_its_placement(tmp_path):
    """Converted, an adapter keeps what its header tells of it; a .pth, which has none, refuses."""
    file, copy = adapter(tmp_path, FRAMES), tmp_path / "copy.safetensors"
    export.convert_adapter(file, NAMINGS["diffusers"], copy)
    assert adapters.told_placement(copy) == FRAMES
    with pytest.raises(PortError, match="placement frames, which a .pth cannot say"):
        export.convert_adapter(file, NAMINGS["visualcloze"], tmp_path / "copy.pth")
    assert not (tmp_path / "copy.pth").exists()


def test_a_base_says_its_placement(tmp_path):
    """Weights that --rank 0 trained in one are painted with in it; mini's say nothing."""
    preset = replace(CLEAN, flux=replace(CLEAN.flux, placement=DEV))
    folder = tiny.weights_folder(tmp_path / "weights", preset=preset)
    assert weights.checked_grid_preset(folder).flux.placement == DEV
    assert places.named_preset(places.MINI_FOLDER) is MINI
    file = folder / "vcloze.json"
    file.write_text(file.read_text().replace("dev", "unknown"))
    with pytest.raises(UserError, match="must say"):
        places.named_preset(folder)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_has_a_base_that_is_shipped(tmp_path, monkeypatch, capsys, placement):
    """Who names no weights trains, and paints with an adapter that says its placement, also one of
    a bank, on the shipped base that reads what it makes of grids."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--placement", placement, "--check", "--out", "run"]) == 0
    base = places.shipped_weights(placement)
    assert f"weights: {base}: " in capsys.readouterr().out
    flux = weights.checked_grid_preset(base, PLACEMENTS[placement]).flux
    file = adapter(tmp_path, PLACEMENTS[placement], flux)
    for lora in (f"{file}", f"maps={file}"):
        assert load_painter(None, [lora], None).models.folder == base


def test_shipped_bases_share_the_autoencoder():
    """mini_clean has mini's files but card, its sheet and adapter, its autoencoder too; MMDiT,
    tokenizers and text encoders are its own, and it says the placement that it was trained in."""
    mini, clean = (
        {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
        for folder in places.MINIS
    )
    mini_alone = {"README.md", "evaluation.png", "lora.safetensors"}
    assert {f"{name}" for name in mini.keys() - clean.keys()} == mini_alone
    unlike = {name for name, file in clean.items() if file.read_bytes() != mini[name].read_bytes()}
    own = {"transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert {name.parts[0] for name in unlike} == own | {"vcloze.json"}
    assert places.named_preset(places.MINI_CLEAN).flux.placement == DEV


@pytest.mark.slow
@pytest.mark.parametrize("placement, mesh", [("dev", 1), ("frames", 2), ("klein", 2)])
def test_train_and_sample(home, tmp_path, placement, mesh):
    """A run in a placement, on one device or two, writes an adapter with which sample.py paints a
    held-out grid, told nothing."""
    out = tmp_path / "run"
    run = flags(home, out, placement=placement, mesh=mesh, steps=2, ema=0)
    assert train.main(run) == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]
    with safe_open(out / "lora.safetensors", "np") as file:
        assert file.metadata()["placement"] == placement
    learnt = ["--weights", home / "weights", "--lora", out / "lora.safetensors"]
    argv = ["--grid", out / "question.json", *learnt, "--steps", 2, "--out", tmp_path / "out"]
    sample.main([str(arg) for arg in argv])
    assert (tmp_path / "out/question_target0.png").exists()
