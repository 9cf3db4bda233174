"""Laws of train.py: what a run writes, and that it goes on to the bit, whatever happened to it.

One run serves most of them: tiny random models, 6 steps on 8 virtual devices, saved every 2.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file

import sample
import train
from vcloze_jax.config import PRESETS, UserError
from vcloze_jax.inputs.runfolder import Log
from vcloze_jax.storage import adapters, checkpoint, weights
from vcloze_jax.trainer import make_optimizer, make_step

ROOT = Path(__file__).parents[1]
SUBJECTS = "crab", "magnet", "skier"
VIEWS = ("edges", "fluent_3d")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """weights/, and grids.jsonl: three grids of two rows, their truth included."""
    home = tmp_path_factory.mktemp("home")
    tiny.weights_folder(home / "weights")
    folder = ROOT / "examples/pictures"
    rows = [[f"{folder}/{subject}_{view}.png" for view in VIEWS] for subject in SUBJECTS]
    grids = [{"image": [rows[i - 1], rows[i]], "task_prompt": "Draw."} for i in range(3)]
    (home / "grids.jsonl").write_text("".join(json.dumps(grid) + "\n" for grid in grids))
    return home


def flags(home, out, **changes):
    """The command of the run, with changes."""
    table = dict(weights=home / "weights", data=home / "grids.jsonl", resolution=32, mesh=8)
    table |= dict(rank=4, lr=0.05, batch=8, steps=6, save_every=2, preview_every=3, out=out)
    return [f"--{key.replace('_', '-')}={value}" for key, value in (table | changes).items()]


@pytest.fixture(scope="module")
def unbroken(home):
    """The folder of the run that nothing happened to."""
    assert train.main(flags(home, home / "unbroken")) == 0
    return home / "unbroken"


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(out, unbroken):
    """Metrics but seconds, the previews and the adapter are equal to the last bit."""
    timeless = [[line | {"seconds": 0} for line in metrics(folder)] for folder in (out, unbroken)]
    assert timeless[0] == timeless[1]
    for file in previews(unbroken):
        assert (out / "previews" / file.name).read_bytes() == file.read_bytes(), file.name
    # Not the file's bytes: safetensors writes the entries of its header in any order.
    ours, theirs = (load_file(folder / "lora.safetensors") for folder in (out, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def previews(out):
    return sorted((out / "previews").iterdir())


# --- what a run writes ---


def test_metrics(unbroken):
    """Every step has one line, in order, and the rate is that of the warm-up."""
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == {"step", "loss", "grad_norm", "lr", "seconds"} for line in lines)
    assert all(0 < line["loss"] and 0 < line["grad_norm"] for line in lines)
    assert all(0 < line["seconds"] for line in lines)
    warmup = PRESETS["mini"].recipe.warmup
    rates = [0.05 * n / (warmup + 1) for n in range(1, 7)]
    np.testing.assert_allclose([line["lr"] for line in lines], rates, rtol=1e-6)  # float32


def test_previews(unbroken):
    """Previews of step 0, of every third step and of the last show the same grids, ever other
    paintings of them, and beside each its truth."""
    files = previews(unbroken)
    assert [file.name for file in files] == ["000000.png", "000003.png", "000006.png"]
    first, _, last = (np.asarray(Image.open(file)) for file in files)
    assert first.shape == last.shape and (first != last).any()
    painted, truth = np.split(first, 2, axis=1)
    assert (painted != truth).any()
    assert np.array_equal(truth, np.split(last, 2, axis=1)[1])


def test_adapter(unbroken, home, tmp_path):
    """The run's adapter is the state that was saved last; sampling with it is another picture than
    without, and training goes on from it."""
    adapter = weights.flat(adapters.load(unbroken / "lora.safetensors", tiny.TINY.flux))
    config = adapters.fit(unbroken / "lora.safetensors", adapter, tiny.TINY.flux)
    assert config.rank == 4
    assert all(np.asarray(x).any() for x in adapter.values())
    assert paint(home, tmp_path / "a") != paint(home, tmp_path / "b", unbroken / "lora.safetensors")


def paint(home, out, lora=None, folder=None):
    """Bytes of the picture that sample.py paints of one blank cell."""
    out.mkdir()
    picture = f"{ROOT}/examples/pictures/crab_edges.png"
    spec = {"image": [[picture, None]], "resolution": 32, "num_inference_steps": 2}
    (out / "spec.json").write_text(json.dumps(spec))
    argv = ["--grid", f"{out}/spec.json", "--weights", f"{folder or home / 'weights'}"]
    sample.main([*argv, "--out", f"{out}/out", *(["--lora", f"{lora}"] if lora else [])])
    return (out / "out/spec.png").read_bytes()


def test_finished(unbroken, home, capsys):
    """The same command again says that the run is finished, and changes nothing."""
    before = {file: file.stat().st_mtime_ns for file in unbroken.rglob("*.*")}
    assert train.main(flags(home, unbroken)) == 0
    assert "finished at step 6" in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in unbroken.rglob("*.*")}
    changed = {file.name for file in before if before[file] != after[file]}
    assert before.keys() == after.keys() and changed <= {"config.json", "metrics.jsonl"}


# --- going on ---


def test_stopped_is_unbroken(unbroken, home, tmp_path, monkeypatch, capsys):
    """A run of 3 steps that is asked for 6, and is stopped by SIGTERM on the way, is the run of 6
    steps, to the bit. SIGTERM saves the step that was sent to the devices, and exits 143."""
    out, write, before = tmp_path / "run", Log.write, signal.getsignal(signal.SIGTERM)
    assert train.main(flags(home, out, steps=3, save_every=100)) == 0

    def terminate(log, record):
        write(log, record)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", terminate)
        assert train.main(flags(home, out, save_every=100)) == 143
    assert "stopped at step 5, saved" in capsys.readouterr().out
    assert checkpoint.latest(out / "checkpoints") == len(metrics(out)) == 5
    assert signal.getsignal(signal.SIGTERM) == before
    assert train.main(flags(home, out)) == 0
    assert_same_run(out, unbroken)


DIE = """
import os, signal
import train
from vcloze_jax.inputs.runfolder import Log

