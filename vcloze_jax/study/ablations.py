"""What each choice of the recipe is good for: short trainings of mini's base that differ in one of
them, and what their adapters then do. The runs are kept in the report's ablations-STEPS."""

import json
import shlex
from pathlib import Path

import numpy as np

from vcloze_jax.config import MINI
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, name_count, to_levels
from vcloze_jax.study.page import Chapter, Figure, TextTable, list_records, tabulate_records
from vcloze_jax.study.trainings import QUICK_STEPS, TASK, train_all

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
STEPS, QUICK_VARIANTS = 100, 2
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
    runs = {name: lab.out / f"ablations-{steps}" / name.replace(" ", "-") for name in names}
    train_all({run: shlex.split(VARIANTS[name]) for name, run in runs.items()}, steps, lab.bar)
    records, columns = [], {}
    for name, run in runs.items():
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
        record[name_count(count)] = asker.error(painted, TASK.target)
    back = asker.paint_blank(TASK, asker.examples(DIALLED), blank=(0,))[..., 0]
    return record | {"backwards": asker.error(back, TASK.conditions[0])}, painted[0]
