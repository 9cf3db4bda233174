"""A small run of train.py, for the tests of what it writes and of what happens to it."""

import json
from pathlib import Path

import tiny

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
