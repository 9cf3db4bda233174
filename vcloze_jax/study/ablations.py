"""What each choice of the recipe is good for: short trainings of mini's base that differ in one of
them, each a command of train.py's, and what their adapters then do.

A run's folder is the report's, ablations/NAME: a finished one is not trained again, but its flags
must be the same. The task is one that mini never saw.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from vcloze_jax.config import MINI, UserError
from vcloze_jax.data import graph
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, to_levels
from vcloze_jax.study.page import Chapter, Figure, TextTable, list_records, tabulate_records

VARIANTS = {  # the recipe as it is, and then with one flag of another value
    "as it is": "",
    "rank 4": "--rank 4",
    "rank 16": "--rank 16",
    "all weights (rank 0)": "--rank 0",
    "loss of the whole grid": "--loss-region grid",
    "never reversed": "--reverse-masking 0",
    "shifted times": "--time-shift",
    "no text": "--caption-dropout 1",
}
STEPS, QUICK_STEPS, QUICK_VARIANTS = 100, 2, 2
TASK = graph.parse_task("gray->fluent_flat")
SHOWN = 4  # subjects of a sheet
SAYS = (
    "Mini's base, which only infills, learns `{task}` by `python train.py --data "
    "graphemoji:{spelling} --steps {steps}` and the flags of each row, from the same seed; the "
    "first row is the recipe as it is (rank {rank}, loss of the {region}, any cell blank in "
    "{reverse:.0%} of the grids, no text in {silent:.0%}, times not shifted by tokens). RMSE on "
    "held-out subjects with no sentence; `backwards` asks for the condition of the target. One run "
    "each: what differs by less than the spread over noise, or than two seeds of one recipe would, "
    "tells nothing."
)


def ablate(lab):
    """Chapter of a Lab: trains, asks, and compares. Raises UserError if a training fails."""
    names = [*VARIANTS][: QUICK_VARIANTS if lab.quick else None]
    steps = QUICK_STEPS if lab.quick else STEPS
    records, columns = [], {}
    for name in lab.bar(names, "ablations"):
        run = lab.out / "ablations" / name.replace(" ", "-")
        train_variant(shlex.split(VARIANTS[name]), steps, run)
        asker = Asker(lab._replace(painter=load_variant(run)))
        record, painted = ask_variant(asker, run)
        records.append(
            {"": name} | record | {"flags": f"`{VARIANTS[name]}`" if VARIANTS[name] else ""}
        )
        columns[name] = painted
    given, truth = (asker.truth(node) for node in (*TASK.conditions, TASK.target))
    columns = {TASK.conditions[0]: given} | columns | {"truth": truth}
    sheet = draw.label_columns({label: to_levels(x[:SHOWN]) for label, x in columns.items()})
    recipe = MINI.recipe
    says = dict(task=TASK.name, spelling=TASK.spelling, steps=steps, rank=recipe.rank)
    says |= dict(region=recipe.loss_region, reverse=recipe.reverse_masking)
    says |= dict(silent=recipe.caption_dropout)
    blocks = [
        SAYS.format(**says),
        asker.spreads,
        TextTable(tabulate_records(records)),
        Figure(sheet, f"With {DIALLED} examples, the first noise."),
    ]
    return Chapter(blocks, {"ablations": list_records(records)})


def train_variant(flags, steps, run):
    """Run train.py with these flags, in a process of its own. Raises UserError with its last line
    if it fails."""
    flags = ["--data", f"graphemoji:{TASK.spelling}", *flags, "--out", f"{run}"]
    for name in ("steps", "save-every", "preview-every"):
        flags += [f"--{name}", f"{steps}"]
    command = [sys.executable, "-m", "vcloze_jax.train", *flags]
    # On an accelerator this process holds most of the memory: the other takes what it needs.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"python train.py {shlex.join(flags)}: {said}")


def load_variant(run):
    """A Painter of what a run has learnt: an adapter for mini's base, or all weights."""
    from vcloze_jax.pipeline import load_painter
    from vcloze_jax.storage.places import MINI_FOLDER

    whole = run / "weights"
    adapters = [] if whole.is_dir() else [(run / "lora.safetensors", 1.0)]
    return load_painter(whole if whole.is_dir() else MINI_FOLDER, adapters, None)


def ask_variant(asker, run):
    """A record of a run, and what it painted from the first noise with most examples."""
    log = Path(run, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss_by_region"]["target"] for line in log]
    record = {"loss of the target, last fifth": float(np.mean(losses[-len(log) // 5 :]))}
    for count in range(DIALLED + 1):
        painted = asker.paint(TASK, asker.examples(count))
        record[f"{count} examples"] = asker.error(painted, TASK.target)
    back = asker.paint_blank(TASK, asker.examples(DIALLED), blank=(0,))[..., 0]
    return record | {"backwards": asker.error(back, TASK.conditions[0])}, painted[0]
