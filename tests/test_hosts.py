"""Laws of several hosts: they are one run, and end together, whatever happens to one of them.

Two processes on this machine, started as Slurm would start them, are two hosts.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from hostpair import CHILD, ends, start_pair
from runs import ROOT, flags, make_home, metrics
from safetensors.numpy import load_file

from vcloze_jax.storage import checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The weights and the grids of the runs."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def alone(home):
    """The folder of the run of one process with eight devices."""
    done = subprocess.run([sys.executable, "-c", CHILD, *flags(home, home / "alone")], cwd=ROOT)
    assert done.returncode == 0
    return home / "alone"


def assert_equal(out, other):
    """Metrics of two runs are equal to rounding, and so are adapters as a whole: Adam makes a whole
    step of a gradient that is nothing but rounding, so that single numbers may differ."""
    for here, there in zip(metrics(out), metrics(other), strict=True):
        assert here["step"] == there["step"]
        assert here["loss_by_kind"].keys() == there["loss_by_kind"].keys()
        for key in ("loss", "grad_norm"):
            rtol = 1e-6 if here["step"] < 3 else 1e-5
            np.testing.assert_allclose(here[key], there[key], rtol=rtol)
    ours, theirs = (load_file(folder / "lora.safetensors") for folder in (out, other))
    assert ours.keys() == theirs.keys()
    ours, theirs = (np.concatenate([x[k].ravel() for k in sorted(x)]) for x in (ours, theirs))
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
    assert np.median(np.abs(ours - theirs)) < 1e-6


@pytest.mark.slow
def test_two_hosts_are_one_process(home, alone, tmp_path):
    """Two hosts of four devices are one process of eight: metrics, adapter, previews; one writes
    and speaks. A run may change hosts as it goes on: alone for two steps, then both, then alone."""
    codes, outs, errors = ends(start_pair(flags(home, tmp_path / "run")))
    assert codes == [0, 0], errors
    assert "finished, lora.safetensors written" in outs[0] and "finished" not in outs[1]
    assert_equal(tmp_path / "run", alone)
    for kind in ("previews", "checkpoints"):
        names = [{file.name for file in (f / kind).iterdir()} for f in (tmp_path / "run", alone)]
        assert names[0] == names[1]
    out = tmp_path / "changed"
    for steps, run in ((2, subprocess.run), (4, None), (6, subprocess.run)):
        argv = flags(home, out, steps=steps)
        if run:
            assert run([sys.executable, "-c", CHILD, *argv], cwd=ROOT).returncode == 0
        else:
            assert ends(start_pair(argv))[0] == [0, 0]
    assert_equal(out, alone)


# sample.py that tells which grids it encodes and which files it writes.
TELLING = """
import sys
import sample
from vcloze_jax import pipeline
from vcloze_jax.painter import Painter

def tell_encoding(painter, canvas, encode=Painter.encode):
    print("encoded", canvas.spec.name, file=sys.stderr)
    encode(painter, canvas)

def tell_decoding(painter, grid, latents, decode=Painter.decode):
    print("decoded", file=sys.stderr)
    return decode(painter, grid, latents)

Painter.encode, Painter.decode = tell_encoding, tell_decoding

for name in ("save_png", "save_text"):
    def tell(file, content, write=getattr(pipeline, name)):
        print("wrote", file.name, file=sys.stderr)
        write(file, content)
    setattr(pipeline, name, tell)

sample.cli.run(sample.main)
"""


@pytest.mark.slow
def test_two_hosts_paint_as_one(home, tmp_path):
    """Two hosts of one device paint the bytes that a process of two does; each encodes what its
    device holds, for which it decodes what is enlarged, and decodes and writes its own grids, one
    record each; one speaks."""
    grid = json.loads((home / "grids.jsonl").read_text().splitlines()[0])
    grid["image"][-1][-1] = None
    spec = grid | {"num_inference_steps": 2, "resolution": 32}
    again = spec | {"seed": 1, "upsampling": {"width": 48, "num_inference_steps": 3}}
    (tmp_path / "grid.json").write_text(json.dumps([again, spec, again | {"seed": 2}]))
    argv = [f"--weights={home / 'weights'}", "--mesh=2", f"--grid={tmp_path / 'grid.json'}"]
    codes, outs, errors = ends(start_pair([*argv, f"--out={tmp_path / 'two'}"], (TELLING,) * 2))
    assert codes == [0, 0], errors
    assert "3 grids painted" in outs[0] and "painted" not in outs[1]
    told = [[x.split()[1] for x in e.splitlines() if x.startswith("encoded ")] for e in errors]
    assert told == [["grid-0", "grid-1", "grid"], ["grid-2", "grid"]]  # grid: what is enlarged
    decoded = [e.splitlines().count("decoded") for e in errors]
    assert decoded == [4, 2]  # grid-0 and -2, each twice; grid-2 to enlarge it, grid-1
    wrote = [{x[6:] for x in e.splitlines() if x.startswith("wrote ")} for e in errors]
    names = [{f"grid-{i}{end}" for end in (".png", "_target0.png", ".json")} for i in range(3)]
    assert wrote == [names[0] | names[2], names[1]]
    argv = [sys.executable, "-c", TELLING, *argv, f"--out={tmp_path / 'one'}"]
    assert subprocess.run(argv, cwd=ROOT, capture_output=True).returncode == 0
    for name in set.union(*names):
        two, one = ((tmp_path / out / name).read_bytes() for out in ("two", "one"))
        if name.endswith(".json"):
            two, one = (json.loads(x) | {"seconds": 0, "compiles": 0} for x in (two, one))
            two, one = ({k: v for k, v in x.items() if k != "upsampling"} for x in (two, one))
        assert two == one, name


# train.py whose previews are of one step: 57 blocks of eight threads take their time.
BRIEF = """
import train
from vcloze_jax.runwriter import RunWriter

