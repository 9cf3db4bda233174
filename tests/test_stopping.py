"""Laws of ends: whenever a signal comes, or a save or what is read fails, a command ends rightly,
losing nothing."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from runs import (
    ROOT,
    assert_same_run,
    assert_same_training,
    flags,
    make_home,
    metrics,
)
from safetensors import safe_open

import train
from vcloze_jax.config import MINI, UserError
from vcloze_jax.inputs.signals import SIGNALS
from vcloze_jax.runwriter import RunWriter
from vcloze_jax.storage import checkpoint, models
from vcloze_jax.trainer import Trainer

# train.py that says when it comes to something, a name and the time, and waits before it saves.
TELLING = """
import sys, time
import train

pause = float(sys.argv.pop(1))

def tell(home, name):
    function = getattr(home, name)

    def told(*args, **options):
        print("at", name, time.monotonic(), flush=True)
        time.sleep(pause * (name == "save"))
        return function(*args, **options)

    setattr(home, name, told)

def learn(*args, learn=train.learn, **options):
    from vcloze_jax import runwriter
    from vcloze_jax.runwriter import RunWriter
    from vcloze_jax.trainer import Trainer

    for home, name in (runwriter, "compile_steps"), (Trainer, "send"), (Trainer, "encode"):
        tell(home, name)
    for name in ("preview", "save", "write"):
        tell(RunWriter, name)
    return learn(*args, **options)

train.learn = learn
train.cli.run(train.main)
"""
PHASES = "start", "compile_steps", "send", "preview", "save"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The weights and the grids of the run."""
    return make_home(tmp_path_factory.mktemp("home"))


class Command:
    """A process whose stderr goes into a file, and which is sent signals."""

    def __init__(self, argv, folder):
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.lines, self.timer = [], threading.Timer(300, self.process.kill)
        self.timer.start()

    def wait_for_handlers(self):
        """Until it has answers to signals of its own: what comes earlier is the interpreter's."""
        caught = 0
        while self.process.poll() is None and not caught >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.01)
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)

    def wait_for(self, name):
        """Until it comes to something, or ends."""
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(f"at {name} "):
                return

    def send(self, number):
        """Send a signal -> when that was."""
        self.process.send_signal(number)
        return time.monotonic()

    def end(self):
        """Its exit code and the seconds until then."""
        start = time.monotonic()
        with self.process:
            self.lines += self.process.stdout.readlines()
        self.timer.cancel()
        return self.process.returncode, time.monotonic() - start

    def times(self, name):
        """When it came to something."""
        lines = (line.split() for line in self.lines if line.startswith(f"at {name} "))
        return [float(when) for _, _, when in lines]


def assert_stopped(command, number, finished=()):
    """It ends soon, with 128 and the signal's number, and without a traceback."""
    code, seconds = command.end()
    errors = command.errors.read_text()
    assert code in (128 + number, *finished), errors
    assert "Traceback" not in errors and "Fatal" not in errors, errors
    assert seconds < 20


def train_and_tell(home, out, folder, pause=0, **changes):
    argv = [sys.executable, "-c", TELLING, str(pause), *flags(home, out, **changes)]
    return Command(argv, folder)


def test_stopped_while_it_compiles(home, tmp_path):
    """Before the first step there is nothing to save: nothing is waited for."""
    command = train_and_tell(home, tmp_path / "run", tmp_path)
    command.wait_for("compile_steps")
    command.send(signal.SIGHUP)
    assert_stopped(command, signal.SIGHUP)
    assert not command.times("send") and not command.times("save")
    assert checkpoint.latest(tmp_path / "run/checkpoints") is None


def test_second_interrupt(home, tmp_path):
    """A second Ctrl-C does not wait for what the first one asked for: the process is gone, its run
    as it was saved last."""
    command = train_and_tell(home, tmp_path / "run", tmp_path, pause=3, save_every=1)
    for _ in range(2):  # the first is in the background while the second waits
        command.wait_for("save")
    while command.process.poll() is None and not checkpoint.latest(tmp_path / "run/checkpoints"):
        time.sleep(0.001)
    command.send(signal.SIGINT)
    while "stopping" not in command.errors.read_text():
        time.sleep(0.001)
    command.send(signal.SIGINT)
    assert_stopped(command, signal.SIGINT)
    assert "saved; the same command resumes" not in "".join(command.lines)
    assert checkpoint.latest(tmp_path / "run/checkpoints") == 1


@pytest.mark.slow
def test_every_signal_in_every_phase(home, tmp_path):
    """Fifteen signals at random moments of one run, which goes on after each: the right code, at
    most one micro-batch and one save later, and in the end it is the run that nothing happened to,
    but for the previews that a signal cut short."""
    rng, out = random.Random(0), tmp_path / "run"
    recipe = dict(mesh=2, steps=80, save_every=3, preview_every=4, micro_batch=8, batch=16)
    for i in range(len(PHASES) * len(SIGNALS)):
        phase, number = PHASES[i % 5], SIGNALS[i % 3]
        command = train_and_tell(home, out, tmp_path, **recipe)
        command.wait_for_handlers()
        if phase != "start":
            command.wait_for(phase)
        time.sleep(rng.uniform(0, 4 if phase == "start" else 0.3))
        sent = command.send(number) + 0.5  # as much time as a thread may need to be heard
        assert_stopped(command, number)
        for name in ("encode", "save"):
            assert sum(when > sent for when in command.times(name)) <= 1, (phase, name)
    assert train.main(flags(home, out, **recipe)) == 0
    assert train.main(flags(home, tmp_path / "unbroken", **recipe)) == 0
    assert_same_training(out, tmp_path / "unbroken")


