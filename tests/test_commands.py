"""Laws of the commands as processes: a mistake costs one line, early, and so does being stopped."""

import json
import os
import re
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import pytest
from clifolder import make_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return make_folder(tmp_path)


@pytest.mark.parametrize("name", ["JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64"])
def test_variables_that_jax_refuses(folder, name):
    """A variable of the environment that JAX cannot read is the user's mistake: one line."""
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--grid", "fox.json", "--check"],
        cwd=folder,
        env=os.environ | {name: "x"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {name}=x: .* that JAX cannot read; unset it\n", done.stderr)


POISON = "raise ImportError('jax is poisoned')\n"


# Importing it is where a command first waits: there it is asked to stop.
STOPPED = "import signal; signal.raise_signal(signal.SIGTERM)\n"


MEASURED = """
import resource, runpy, sys

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on a Mac
    assert peak < 500 * 1024, peak
"""


def process(folder, command, jax):
    """Run a command in `folder`, where `jax` is the text of the module that it would import."""
    (folder / "jax.py").write_text(jax)
    script, *argv = command.split()
    return subprocess.run(
        [sys.executable, "-c", MEASURED, ROOT / script, *argv],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@cache
def long_text():
    """What stands in a PNG beside its picture: a text of 512 MiB, packed."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(512)) + packer.flush()
    text = b"zTXtworkflow\0\0" + packed
    return (len(text) - 4).to_bytes(4) + text + zlib.crc32(text).to_bytes(4)


@pytest.mark.parametrize(
    "command, message",
    [
        ("sample.py --grid bad.json", "error: bad.json: image[0][1]: "),
        ("sample.py --grid bomb.json", "error: bomb.json: image[0][0]: "),
        ("sample.py --grid wide.json", "error: wide.json: image: the grid has 100000 tokens"),
        ("sample.py --grid wordy.json", "error: wordy.json: image[0]: no target"),
        ("sample.py --grid long.json", "error: long.json: image: 40000 pictures of at most 1024"),
        ("sample.py --grid many.json", "error: many.json: grid 20000 of at most 1024 at once"),
        ("sample.py --grid /dev/zero", "error: /dev/zero: '/dev/zero' is a pipe or a device"),
        ("train.py --steps 0", "error: --steps 0: must be at least 1"),
        ("train.py --data bad.json", "error: bad.json: line 1: image[0][1]: "),
        ("train.py --data fox.json", "error: fox.json: line 1: image[0][1]: null"),
    ],
)
def test_as_commands(folder, command, message):
    """All of it as a process, where importing JAX would fail, in less than 500 MB."""
    (folder / "wide.json").write_text(json.dumps({"image": [[None] * 100_000], "resolution": 16}))
    (folder / "bomb.json").write_text(json.dumps({"image": [["bomb.png", None]]}))
    # A picture of 4 x 10^9 pixels, as its header says.
    png = bytearray((folder / "a.png").read_bytes())
    (folder / "wordy.png").write_bytes(png[:33] + long_text() + png[33:])
    (folder / "wordy.json").write_text(json.dumps({"image": [["wordy.png", "wordy.png"]]}))
    (folder / "long.json").write_text(json.dumps({"image": [["a.png", "a.png"]] * 20_000}))
    (folder / "many.json").write_text(json.dumps([{"image": [["a.png", None]]}] * 20_000))
    png[16:24] = (65_000).to_bytes(4) * 2
    (folder / "bomb.png").write_bytes(png[:29] + zlib.crc32(png[12:29]).to_bytes(4) + png[33:])
    done = process(folder, command, POISON)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["sample.py --grid fox.json", "train.py --data own.jsonl"])
def test_stopped_at_any_time(folder, command):
    """SIGTERM ends a command with 143 and without a word, also before there is anything to save."""
    done = process(folder, command, STOPPED)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")
