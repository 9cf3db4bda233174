"""Laws of train.py: what a run writes, and that it goes on to the bit, whatever happened to it.

One run serves most of them: tiny random models, 6 steps on 2 virtual devices, saved every 2.
"""

import io
import json
import shutil
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import (
    assert_same_run,
    flags,
    make_home,
    metrics,
    paint,
    previews,
    run_and_act,
)
from safetensors import safe_open
from safetensors.numpy import load_file

import sample
import train
from vcloze_jax import plan
from vcloze_jax.config import PRESETS, UserError
from vcloze_jax.inputs.signals import SIGNALS
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.ports import __main__ as ports
from vcloze_jax.storage import adapters, checkpoint, weights


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The weights and the grids of the run."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def unbroken(home):
    """The folder of the run that nothing happened to; what it said is beside what it wrote."""
    jax.clear_caches()  # of the programs of other tests, so that the run needs its own
    with redirect_stdout(io.StringIO()) as said:
        assert train.main(flags(home, home / "unbroken", profile=1)) == 0
    (home / "unbroken/said").write_text(said.getvalue())
    return home / "unbroken"


@pytest.fixture(scope="module")
def plain(unbroken, home):
    """The folder of a run of one step, without an average, that begins with that one's adapter."""
    run = flags(home, home / "plain", lora=unbroken / "lora.safetensors", steps=1, ema=0)
    assert train.main(run) == 0
    return home / "plain"


# --- what a run writes ---


def test_metrics(unbroken):
    """Every step has one line, in order, and the rate is that of the warm-up. Its loss is that of
    its region, and the mean of its parts by time, examples and kind, each weighed by its grids."""
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0 < line["loss"] and 0 < line["grad_norm"] for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_by_region"]["target"])
        assert set(line["loss_by_time"]) <= set(map(str, range(10)))
        assert line["loss_by_examples"] == {"1": pytest.approx(line["loss"])}
        assert line["loss_by_kind"] == {"": pytest.approx(line["loss"])}
        squares = sum(norm**2 for norm in line["grad_norm_by_block"].values())
        assert squares**0.5 == pytest.approx(line["grad_norm"])
    assert all(0 < line["seconds"] for line in lines)
    warmup = PRESETS["mini"].recipe.warmup
    rates = [0.05 * n / (warmup + 1) for n in range(1, 7)]
    np.testing.assert_allclose([line["lr"] for line in lines], rates, rtol=1e-6)  # float32


def test_previews(unbroken):
    """Previews of step 0, the first, every third step and the last show the same grids, ever other
    paintings of them, between what the base paints and the truth."""
    files = previews(unbroken)
    assert [file.name for file in files] == ["000000.png", "000001.png", "000003.png", "000006.png"]
    first, *_, last = (np.asarray(Image.open(file)) for file in files)
    assert first.shape == last.shape and (first != last).any()
    one = slice(14, None)  # of three grids one is held out; without its labels
    base, adapter, truth = (part[one] for part in np.split(first, 3, axis=1))
    assert np.abs(base.astype(int) - adapter).max() <= 1 and (adapter != truth).any()
    again, later, same = (part[one] for part in np.split(last, 3, axis=1))
    assert np.array_equal(base, again) and np.array_equal(truth, same) and (later != again).any()


def test_question(home, unbroken):
    """A held-out grid lies there as a spec: what it paints is what the last preview shows (a
    folded adapter rounds otherwise), of its given cells alone."""
    (asked,) = read_specs([unbroken / "question.json"], tiny.TINY)
    files = sorted(file.name for file in (unbroken / "question").iterdir())
    assert files == ["0_0.png", "0_1.png", "1_0.png"] and asked.grid.targets == [1]
    spec, adapter = f"{unbroken}/question.json", f"{unbroken}/lora.safetensors"
    argv = ["--grid", spec, "--weights", f"{home}/weights", "--lora", adapter]
    sample.main([*argv, "--out", f"{home}/painted"])
    painted = np.asarray(Image.open(home / "painted/question.png")).astype(int)
    _, after, _ = np.split(np.asarray(Image.open(previews(unbroken)[-1])), 3, axis=1)
    assert np.abs(painted - after[14:]).max() <= 2


