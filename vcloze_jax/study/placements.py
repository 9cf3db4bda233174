"""All ways to place the cells of a grid (vcloze_jax/inputs/papers.py), learnt alike: the paper's
comparison of FLUX.1-Fill with FLUX.1-dev (appendix B, Fig. 14) in miniature, and others beside.

The runs are kept in the report's placements-STEPS.
"""

import json

import numpy as np

from vcloze_jax.data import graph
from vcloze_jax.grid import PATCH
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.study import draw
from vcloze_jax.study.ablations import SHOWN, ask_variant
from vcloze_jax.study.asker import DIALLED, Asker, to_levels
from vcloze_jax.study.page import Chapter, Figure, TextTable, list_records, tabulate_records
from vcloze_jax.study.trainings import QUICK_STEPS, TASK, train_all

STEPS = 150
UNSEEN = graph.parse_task("fluent_high_contrast->fluent_3d")
SAYS = (
    "Each learns `{task}` in {steps} steps of `python train.py --placement NAME`, with the same "
    "data, seed and rank. `fill` and `anyrefill` begin with mini's base, which infills with "
    "the masked rows beside the noise; the others with mini_clean, which learnt infilling where "
    "all that is given is clean, as `dev` places it, and is smaller, mini's first edition: so the "
    "two are not to be compared with the others. RMSE on held-out subjects with no sentence; "
    "`backwards` asks for the condition of the target, `unseen` for `{unseen}`, with {dialled} "
    "examples. Noisy tokens are those of a grid with as many examples. On CPUs a step has one "
    "thread, beside another training where there is a core for it."
)


def compare_placements(lab):
    """Chapter of a Lab: trains, asks, and compares. Raises UserError if a training fails."""
    steps = QUICK_STEPS if lab.quick else STEPS
    runs = {name: lab.out / f"placements-{steps}" / name for name in PLACEMENTS}
    train_all({run: ["--placement", name] for name, run in runs.items()}, steps, lab.bar)
    records, columns = [], {}
    for name, run in runs.items():
        asker = Asker(lab._replace(painter=load_run(run)))
        record, columns[name] = ask_variant(asker, run)
        records.append({"": name} | record | ask_more(asker, PLACEMENTS[name], run))
    given, truth = (asker.truth(node) for node in (*TASK.conditions, TASK.target))
    columns = {TASK.conditions[0]: given} | columns | {"truth": truth}
    sheet = draw.label_columns({label: to_levels(x[:SHOWN]) for label, x in columns.items()})
    says = dict(task=TASK.name, steps=steps, unseen=UNSEEN.name, dialled=DIALLED)
    blocks = [
        SAYS.format(**says),
        asker.spreads,
        TextTable(tabulate_records(records)),
        Figure(sheet, f"With {DIALLED} examples, the first noise."),
    ]
    return Chapter(blocks, {"placements": list_records(records)})


def load_run(run):
    """A Painter of the adapter of a run, which says its placement."""
    from vcloze_jax.pipeline import load_painter

    return load_painter(None, [(run / "lora.safetensors", 1.0)], None)


def ask_more(asker, placement, run):
    """What else is told of a placement: a task that was never shown to it, time and tokens."""
    painted = asker.paint(UNSEEN, asker.examples(DIALLED))
    log = (run / "metrics.jsonl").read_text().splitlines()
    cells, each = (DIALLED + 1) * TASK.columns, (graph.SIZE // PATCH) ** 2
    noisy = each if any(placement.clean) else each * cells
    return {
        "unseen": asker.error(painted, UNSEEN.target),
        "seconds a step": float(np.median([json.loads(line)["seconds"] for line in log])),
        "noisy tokens": f"{noisy} of {each * cells}",
    }
