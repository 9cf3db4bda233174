"""Laws of a run's identity: what makes it, what may change when it goes on, who writes it."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import train
from vcloze_jax.config import MINI, PRESETS, Recipe, UserError
from vcloze_jax.inputs import recipeflags
from vcloze_jax.inputs.metrics import draw_curves, read_column
from vcloze_jax.inputs.runfolder import FREE, ORIGINS, Log, RunFolder

ROOT = Path(__file__).parents[1]
OTHERS = {str: "other", int: 7, float: 0.25, tuple: [2, 3], bool: True, type(None): "other"}
# Another value of every setting, as a run's file might hold it.
OTHER = {f.name: OTHERS[type(f.default)] for f in fields(Recipe)} | {"preset": "flux-fill"}


@pytest.fixture
def begun(tmp_path):
    """The folder of mini's run, as its first second leaves it, and its recipe."""
    run, recipe = RunFolder(tmp_path / "run"), recipeflags.read_recipe(train.parse([]))
    run.create()
    run.settle(recipe, {})
    yield run, recipe
    run.close()


def test_every_setting_is_a_flag():
    """Every value of a recipe is a flag, whose absence leaves the preset's default."""
    assert recipeflags.read_recipe(train.parse([])) == MINI.recipe
    argv = ["--guidance-range", "1", "30", "--clip", "3", "--from-scratch", "--batch", "4"]
    recipe = recipeflags.read_recipe(train.parse(argv))
    told = dict(guidance_range=(1.0, 30.0), clip=3.0, from_scratch=True, rank=0)
    assert recipe == replace(MINI.recipe, **told, batch=4, micro_batch=4, group=4)


def test_own_data_has_defaults_of_its_own(tmp_path):
    """On mini the user's own data is learnt by a recipe for little of it, which every flag changes;
    no other data and no other preset is."""
    read = lambda *argv: recipeflags.read_recipe(train.parse(argv))  # noqa: E731
    small, own = recipeflags.OWN["mini"], ("--data", f"{tmp_path}")
    assert small.keys() <= {*FREE}  # or runs that began before would be refused
    assert read(*own) == replace(MINI.recipe, data=f"{tmp_path}", **small)
    assert read(*own, "--lr", "0.5", "--steps", "7") == replace(read(*own), lr=0.5, steps=7)
    assert read("--data", "graphemoji") == replace(MINI.recipe, data="graphemoji")
    flux = read(*own, "--preset", "flux-fill", "--plan")
    assert flux == replace(PRESETS["flux-fill"].recipe, data=f"{tmp_path}")


@pytest.mark.parametrize("key", sorted({f.name for f in fields(Recipe)} - {*FREE, *ORIGINS}))
def test_identity(begun, key):
    """Any setting but the free ones is the run's identity: another value is an error by name."""
    run, recipe = begun
    run.compare(recipe)
    entries = json.loads(run.config.read_text()) | {key: OTHER[key]}
    run.config.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=rf"config.json: {key} is .*, this command says"):
        run.compare(recipe)


@pytest.mark.parametrize("key", FREE)
def test_free_settings(begun, key):
    """Mesh and intervals may change when a run goes on; steps may grow, and never shrink."""
    run, recipe = begun
    run.compare(replace(recipe, **{key: 300 if key == "steps" else OTHER[key]}))
    with pytest.raises(UserError, match=f"steps is {recipe.steps}, and can only grow"):
        run.compare(replace(recipe, steps=recipe.steps - 1))


def test_a_plan_is_of_no_run(begun):
    """What only plans is compared with no run, whatever lies in the folder."""
    run, recipe = begun
    plans = RunFolder(run.path, begins=False)
    plans.compare(replace(recipe, rank=recipe.rank + 1))
    plans.compare_origins(recipe, dict.fromkeys(ORIGINS, "another"), [])


def test_a_run_that_cannot_be_written(begun, monkeypatch):
    """A folder that refuses is told, also while a run lasts, and it is not said to be locked."""
    run, recipe = begun
    run.close()
    run.compare(recipe)
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    with pytest.raises(UserError, match="--out .*run: cannot be locked: Is a directory"):
        run.create()
    log = Log(run.metrics, 0)
    run.metrics.unlink()
    run.metrics.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: Is a directory"):
        log.write({"step": 1})


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"steps": 3}', "{", '{"preset": "maxi"}'])
def test_broken_identity(begun, text):
    """A config.json that is not a run's is told, whatever it holds."""
    run, recipe = begun
    run.config.write_text(text)
    with pytest.raises(UserError, match="config.json: not a run's settings"):
        run.compare(recipe)


