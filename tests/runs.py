"""A small run of train.py, for the tests of what it writes and of what happens to it."""

import json
import subprocess
import sys
from pathlib import Path

import tiny

import sample

ROOT = Path(__file__).parents[1]
SUBJECTS = "crab", "magnet", "skier"
VIEWS = ("edges", "fluent_3d")
TIMELESS = dict(seconds=0, grids_per_second=0, tflops=0, mfu=0)


def make_home(folder, preset=tiny.TINY):
    """weights/, of tiny random models, and grids.jsonl: three grids of two rows, their truth
    included."""
    tiny.weights_folder(folder / "weights", preset=preset)
    pictures = ROOT / "examples/pictures"
    rows = [[f"{pictures}/{subject}_{view}.png" for view in VIEWS] for subject in SUBJECTS]
    grids = [{"image": [rows[i - 1], rows[i]], "task_prompt": "Draw."} for i in range(3)]
    (folder / "grids.jsonl").write_text("".join(json.dumps(grid) + "\n" for grid in grids))
    return folder


def flags(home, out, **changes):
    """The command of the run, with changes."""
    table = dict(weights=home / "weights", data=home / "grids.jsonl", resolution=32, mesh=2)
    table |= dict(rank=4, lr=0.05, ema=0.9, batch=8, steps=6, save_every=2)
    table |= dict(preview_every=3, out=out)
    return [f"--{key.replace('_', '-')}={value}" for key, value in (table | changes).items()]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def previews(out):
    return sorted((out / "previews").iterdir())


def assert_same_training(out, unbroken):
    """Metrics but what time decides and the adapter are equal to the last bit."""
    timeless = [[line | TIMELESS for line in metrics(folder)] for folder in (out, unbroken)]
    assert timeless[0] == timeless[1]
    adapters = [(folder / "lora.safetensors").read_bytes() for folder in (out, unbroken)]
    assert adapters[0] == adapters[1]


def assert_same_run(out, unbroken):
    """So are the previews, and what was measured at them."""
    assert_same_training(out, unbroken)
    logs = [(folder / "validation.jsonl").read_text() for folder in (out, unbroken)]
    assert logs[0] == logs[1]
    for file in previews(unbroken):
        assert (out / "previews" / file.name).read_bytes() == file.read_bytes(), file.name


def paint(home, out, lora=None, folder=None):
    """Bytes of the picture that sample.py paints of one blank cell."""
    out.mkdir()
    picture = f"{ROOT}/examples/pictures/crab_edges.png"
    spec = {"image": [[picture, None]], "resolution": 32, "num_inference_steps": 2}
    (out / "spec.json").write_text(json.dumps(spec))
    argv = ["--grid", f"{out}/spec.json", "--weights", f"{folder or home / 'weights'}"]
    sample.main([*argv, "--out", f"{out}/out", *(["--lora", f"{lora}"] if lora else [])])
    return (out / "out/spec.png").read_bytes()


# A process that does something to itself once the metrics of a step are written.
AFTER = """
import os, sys, time
import train
from vcloze_jax.inputs.runfolder import Log
from vcloze_jax.storage.checkpoint import SAVING

step, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
write = Log.write

def write_and_act(log, record):
    write(log, record)
    if record["step"] == step:
        SAVING.submit(int).result()  # what is being saved is whole then
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # a step is shorter than a thread's turn

Log.write = write_and_act
train.cli.run(train.main)
"""


def run_and_act(home, out, step, number, **changes):
    """The run as a process of its own, to which a signal is sent when a step is written."""
    argv = [sys.executable, "-c", AFTER, str(step), str(int(number))]
    return subprocess.run(
        argv + flags(home, out, **changes), cwd=ROOT, capture_output=True, text=True
    )