RunWriter.preview = RunWriter.rehearse
train.cli.run(train.main)
"""


@pytest.mark.slow
def test_the_whole_depth(tmp_path):
    """A twin of FLUX.1-Fill, 19 + 38 blocks at a width of 96, on eight devices of two hosts, over
    all axes of a mesh: it trains, its text encoders in host memory, saves, goes on from there with
    its base whole and from a cache, and paints. Each host digests what its devices hold, so that an
    array has as many digests as parts."""
    home, out = make_home(tmp_path, tiny.DEEP), tmp_path / "run"
    common = dict(remat="light", save_every=1, preview_every=9)
    ways = [(dict(mesh="data=2,fsdp=2,tensor=2"), ["--offload"])]
    ways += [(dict(mesh="data=2,state=2,tensor=2", cache=home / "cache"), [])]
    for steps, (way, more) in enumerate(ways, 1):
        argv = flags(home, out, steps=steps, **common, **way) + more
        codes, outs, errors = ends(start_pair(argv, (BRIEF,) * 2))
        assert codes == [0, 0], errors
    assert [line["step"] for line in metrics(out)] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in metrics(out))
    stored = checkpoint.digests.check_files(out / "checkpoints/2")
    kind, parts = stored["trainable/flux/single/linear1/lora_b"]
    assert kind.startswith("float32[38, ") and len(parts) == 4  # over state and tensor
    spec = json.loads((out / "question.json").read_text())
    (out / "question.json").write_text(json.dumps(spec | {"num_inference_steps": 2}))
    paint = "import sample; sample.cli.run(sample.main)"
    argv = [f"--weights={home / 'weights'}", f"--lora={out / 'lora.safetensors'}"]
    argv += ["--mesh=fsdp=4,tensor=2", f"--grid={out / 'question.json'}", f"--out={tmp_path}"]
    codes, outs, errors = ends(start_pair(argv, (paint, paint)))
    assert codes == [0, 0] and "1 grids painted" in outs[0], errors
    assert (tmp_path / "question_target0.png").is_file()


# train.py, one of whose hosts does something to itself, or to its limits, after a step's metrics.
AFTER = """
import os, resource, sys, time
import train
from vcloze_jax.runwriter import RunWriter
from vcloze_jax.storage.checkpoint import SAVING

write = RunWriter.write

def write_and_act(writer, sent, seconds):
    write(writer, sent, seconds)
    SAVING.submit(int).result()  # what is being saved is whole then
    if sent.step == 3 and action == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
    elif sent.step == 3:
        os.kill(os.getpid(), action)

RunWriter.write = write_and_act
train.cli.run(train.main)
"""


def run_and_act(home, out, host, action, **changes):
    """A run of two hosts, to one of which something happens at step 3."""
    codes = [f"action = {action!r}\n{AFTER}" if n == host else CHILD for n in range(2)]
    return ends(start_pair(flags(home, out, **changes), codes))


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_signal_to_one(home, alone, tmp_path, host):
    """SIGTERM to one host stops both after the same step, which is saved; both end with 143, and
    the same command goes on."""
    out = tmp_path / "run"
    codes, _, errors = run_and_act(home, out, host, int(signal.SIGTERM), save_every=100)
    assert codes == [143, 143], errors
    assert "stopping" in errors[host] and "stopping" not in errors[1 - host]
    assert len(metrics(out)) == checkpoint.latest(out / "checkpoints") < 6
    assert ends(start_pair(flags(home, out)))[0] == [0, 0]
    assert_equal(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_one_is_lost(home, tmp_path, host):
    """A host that is killed ends the other within a minute, with a line that says so; what was
    saved is there."""
    out = tmp_path / "run"
    codes, _, errors = run_and_act(home, out, host, int(signal.SIGKILL))
    assert codes[host] == -signal.SIGKILL and codes[1 - host] not in (0, 2)
    assert re.search("another (one|task)", errors[1 - host]), errors
    written = (out / "metrics.jsonl").stat().st_mtime
    assert time.time() - written < 60
    assert checkpoint.latest(out / "checkpoints") == 2


@pytest.mark.slow
def test_disk_full_on_one(home, tmp_path):
    """A disk that takes no more of one host: both say the same line and end with 2, the older step
    stays, nothing is half there."""
    out = tmp_path / "run"
    codes, _, errors = run_and_act(home, out, 1, "full")
    lines = [[x for x in e.splitlines() if x.startswith("error: ")] for e in errors]
    assert codes == [2, 2] and lines[0] == lines[1], errors
    assert "step 4 cannot be saved: File too large" in lines[0][0]
    assert sorted(os.listdir(out / "checkpoints")) == ["2"]


@pytest.mark.slow
def test_not_finite_on_two(home, tmp_path):
    """A number that is not finite ends both hosts at the same moment, each with 1."""
    with tiny.overflowing(home / "weights"):
        codes, _, errors = ends(start_pair(flags(home, tmp_path / "run")))
    assert codes == [1, 1] and all("picture is not finite" in e for e in errors), errors
