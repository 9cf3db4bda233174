"""Laws of the commands: a mistake costs one line on stderr and exit code 2, and is found early."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from clifolder import assert_refused, make_folder

import sample
import train
from vcloze_jax import evaluate
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data import __main__ as data
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.tasks import find_task
from vcloze_jax.ports import __main__ as ports
from vcloze_jax.storage import places
from vcloze_jax.study import __main__ as study

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return make_folder(tmp_path)


# --- sample.py ---


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "--grid SPEC.json is needed"),
        ("--grid", "--grid: expected at least one argument"),
        ("--gird fox.json", "unrecognized arguments: --gird"),
        ("--gri fox.json", "unrecognized arguments: --gri"),
        ("--grid fox.json --lora a.safetensors:nan", "the scale must be finite"),
        ("--grid fox.json --lora :0.5", "--lora :0.5: no file before the scale"),
        ("–seed 1 --grid fox.json", "unrecognized arguments: –seed 1; a dash was typed as another"),
        (
            "--grid fox.json –seed 1",
            "–seed: '–seed' cannot be opened: No such file or directory; its",
        ),
        ("--grid forge.json", "forge.json: content_prompt: <lora:fox:0.8> would be read as words"),
        ("--grid missing.json", "missing.json: "),
        ("--grid bad.json", "bad.json: image[0][1]: "),
        ("--grid bad.json --grid fox.json", "bad.json: image[0][1]: "),
        ("--grid fox.json --out a --out b", "--out: given twice; keep one"),
        ("--grid fox.json --seed 0 --seed 0", "--seed: given twice; keep one"),
        ("--grid fox.json --weights=", "argument --weights: an empty path"),
        ("--grid fox.json --out=", "argument --out: an empty path"),
        ("--grid fox.json --list-tasks", "--grid: nothing is painted where tasks are listed"),
        ("--grid fox.json --device 0GB", "--device: '0GB' is no size"),
        ("--grid fox.json --out s3://b/fox", "--out s3:/b/fox: an address, not a path"),
        ("--grid fox.json --out=~/file", "home/file: File exists"),
        ("--grid fox.json bad.json", "bad.json: image[0][1]: "),
        ("--grid fox.json fox.json", "output 'fox' is also that of"),
        ("--grid fox.json --plan --dial", "--dial: is not planned"),
        ("--grid fox.json --plan --preset flux-fill --lora a.sft", "--lora: a preset is planned"),
        ("--grid a.png", "a.png: "),
        ("--grid fox.json --weights odd", "odd/vcloze.json: must say"),
        ("--grid fox.json --out .", "fox.json is an input"),
        ("--grid fox.json --out file", "--out file: File exists"),
        ("--grid fox.json --out file/deeper", "--out file/deeper: Not a directory"),
        ("--grid fox.json --out /proc/self", "--out /proc/self: No such file"),
        ("--grid fox.json --out /proc/self/new --check", "--out /proc/self/new: No such file"),
        (f"--grid {'n' * 245}.json --out out", "--out out: File name too long; shorten the name"),
    ],
)
def test_sample_refuses(folder, call, monkeypatch, argv, message):
    """Wrong flags and specs are told before JAX is imported."""
    monkeypatch.chdir(folder)
    assert_refused(call(sample.main, argv), message)
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--weights nowhere", "nowhere: "),
        ("--weights none", "none: "),
        ("--weights file", "file: "),
        ("--mesh eight", "--mesh eight: "),
        ("--mesh 0", "--mesh 0: "),
        ("--mesh data=2,model=4", "'model=4' is not AXIS=SIZE"),
        ("--mesh data=65536,fsdp=2", "131072 devices, not 1 to 65536"),
        ("--download", "--download: is of --weights"),
        ("--mesh 5 --check", "--mesh: flux/"),
        ("--mesh tensor=3 --check", "--mesh: flux/"),
    ],
)
def test_sample_refuses_weights_and_meshes(folder, call, monkeypatch, argv, message):
    """So are weights that are not there and a mesh that is none, when JAX is."""
    monkeypatch.chdir(folder)
    assert_refused(call(sample.main, f"--grid fox.json {argv}", jax=True), message)
    assert not (folder / "outputs").exists()


def test_a_mark_of_windows(folder, call, monkeypatch):
    """Windows' mark of UTF-8 begins a preset."""
    monkeypatch.chdir(folder)
    (folder / "none/vcloze.json").write_text('{"preset": "mini"}', "utf-8-sig")
    assert places.named_preset("none") is MINI