def test_validation(unbroken):
    """Wherever it paints, the run measures itself on the same held-out grids; the adapter begins as
    nothing and does not stay so."""
    lines = [json.loads(line) for line in (unbroken / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 3, 6]
    assert lines[0]["adapter_effect"] == 0 < lines[-1]["adapter_effect"]
    assert lines[0]["loss"] != lines[-1]["loss"]
    assert (unbroken / "losses.png").is_file()


def test_nothing_is_compiled_later(unbroken):
    """All programs of a run are there when its first step is done, those of previews and saves too;
    it says so in the end."""
    assert "\nprograms compiled after step 1: none\n" in (unbroken / "said").read_text()
    assert (unbroken / "profile").exists()


def test_speed(unbroken):
    """TFLOP/s are the MMDiT's gradient of eight grids; of a CPU no peak is known."""
    preset = replace(tiny.TINY, flux=replace(tiny.TINY.flux, rank=4))
    needed, done = plan.gradient_flops(preset, 2 * 2 * (32 // 16) ** 2)
    assert needed == done > 2 * plan.flux_flops(preset, 16)
    for line in metrics(unbroken):
        speed = 8 * done / line["seconds"] / 1e12
        rounded = 5e-5 / line["seconds"]  # of seconds, told to a tenth of a millisecond
        assert line["tflops"] == pytest.approx(speed, rel=0.01 + rounded) and "mfu" not in line


def test_adapter(unbroken, home, tmp_path):
    """The run's adapter is the state that was saved last; sampling with it is another picture than
    without, and training goes on from it."""
    adapter = weights.flat(adapters.load(unbroken / "lora.safetensors", tiny.TINY.flux))
    config = adapters.fit(unbroken / "lora.safetensors", adapter, tiny.TINY.flux)
    assert config.rank == 4
    assert all(np.asarray(x).any() for x in adapter.values())
    assert paint(home, tmp_path / "a") != paint(home, tmp_path / "b", unbroken / "lora.safetensors")


def test_finished(unbroken, home, capsys):
    """The same command again says that the run is finished, and changes nothing."""
    before = {file: file.stat().st_mtime_ns for file in unbroken.rglob("*")}
    assert train.main(flags(home, unbroken, lr=0.1)) == 0
    assert "finished at step 6" in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in unbroken.rglob("*")}
    changed = {file.name for file in before if before[file] != after[file]}
    assert before.keys() == after.keys() and changed <= {".lock"}


# --- going on ---


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS[1:])]
)
def test_stopped_is_unbroken(unbroken, home, tmp_path, capsys, number):
    """A run that is stopped by a signal on the way and goes on is the unbroken one, to the bit. The
    signal says what it does, saves the steps that were sent, and exits with 128 and its number. A
    torn line in the log is gone; what goes on, too, compiles nothing after its first step."""
    out = tmp_path / "run"
    done = run_and_act(home, out, 4, number, save_every=100)
    assert done.returncode == 128 + number, done.stderr
    assert "stopping: the running micro-batch is the last; saving" in done.stderr
    assert "Traceback" not in done.stderr and "saved; the same command resumes" in done.stdout
    steps = len(metrics(out))
    assert checkpoint.latest(out / "checkpoints") == steps and 4 <= steps < 6
    with (out / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 6, "lo')
    jax.clear_caches()  # of the unbroken run's programs
    assert train.main(flags(home, out)) == 0
    assert f"\nprograms compiled after step {steps + 1}: none\n" in capsys.readouterr().out
    assert_same_run(out, unbroken)


@pytest.mark.slow
def test_killed_is_unbroken(unbroken, home, tmp_path):
    """A process that is killed at its fifth step has saved the fourth; the run that goes on from
    there in another process is the unbroken one, to the bit."""
    out = tmp_path / "run"
    done = run_and_act(home, out, 5, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.latest(out / "checkpoints") == 4 and len(metrics(out)) == 5
    assert train.main(flags(home, out)) == 0
    assert_same_run(out, unbroken)


def test_adapter_while_it_trains(unbroken, plain):
    """What is saved beside a checkpoint is its adapter; of a run with an average, the average, and
    its header says so."""
    files = [folder / "lora.safetensors" for folder in (unbroken, plain)]
    notes = [safe_open(file, "numpy").metadata() for file in files]
    assert [(n["step"], n["weights"]) for n in notes] == [("6", "average 0.9"), ("1", "last")]
    step = unbroken / "checkpoints/6"
    last, average = (checkpoint.load_group(step, f"{x}/flux/") for x in ("trainable", "average"))
    assert any(np.abs(last[path]).max() > np.abs(average[path]).max() > 0 for path in last)


def test_adapter_of_a_checkpoint(unbroken, plain, tmp_path, capsys):
    """`python -m ports lora` writes the adapter of any step that is still there, its average where
    there is one: the file that the run wrote then, to the bit but for the header's note."""
    written = {}
    for step, folder, kind in (
        (4, unbroken, "average"),
        (6, unbroken, "average"),
        (1, plain, "last"),
    ):
        file = tmp_path / f"{step}.safetensors"
        argv = ["lora", str(folder / f"checkpoints/{step}"), "--to", "diffusers", "--out"]
        assert ports.main([*argv, str(file)]) == 0, capsys.readouterr().err
        note = safe_open(file, "numpy").metadata()
        assert (note["step"], note["weights"]) == (str(step), kind)
        written[step] = load_file(file)
    assert file.read_bytes() == (plain / "lora.safetensors").read_bytes()
    last = load_file(unbroken / "lora.safetensors")
    assert written[4].keys() == written[6].keys() == last.keys()
    assert all(np.array_equal(written[6][key], last[key]) for key in last)
    assert not any(np.array_equal(written[4][key], last[key]) for key in last)


def test_other_data_and_weights(unbroken, home, tmp_path):
    """A run goes on from a folder that moved, and is refused by name where its grids or weights are
    not those that it was begun with, unless that is accepted."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    shutil.copytree(home / "weights", tmp_path / "moved")
    again = dict(weights=tmp_path / "moved", steps=7)
    lines = (home / "grids.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(UserError, match="data was .*other.jsonl.*--accept data"):
        train.main(flags(home, out, **again, data=tmp_path / "other.jsonl"))
    tiny.weights_folder(tmp_path / "retrained", seed=1)
    with pytest.raises(UserError, match="weights was .*--accept weights"):
        train.main(flags(home, out, weights=tmp_path / "retrained"))
    accepted = ["--accept", "data", "weights"]
    changed = flags(home, out, **again, data=tmp_path / "other.jsonl")
    assert train.main(changed + accepted) == 0
    assert len(metrics(out)) == 7


def test_a_refused_run_is_as_it_was(unbroken, home, tmp_path):
    """Of a run without an intact checkpoint no byte changes, whatever the command says; --check
    says the same, and both name the adapter that is left."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for step in (out / "checkpoints").iterdir():
        (step / "digests").write_text("")
    before = read_files(tmp_path)
    for more in ([], ["--check"]):
        with pytest.raises(UserError, match="no intact checkpoint.*--lora .*run/lora.safetensors"):
            train.main(flags(home, out, steps=9, save_every=1) + more)
        assert read_files(tmp_path) == before


def test_check_refuses_what_training_would(home, plain, tmp_path, monkeypatch):
    """Tokenizers that are missing, and an adapter of another rank; where all is well, the folder
    that one stands in is a run's as any other."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train.main([*flags(home, "."), "--check"]) == 0
    assert (tmp_path / "here-check.png").is_file() and not any(Path(".").iterdir())
    with pytest.raises(UserError, match="its rank is 4, not 2; set --rank"):
        train.main([*flags(home, "run", lora=plain / "lora.safetensors", rank=2), "--check"])
    shutil.copytree(home / "weights", tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights/tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2"):
        train.main([*flags(home, "run", weights=tmp_path / "weights"), "--check"])


def read_files(folder):
    """{path: content} of all files but locks."""
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_mesh_and_micro_batch_are_no_part_of_the_run(unbroken, home, tmp_path):
    """A run goes on from the same state with the same grids and noise on another mesh and with
    other micro-batches: sums are ordered otherwise, hence 1e-5."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoints/6")
    assert train.main(flags(home, out, mesh=1, micro_batch=4, save_every=1)) == 0
    for key in ("loss", "grad_norm"):
        here, there = ([line[key] for line in metrics(o)] for o in (out, unbroken))
        assert here[:4] == there[:4]
        np.testing.assert_allclose(here[4:], there[4:], rtol=1e-5)


def test_not_finite(unbroken, home, tmp_path):
    """A loss that is not finite ends the run at that step, before its update and its metrics; the
    state before it is saved, and once the cause is gone, the same command goes on to the end of the
    unbroken run."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoints/6")
    (out / "lora.safetensors").unlink()
    accept = ["--accept", "weights"]
    with tiny.overflowing(home / "weights"):
        with pytest.raises(FloatingPointError, match="step 5: loss (nan|inf)"):
            train.main(flags(home, out) + accept)
        assert len(metrics(out)) == checkpoint.latest(out / "checkpoints") == 4
    assert train.main(flags(home, out) + accept) == 0
    assert_same_run(out, unbroken)


def test_failed_start_is_no_run(unbroken, plain, home, tmp_path, monkeypatch):
    """A mistake that is found late leaves nothing behind that would refuse the right command."""
    adapter = unbroken / "lora.safetensors"
    with pytest.raises(UserError, match="its rank is 4, not 8; set --rank"):
        train.main(flags(home, tmp_path / "run", lora=adapter, rank=8))
    assert not (tmp_path / "run").exists()
    assert metrics(plain)[0]["loss"] < metrics(unbroken)[0]["loss"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    for rank in (8, 4):
        with pytest.raises(UserError, match="free some space"):
            train.main(flags(home, tmp_path / "run", rank=rank))


def test_preset_of_the_weights(home, tmp_path):
    """Weights that name another preset than the command are refused: its recipe is not theirs."""
    with pytest.raises(UserError, match="its preset is mini; add --preset mini"):
        train.main(flags(home, tmp_path / "run", preset="flux-fill"))