@pytest.mark.slow
def test_six_kills(home, tmp_path):
    """kill -9 at six random moments of one run: it ends with the bytes of the unbroken one."""
    rng, out = random.Random(1), tmp_path / "run"
    recipe = dict(steps=40, save_every=3, preview_every=10)
    for _ in range(6):
        command = train_and_tell(home, out, tmp_path, **recipe)
        if rng.random() < 0.8:
            command.wait_for("send")
        time.sleep(rng.uniform(0, 2))
        command.send(signal.SIGKILL)
        assert command.end()[0] == -signal.SIGKILL, command.errors.read_text()
    assert train.main(flags(home, out, **recipe)) == 0
    assert train.main(flags(home, tmp_path / "unbroken", **recipe)) == 0
    assert_same_run(out, tmp_path / "unbroken")
    assert len(metrics(out)) == 40


@pytest.mark.slow
def test_signals_to_sample(home, tmp_path):
    """Six signals at random moments of sample.py: it ends at once, and no picture is half there."""
    picture, rng = f"{ROOT}/examples/pictures/crab_edges.png", random.Random(2)
    spec = {"image": [[picture, None]], "resolution": 32, "num_inference_steps": 500}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    argv = [sys.executable, "sample.py", "--grid", f"{tmp_path}/spec.json", "--out"]
    for i in range(6):
        out, number = tmp_path / f"out{i}", SIGNALS[i % 3]
        command = Command([*argv, str(out), "--weights", str(home / "weights")], tmp_path)
        command.wait_for_handlers()
        time.sleep(rng.uniform(0, 10))
        command.send(number)
        assert_stopped(command, number, finished=[0])
        for file in out.glob("*.png"):
            Image.open(file).load()


def test_a_save_that_fails_ends_the_run(home, tmp_path, monkeypatch):
    """What goes wrong in a save that a run does not wait for ends it, at the latest where it saves
    again; the step before stays, with the adapter that was learnt until then."""
    out, check = tmp_path / "run", checkpoint.digests.check_files

    def check_files(path):
        if path.name == "4.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return check(path)

    monkeypatch.setattr(checkpoint.digests, "check_files", check_files)
    with pytest.raises(UserError, match="step 4 cannot be saved: No space left .*free some space"):
        train.main(flags(home, out, steps=60))
    assert os.listdir(out / "checkpoints") == ["2"] and len(metrics(out)) < 8
    assert safe_open(out / "lora.safetensors", "numpy").metadata()["step"] == "2"


@pytest.mark.slow
def test_data_that_breaks(home, tmp_path, monkeypatch):
    """Where a grid cannot be read all steps before it are saved, and once it is mended the run goes
    on as if nothing had been. What a Trainer is given to learn it takes: nobody has it twice."""
    out, draw, load, given = tmp_path / "run", train.draw_groups, models.load_for_training, []

    def draw_some(*args):
        yield from islice(draw(*args), 3)
        raise UserError("a.png cannot be read")

    def load_and_keep(*args):
        given.append(load(*args))
        return given[-1]

    monkeypatch.setattr(models, "load_for_training", load_and_keep)
    with monkeypatch.context() as broken, pytest.raises(UserError, match="a.png cannot be read"):
        broken.setattr(train, "draw_groups", draw_some)
        train.main(flags(home, out, save_every=100))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    assert [step.name for step in (out / "checkpoints").iterdir()] == ["3"]
    for folder in (out, tmp_path / "unbroken"):
        assert train.main(flags(home, folder)) == 0
    assert_same_run(out, tmp_path / "unbroken")
    assert all(x.is_deleted() for _, learnt, _ in given for x in jax.tree.leaves(learnt))


@pytest.mark.parametrize(
    "step, stopped, failed",
    [(0, "step 0", "begin again"), (3, "step 3, saved", "the state before it is saved: go on")],
)
def test_what_is_saved_is_said(capsys, step, stopped, failed):
    """A run that is stopped, or whose next step is not finite, says that it is saved where a step
    was made, and there alone."""
    trainer = SimpleNamespace(recipe=MINI.recipe, step=step, state=SimpleNamespace(_replace=dict))
    run = SimpleNamespace(path="run")
    ended = dict(trainer=trainer, run=run, first=None, failure=None, code=143)
    RunWriter.conclude(SimpleNamespace(**ended))
    assert capsys.readouterr().out == f"run: stopped at {stopped}; the same command resumes\n"
    sent = dict(step=step + 1, failed=True, told=[{"target": np.nan}], norms={"all": np.nan})
    with pytest.raises(FloatingPointError, match=f"norm nan; {failed} with a lower --lr"):
        Trainer.wait(trainer, SimpleNamespace(**sent))


PARENT = """
import multiprocessing, signal, time
from vcloze_jax.inputs.signals import SIGNALS, follow_parent

def serve():
    follow_parent()
    for number in SIGNALS:
        signal.raise_signal(number)
    print("serves", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=serve).start()
    time.sleep(600)
"""


def test_who_serves_ends_with_the_served(tmp_path):
    """A process that works for another is moved by no signal, and ends when that is killed."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, tmp_path / "parent.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout.readline() == "serves\n"
        parent.kill()
        parent.communicate(timeout=30)  # ends once nobody holds the pipe's other end