def test_list_tasks(call, folder):
    """--list-tasks needs no spec, and names the tasks that the model knows, as a shell takes them:
    each is one that a spec of its columns may name."""
    code, out, _ = call(sample.main, "--list-tasks")
    assert code == 0 and "gray-to-fluent_3d (2 columns): In each row" in out
    assert "depth-to-image" not in out and not set("<>&|;$*") & set(out)
    code, authors, _ = call(sample.main, f"--list-tasks --weights {folder}")  # no mini by its file
    assert code == 0 and "depth-to-image (2 columns): In each row" in authors
    assert call(sample.main, "--list-tasks --preset flux-fill")[:2] == (0, authors)
    for line in (out + authors).splitlines():
        name, columns, sentence = re.fullmatch(r"(\S+) \((\d) columns\): (.+)", line).groups()
        assert find_task(name) == (sentence, int(columns))
    assert find_task("gray->fluent_3d") == find_task("gray-to-fluent_3d") and not find_task("grey")


def test_a_start_is_not_spent_on_garbage():
    """A command looks for garbage less often than Python would: what tracing makes mostly lives."""
    code = "import gc; from vcloze_jax.inputs import cli; "
    code += "cli.run(lambda argv: print(gc.get_threshold()[0]))"
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(told) >= 20_000


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux's C library")
def test_a_process_asks_for_huge_pages_once(monkeypatch):
    """It begins again as the same process, with the same words, and keeps settings that it has."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    code = "import os, sys; print(os.getpid(), flush=True); from vcloze_jax.inputs import cli; "
    code += "cli.use_huge_pages(); print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
    command = [sys.executable, "-c", code, "--mesh", "8"]
    for setting, begins in ((None, 2), ("glibc.malloc.perturb=0", 1)):
        if setting:
            monkeypatch.setenv("GLIBC_TUNABLES", setting)
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        *processes, words = told.splitlines()
        assert len(processes) == begins and len(set(processes)) == 1
        assert words == f"{setting or 'glibc.malloc.hugetlb=1'} --mesh 8"


@pytest.mark.parametrize(
    "called, command",
    [
        ("train.py", "python sample.py"),
        ("/a/train.py", "python /a/sample.py"),
        ("/bin/vcloze-train", "vcloze-sample"),
    ],
)
def test_commands_name_each_other(monkeypatch, called, command):
    """A command names another as it was called itself, from the checkout or installed."""
    monkeypatch.setattr(sys, "argv", [called])
    assert " ".join(cli.name_command("sample")) == command


@pytest.mark.parametrize("main", [sample.main, train.main])
def test_help(call, main):
    """--help needs no JAX and shows the commands that the file begins with."""
    code, out, _ = call(main, "--help")
    assert code == 0 and "    python " in out and "--mesh" in out


# --- train.py ---


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--steps many", "argument --steps: invalid int value"),
        ("--batch -1", "--batch -1: must be at least 1"),
        ("--batch 8 --micro-batch 3", "--batch 8: not a multiple of --micro-batch 3"),
        ("--resolution 8", "--resolution 8: must be at least 16"),
        ("--lr nan", "--lr nan: must be above 0, below 1"),
        ("--seed -1", "--seed -1: must be in 0 … 2^32-1"),
        ("--clip 0", "--clip 0.0: must be above 0"),
        ("--mask-fill 7", "--mask-fill 7.0: must be from -1 to 1"),
        ("--time-mean inf", "--time-mean inf: must be a finite number"),
        ("--guidance-range 30 1", "--guidance-range 30 1: must be LOW HIGH"),
        ("--guidance-range nan 1", "--guidance-range nan 1: must be LOW HIGH"),
        ("--weight-decay nan", "--weight-decay nan: must be at least 0"),
        (f"--steps {10**20}", f"--steps {10**20}: must be below 2^31"),
        ("--decay-steps 10", "--decay-steps 10: must be 0, or more than --warmup 50"),
        ("--data=", "argument --data: an empty path"),
        ("--data-dir=", "argument --data-dir: an empty path"),
        ("--mesh=", "argument --mesh: an empty text; is a variable not set"),
        ("--data nowhere/mine.jsonl", "no such data; use graphemoji"),
        ("--data own.jsonl --data=none", "--data: given twice; keep one"),
        ("--lora a --lora b", "--lora: given twice; keep one"),
        ("--guidance-range 1 2 --guidance-range 1 3", "--guidance-range: given twice"),
        ("--rank -1", "--rank -1: must be at least 0"),
        ("--preset maxi", "argument --preset: invalid choice: 'maxi'"),
        ("--preset flux-fill", "--preset flux-fill: its weights are yours; add --weights DIR"),
        ("--from-scratch --rank 4", "--from-scratch trains every weight"),
        ("--optimizer muon", "--optimizer muon is for --rank 0 or --from-scratch; an adapter"),
        ("--optimizer sgd", "argument --optimizer: invalid choice: 'sgd'"),
        ("--from-scratch --offload", "--from-scratch trains the text encoders, too"),
        ("--data nowhere.jsonl", "--data nowhere.jsonl: no such data"),
        ("--data nowhere", "--data nowhere: no such data"),
        ("--data none", "none: no pair in it: "),
        ("--held-out 2", "--held-out 2.0: must be from 0 to 1"),
        ("--resolution 128", "--resolution 128: GraphEmoji's pictures have 64 x 64 pixels"),
        ("--data file", "file: line 1: is not JSON"),
        ("--data bad.json", "bad.json: line 1: image[0][1]: "),
        ("--tensorboard", "--tensorboard: pip install tensorboardX, please"),
        ("--profile 0", "argument --profile: '0' is no whole number from 1"),
        ("--out gs://bucket/run", "--out gs:/bucket/run: an address, not a path; name a folder"),
        ("--out file", "file: not a run of train.py"),
        ("--out .", ".: not a run of train.py, and not empty"),
        ("--out odd", "odd: not a run of train.py, and not empty"),
        ("--out /proc/none", "--out /proc/none: No such file"),
        ("--out /proc/none --check", "--out /proc/none: No such file"),
        (f"--out {'n' * 300}", "nnn: File name too long; shorten the name"),
        (f"--out {'n/' * 1900}", "; choose another folder"),
    ],
)
def test_train_refuses(folder, call, monkeypatch, argv, message):
    """Wrong flags are told before JAX is imported, and no run is begun."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were missing
    assert_refused(call(train.main, argv), message)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--weights nowhere", "nowhere: "),
        ("--mesh 3", "a multiple of 3, please, which all axes of --mesh but tensor"),
        ("--mesh x", "--mesh x: "),
    ],
)
def test_train_refuses_weights_and_meshes(folder, call, monkeypatch, argv, message):
    """So are weights that are not there and a mesh that does not fit, when JAX is."""
    monkeypatch.chdir(folder)
    assert_refused(call(train.main, f"--batch 4 --data own.jsonl {argv}", jax=True), message)
    assert not (folder / "runs").exists()


