"""Laws of the ablations: each row differs from the recipe in what its name says, and a run is asked
for what it has learnt itself."""

import json
import shlex
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from vcloze_jax import train
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data import graph
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.inputs import recipeflags
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.study import ablations, placements, trainings
from vcloze_jax.study.parts import PARTS, SLOW, Lab, choose_parts


def test_each_row_changes_one_value():
    """Of all of a run's values the flags of a row change one, and two rows never the same to the
    same; the first changes none. The task was never trained."""
    recipes = [
        recipeflags.read_recipe(train.parse(shlex.split(flags)))
        for flags in ablations.VARIANTS.values()
    ]
    changed = [
        {key: value for key, value in vars(recipe).items() if value != vars(recipes[0])[key]}
        for recipe in recipes
    ]
    assert [len(values) for values in changed] == [0, *[1] * (len(changed) - 1)]
    assert len({str(values) for values in changed}) == len(changed)
    assert recipes[0] == recipeflags.read_recipe(train.parse([]))
    assert recipes[0].rank == MINI.recipe.rank and trainings.TASK not in graph.TRAIN


def test_quick_leaves_them_out():
    """A quick report has all parts but the slow ones; who names one gets it."""
    assert choose_parts([], quick=True) == [name for name in PARTS if name not in SLOW]
    assert choose_parts([], quick=False) == [*PARTS]
    assert choose_parts(["ablations", "walk"], quick=True) == ["walk", "ablations"]


def test_a_failed_training_is_told(tmp_path):
    """What train.py says is the user's line, with the command that said it."""
    with pytest.raises(UserError, match="python train.py .*--rank -1.*: .*--rank") as told:
        trainings.train_all({tmp_path / "run": ["--rank", "-1"]}, 2, lambda runs, label: runs)
    assert "\n" not in f"{told.value}" and not (tmp_path / "run").exists()


def test_trainings_side_by_side(tmp_path, monkeypatch):
    """As many run at once as there are cores, a thread each; where one fails, those beside it end,
    and no others begin."""
    together, begun = threading.Barrier(2, timeout=20), []

    def pretend(command, *, env, **_):
        begun.append((command[-1], env["PJRT_NPROC"]))
        if str(tmp_path / "bad") in command:
            return SimpleNamespace(returncode=2, stderr="no\nwhy")
        together.wait() if len(begun) <= 4 else time.sleep(0.1)
        return SimpleNamespace(returncode=0)

    bar = lambda runs, label: runs  # noqa: E731
    monkeypatch.setattr(trainings.subprocess, "run", pretend)
    monkeypatch.setattr(trainings, "count_cores", lambda: 2)
    trainings.train_all({tmp_path / f"{i}": [] for i in range(4)}, 7, bar)
    assert begun == [("7", "1")] * 4
    with pytest.raises(UserError, match="python train.py .*bad.*: why"):
        trainings.train_all({tmp_path / name: [] for name in ("bad", *"0123456789")}, 7, bar)
    assert len(begun) < 4 + 11


def test_rows_tell_of_their_runs(tmp_path, monkeypatch):
    """A run is trained once for each row and its own losses are told, of its last fifth."""
    trained = []

    def pretend(runs, steps, bar):
        for run, flags in runs.items():
            trained.append(flags)
            run.mkdir(parents=True)
            losses = [9.0, 9.0, 9.0, 9.0, float(len(trained))]
            lines = [json.dumps({"loss_by_region": {"target": x}}) for x in losses]
            (run / "metrics.jsonl").write_text("\n".join(lines))

    class Still:
        """One that answers nothing."""

        preset = MINI

        def __call__(self, specs, bar):
            return [SimpleNamespace(pixels=np.zeros_like(s.grid.query.pixels)) for s in specs]

    monkeypatch.setattr(ablations, "train_all", pretend)
    monkeypatch.setattr(ablations, "load_variant", lambda run: Still())
    source = open_tasks("", MINI.recipe).held_out()
    lab = Lab(None, source, 2, True, lambda steps, label: steps, tmp_path)
    rows = ablations.ablate(lab).numbers["ablations"]
    assert [row["loss of the target, last fifth"] for row in rows] == [1.0, 2.0]
    assert trained == [shlex.split(flags) for flags in list(ablations.VARIANTS.values())[:2]]


def test_placements_are_trained_alike(tmp_path, monkeypatch):
    """Runs differ in their placement alone, which says the base that it needs; each is asked
    for what it has learnt, with an example more and more, and what it never saw."""
    trained, asked = [], []

    def pretend(runs, steps, bar):
        for run, flags in runs.items():
            trained.append((flags, steps))
            run.mkdir(parents=True)
            line = json.dumps({"loss_by_region": {"target": 1.0}, "seconds": 0.5})
            (run / "metrics.jsonl").write_text("\n".join([line] * 5))

    class Still:
        """One that answers nothing."""

        preset = MINI

        def __call__(self, specs, bar):
            asked.append(len(specs[0].grid.rows))
            return [SimpleNamespace(pixels=np.zeros_like(s.grid.query.pixels)) for s in specs]

    monkeypatch.setattr(placements, "train_all", pretend)
    monkeypatch.setattr(placements, "load_run", lambda run: Still())
    source = open_tasks("", MINI.recipe).held_out()
    lab = Lab(None, source, 2, True, lambda steps, label: steps, tmp_path)
    rows = placements.compare_placements(lab).numbers["placements"]
    names = [*PLACEMENTS]
    flags = [["--placement", name] for name in names]
    assert trained == [(each, trainings.QUICK_STEPS) for each in flags]
    assert asked == [1, 2, 3, 3, 3] * len(names) and placements.UNSEEN in graph.HELD_OUT_TASKS
    assert [row[""] for row in rows] == names
    noisy = {True: "16 of 96", False: "96 of 96"}  # whether others are clean
    wanted = [noisy[any(placement.clean)] for placement in PLACEMENTS.values()]
    assert [row["noisy tokens"] for row in rows] == wanted
    assert {row["seconds a step"] for row in rows} == {0.5} and rows[0]["unseen"]["mean"] > 0