def test_a_changed_rate_is_told(begun, capsys):
    """A rate is no part of a run's identity: a command that changes it says so, once."""
    run, recipe = begun
    for _ in range(2):
        run.settle(replace(recipe, lr=0.5), {})
    told = f"{run.path}: goes on with --lr 0.5, after {recipe.lr:g}\n"
    assert capsys.readouterr().out == told


def test_older_identity(begun):
    """What an older version did not write is taken to be the preset's default; what a newer one
    wrote is told."""
    run, recipe = begun
    entries = json.loads(run.config.read_text())
    del entries["clip"], entries["mask_fill"]
    run.config.write_text(json.dumps(entries))
    run.compare(recipe)
    with pytest.raises(UserError, match="clip is 2.0, this command says 3.0"):
        run.compare(replace(recipe, clip=3.0))
    run.config.write_text(json.dumps(entries | {"bend": 1}))
    with pytest.raises(UserError, match="not a run's settings .*bend"):
        run.compare(recipe)


GOLDEN = ROOT / "tests/data/golden_run"  # as version 0.1.0 wrote it, but for the weights' path


def test_golden_run(tmp_path):
    """A run that an earlier version wrote is read by every later one: the same flags go on with it,
    from the step that it has, others are refused by name, and its curves are drawn."""
    argv = "--weights weights --data grids.jsonl --resolution 32 --rank 1 --lr 0.05 --batch 2"
    recipe = recipeflags.read_recipe(train.parse([*argv.split(), "--steps", "3"]))
    run = RunFolder(shutil.copytree(GOLDEN, tmp_path / "run"))
    run.compare(recipe)
    with pytest.raises(UserError, match=r"clip is 2.0, this command says 3.0"):
        run.compare(replace(recipe, clip=3.0))
    origins = json.loads(run.config.read_text())["origins"]
    run.compare_origins(recipe, origins, [])
    with pytest.raises(
        UserError, match="data was grids.jsonl of digest .*, and is .*--accept data"
    ):
        run.compare_origins(recipe, origins | {"data": "2"}, [])
    with pytest.raises(UserError, match="lora was none, and is a.safetensors of digest 3; .*"):
        run.compare_origins(replace(recipe, lora="a.safetensors"), origins | {"lora": "3"}, [])
    Log(run.metrics, 2)
    assert run.metrics.read_bytes() == (GOLDEN / "metrics.jsonl").read_bytes()
    draw_curves(run.metrics, run.validation, run.curves)
    assert run.curves.stat().st_size
    Log(run.metrics, 1)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1]


def test_logs_of_skipped_steps(tmp_path):
    """Law: a log is JSON, which knows no NaN, also where a step was not finite; what reads a column
    of it leaves that step out."""
    log = Log(tmp_path / "metrics.jsonl", 0)
    for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.25)):
        log.write({"step": step, "loss": loss, "loss_by_region": {"grid": -loss}})
    lines = log.path.read_text().splitlines()
    log.path.write_text(log.path.read_text() + '[1]\n7\n{"a": 1}\n')
    Log(log.path, 3)
    assert log.path.read_text().splitlines() == lines  # nothing else may stand in a log
    assert json.loads(lines[1]) == {"step": 2, "loss": None, "loss_by_region": {"grid": None}}
    assert "NaN" not in lines[1] and read_column(log.path, "loss") == ([1, 3], [0.5, 0.25])


def test_identity_as_a_command(begun, call):
    """A run that is another one is refused before JAX is imported."""
    run, recipe = begun
    told = f"clip is {recipe.clip}, this command says 0.5"
    code, out, err = call(train.main, f"--out {run.path} --clip 0.5")
    assert (code, out, err.count("\n")) == (2, "", 1) and told in err


@pytest.mark.parametrize("key", ORIGINS)
def test_origins(begun, key):
    """What a run learns from is known by its content: another one is an error by name, which can be
    accepted; a folder that moved, or what an older version did not write, is none."""
    run, recipe = begun
    origins = dict.fromkeys(ORIGINS, "1")
    run.compare_origins(recipe, origins, [])
    run.create()
    run.settle(recipe, origins)
    moved = recipe if key == "dtype" else replace(recipe, **{key: "elsewhere"})
    run.compare_origins(moved, origins, [])
    other = origins | {key: "2"}
    with pytest.raises(UserError, match=rf"config.json: {key} was .*--accept {key}"):
        run.compare_origins(recipe, other, [k for k in ORIGINS if k != key])
    run.compare_origins(recipe, other, [key])


def test_one_writer(begun):
    """A second process that would write the same run is refused, as long as the first one lives."""
    run, _ = begun
    code = "import sys; from vcloze_jax.inputs.runfolder import RunFolder\n"
    code += "RunFolder(sys.argv[1]).lock()"
    command = [sys.executable, "-c", code, run.path]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "another train.py writes this run" in refused.stderr
    run.close()
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