write = Log.write

def write_and_die(log, record):
    write(log, record)
    if record["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)

Log.write = write_and_die
train.cli.run(train.main)
"""


def test_killed_is_unbroken(unbroken, home, tmp_path):
    """A process that is killed at its fifth step has saved the fourth; the run that goes on from
    there in another process is the unbroken one, to the bit, without a torn line in its log."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", DIE, *flags(home, out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.latest(out / "checkpoints") == 4 and len(metrics(out)) == 5
    with (out / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 6, "lo')
    assert train.main(flags(home, out)) == 0
    assert_same_run(out, unbroken)


def test_other_mesh(unbroken, home, tmp_path):
    """A run goes on from the same state with the same batches on another mesh: sums are ordered
    otherwise, hence 1e-5."""
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    assert train.main(flags(home, tmp_path / "run", mesh=1, save_every=1)) == 0
    for key in ("loss", "grad_norm"):
        here, there = ([line[key] for line in metrics(out)] for out in (tmp_path / "run", unbroken))
        assert here[:4] == there[:4]
        np.testing.assert_allclose(here[4:], there[4:], rtol=1e-5)


def test_not_finite(unbroken, home, tmp_path):
    """A loss that is not finite ends the run at that step, before its update, its metrics and any
    save; once the cause is gone, the same command goes on to the end of the unbroken run."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoints/6")
    (out / "lora.safetensors").unlink()
    with tiny.overflowing(home / "weights"):
        with pytest.raises(FloatingPointError, match="step 5: loss (nan|inf)"):
            train.main(flags(home, out))
        assert len(metrics(out)) == checkpoint.latest(out / "checkpoints") == 4
        with pytest.raises(FloatingPointError, match="picture is not finite"):
            train.main(flags(home, tmp_path / "new"))
    assert train.main(flags(home, out)) == 0
    assert_same_run(out, unbroken)


def test_preset_of_the_weights(home, tmp_path):
    """Weights that name another preset than the command are refused: its recipe is not theirs."""
    with pytest.raises(UserError, match="its preset is mini; add --preset mini"):
        train.main(flags(home, tmp_path / "run", preset="flux-fill"))


def test_failed_start_is_no_run(unbroken, home, tmp_path):
    """A mistake that is found late leaves nothing behind that would refuse the right command."""
    adapter = unbroken / "lora.safetensors"
    with pytest.raises(UserError, match="its rank is 4, not 8; set --rank"):
        train.main(flags(home, tmp_path / "run", lora=adapter, rank=8))
    assert not (tmp_path / "run").exists()
    assert train.main(flags(home, tmp_path / "run", lora=adapter, steps=1)) == 0
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(unbroken)[0]["loss"]


# --- every weight ---


def test_rank_0(home, tmp_path):
    """With rank 0 the MMDiT itself is trained, and RUN/weights is a folder that sample.py takes."""
    change = dict(rank=0, mesh=1, batch=2, steps=1)
    assert train.main(flags(home, tmp_path / "run", **change)) == 0
    before, after = home / "weights", tmp_path / "run/weights"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert changed(before / part, after / part) == (part == "transformer"), part
    assert paint(home, tmp_path / "a", folder=before) != paint(home, tmp_path / "b", folder=after)


@pytest.mark.slow
def test_from_scratch(home, tmp_path, monkeypatch):
    """From scratch the MMDiT and both text encoders are random and trained; the VAE is given."""
    monkeypatch.setitem(PRESETS, "mini", tiny.TINY)
    change = dict(rank=0, mesh=1, batch=2, steps=1)
    assert train.main(flags(home, tmp_path / "run", **change) + ["--from-scratch"]) == 0
    after = tmp_path / "run/weights"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert changed(home / "weights" / part, after / part) == (part != "vae"), part
    paint(home, tmp_path / "a", folder=after)


def changed(before, after):
    """Whether two folders of a model hold other arrays; bfloat16, as which they are written."""
    (old,), (new,) = (list(folder.glob("*.safetensors")) for folder in (before, after))
    old, new = weights.engine.Source(old), weights.engine.Source(new)
    assert old.header.keys() == new.header.keys()
    return any((old.read(key).astype("bfloat16") != new.read(key)).any() for key in old.header)


# --- one step ---


def parts():
    """A step of a toy model, w x = y: its two functions, its state, and one batch."""

    def loss(w, frozen, batch, key):
        return jnp.square(batch @ w["w"] - frozen).mean() + 0 * jax.random.uniform(key)

    w = {"w": jnp.arange(3.0)}
    tx = make_optimizer(lambda n: 0.1, clip=1.0)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, (w, tx.init(w)))
    batch = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    return *make_step(tx, loss, places), (w, tx.init(w)), batch


def stepped(batches, frozen=1.0):
    """State, loss and norm after one step of some micro-batches."""
    accumulate, update, state, _ = parts()
    grads, losses = jax.tree.map(jnp.zeros_like, state[0]), []
    for batch in batches:
        loss, grads = accumulate(state[0], frozen, grads, batch, jax.random.key(0))
        losses.append(loss)
    *state, grads, loss, norm = update(*state, grads, losses)
    assert not any(x.any() for x in jax.tree.leaves(grads))
    return state, loss, norm


def test_micro_batches_are_one_batch():
    """A step over two halves is the step over the whole; over one half twice, that of the half."""
    batch = parts()[-1]
    for many, one in (([batch[:2], batch[2:]], [batch]), ([batch, batch], [batch])):
        for x, y in zip(*map(jax.tree.leaves, (stepped(many), stepped(one))), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)  # sums in another order


@pytest.mark.parametrize("target", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(target):
    """Neither weights nor moments nor the count move, be it the loss or but the gradient."""
    before = parts()[2]
    after, loss, norm = stepped([parts()[-1]], frozen=target)
    assert not np.isfinite(loss + norm)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, tuple(after)))