def test_train_refuses_a_mesh_that_does_not_divide(folder, call, monkeypatch):
    """With --check, too: an array of what is learnt that the mesh cannot divide is named."""
    monkeypatch.chdir(folder)
    code, _, err = call(train.main, "--data own.jsonl --mesh tensor=3 --check", jax=True)
    assert code == 2 and err.startswith("error: --mesh: flux/double/img/proj/lora_a")
    assert err.count("\n") == 1 and not (folder / "runs").exists()


# --- evaluate ---


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--out /proc/none --weights none", "--out /proc/none: No such file"),
        ("--out file --weights none", "--out file: File exists"),
        ("--subjects 1 --subjects 2", "--subjects: given twice; keep one"),
        ("--card none --weights none", "--card none: 'none' is a folder"),
        ("--data own.jsonl --resolution 8", "--resolution 8: must be at least 16"),
    ],
)
def test_evaluate_refuses(folder, call, monkeypatch, argv, message):
    """That its outputs can be written is proved before weights are looked at."""
    monkeypatch.chdir(folder)
    assert_refused(call(evaluate.main, argv, jax=True), message)


# --- what the commands share ---


MAINS = sample.main, train.main, evaluate.main, ports.main, data.main, study.main


@pytest.mark.parametrize("main", MAINS)
def test_a_flag_of_one_value_is_given_once(call, main):
    """In every command: the last of two would silently take the other's place."""
    assert_refused(call(main, "--out a --out b", jax=True), "--out: given twice; keep one")


def test_flags_that_add_up():
    """What may be given again is not lost."""
    assert sample.parse("--grid a --grid b c".split()).grid == [Path(name) for name in "abc"]
    assert train.parse("--accept data --accept weights dtype".split()).accept == [
        "data",
        "weights",
        "dtype",
    ]


@pytest.mark.parametrize(
    "result, code",
    [
        (None, 0),
        (0, 0),
        (143, 143),
        (UserError("mine"), 2),
        (FloatingPointError("step 3: loss nan"), 1),
    ],
)
def test_exit_codes(call, result, code):
    """0 done, 2 the user's mistake, 1 not finite, and what a command answers."""

    def main(_):
        if isinstance(result, BaseException):
            raise result
        return result

    exit_code, _, err = call(main, "")
    assert exit_code == code
    assert err == (f"error: {result}\n" if isinstance(result, Exception) else "")


@pytest.mark.parametrize("argv", ["--seed -1", "--seed 4294967296", "--side 99999999"])
def test_data_refuses(folder, call, monkeypatch, argv):
    """A number that nothing can be drawn with is told by its flag, and no sheet is begun."""
    monkeypatch.chdir(folder)
    assert_refused(call(data.main, f"--degrade a.png {argv}"), argv)
    assert not (folder / "degradations.png").exists()
