"""Does the model read its examples? `python -m vcloze_jax.evaluate` (paper, section 4.2).

Every task is asked of the same held-out subjects from the same noise: with 0, 1 and 2 in-context
examples, with the task sentence and without, and with two examples of another task: a wrong
demonstration, once of the target most unlike the asked one and once of the most alike. RMSE and
SSIM are those of the painted cell to the truth, in [0, 1], on white.

--card README.md writes table and summary between the markers of a model card, too: no figure in it
is typed by hand.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from skimage.metrics import structural_similarity

from vcloze_jax import prompts
from vcloze_jax.config import UserError
from vcloze_jax.data import graph
from vcloze_jax.data.graphemoji import GraphEmojiGrids
from vcloze_jax.grid import Spec
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.pictures import check_file, check_writable, save_png, save_text
from vcloze_jax.pipeline import load_painter, steps_bar

TASKS = {
    "trained": (
        "edges->fluent_3d",
        "fluent_3d->mask",
        "fluent_3d->edges",
        "mask->fluent_3d",
        "gray->fluent_3d",
        "fluent_3d->gray",
        "blur->fluent_3d",
        "fluent_3d->fluent_flat",
        "fluent_flat->fluent_3d",
        "edges+blur->fluent_3d",
    ),
    "held out": tuple(task.name for task in graph.HELD_OUT_TASKS),
    "composition": tuple(task.name for task in graph.HELD_OUT_COMPOSITIONS),
}
COPYING_IS_BAD = TASKS["trained"][:5]
SHOWN = 6  # subjects on a contact sheet
STRIDES = (37, 74)  # from a subject to its examples: never a relative of it
WRONG = ("unlike", "alike")
MARKERS = ("<!-- evaluation -->", "<!-- end of evaluation -->")  # around the table in a model card


class Setting(NamedTuple):
    """How a task is asked."""

    examples: int
    sentence: bool
    wrong: str = ""  # or one of WRONG: the examples are of another task

    @property
    def name(self):
        kind = f"wrong, {self.wrong}" if self.wrong else f"{self.examples}"
        return kind + (" + sentence" if self.sentence else "")


SETTINGS = (
    *(Setting(n, sentence) for sentence in (False, True) for n in (0, 1, 2)),
    *(Setting(2, sentence=False, wrong=wrong) for wrong in WRONG),
)


def other_tasks(source, task, subjects):
    """The wrong demonstrations: trained tasks with the same conditions and another target.

    Of those the one whose target is most `unlike` the asked one (RMSE over `subjects`) and the one
    whose target is most `alike`, by these names.
    """
    others = [t for t in graph.TRAIN if t.conditions == task.conditions and t != task]
    asked = truth(source, task.target, subjects)

    def distance(other):
        return rmse(truth(source, other.target, subjects), asked).mean()

    others = sorted(others or [graph.Task(task.conditions, "mask")], key=distance)
    return {"unlike": others[-1], "alike": others[0]}


def pose_question(source, task, shown, setting, subject):
    """The grid and prompt that ask `task` of one subject, whose examples are those of `shown`."""
    examples = [(subject + step) % len(source.names) for step in STRIDES[: setting.examples]]
    nodes = [[*shown.conditions, shown.target]] * setting.examples
    nodes.append([*task.conditions, task.target])
    mask = np.zeros((len(nodes), task.columns, 1, 1), bool)
    mask[-1, -1] = True
    sample = graph.Sample(nodes, np.array([*examples, subject]), mask, "")
    layout = prompts.layout_prompt(len(nodes), task.columns)
    sentence = prompts.task_prompt([graph.NODE_PHRASES[node][0] for node in nodes[-1]])
    prompt = prompts.join(layout, sentence if setting.sentence else "")
    return source.picture(sample).grid, prompt


def truth(source, node, subjects):
    """One node of the subjects, float32 [N, 64, 64, 3] in [0, 1]."""
    return source.pictures[subjects, graph.NODES.index(node)].astype(np.float32) / 255


def rmse(a, b):
    """Root mean square error per picture."""
    return np.sqrt(np.square(a - b).mean((1, 2, 3)))


def ssim(a, b):
    """Structural similarity per picture."""
    pairs = zip(a, b, strict=True)
    return [structural_similarity(x, y, channel_axis=-1, data_range=1.0) for x, y in pairs]


def measure(painter, source, task, subjects, steps, progress):
    """One task in all settings -> (row of the table, painted cells by setting)."""
    asked, cells, row = truth(source, task.target, subjects), {}, {"settings": {}, "wrong": {}}
    others = other_tasks(source, task, subjects)
    for setting in SETTINGS:
        shown = others.get(setting.wrong, task)
        questions = [pose_question(source, task, shown, setting, subject) for subject in subjects]
        guidance = painter.preset.guidance_scale
        jobs = [
            Spec(grid, prompt, steps, guidance, i) for i, (grid, prompt) in enumerate(questions)
        ]
        painted = painter(jobs, progress)
        out = [job.grid.cut(p.pixels)[-1] for job, p in zip(jobs, painted, strict=True)]
        out = cells[setting.name] = np.stack(out).astype(np.float32) / 255
        row["settings"][setting.name] = scores(out, asked)
        if setting.wrong:
            demonstrated = truth(source, shown.target, subjects)
            row["wrong"][setting.wrong] = {
                "demonstrated": shown.name,
                "to_asked": float(rmse(out, asked).mean()),
                "to_demonstrated": float(rmse(out, demonstrated).mean()),
            }
    copies = [truth(source, node, subjects) for node in task.conditions]
    row["copy"] = min((scores(copy, asked) for copy in copies), key=lambda s: s["rmse"])
    return row, cells


def scores(out, target):
    return {"rmse": float(rmse(out, target).mean()), "ssim": float(np.mean(ssim(out, target)))}


def summarise_table(table):
    """What the table should show, as shares and a fall, each of one number."""
    trained = [row for row in table.values() if row["group"] == "trained"]
    zero, two = ([r["settings"][name]["rmse"] for r in trained] for name in ("0", "2"))
    hard = [table[name] for name in COPYING_IS_BAD]
    return {
        **{f"wrong demonstration followed, {kind}": followed(table, kind) for kind in WRONG},
        "2 examples beat 0, no sentence": share(b < a for a, b in zip(zero, two, strict=True)),
        "fall of the mean RMSE from 0 to 2": 1 - sum(two) / sum(zero),
        "output beats copying where copying is bad": share(
            row["settings"]["2"]["rmse"] < row["copy"]["rmse"] for row in hard
        ),
    }


def followed(table, kind):
    """In how many of the tasks the output is nearer to what was shown than to what was asked."""
    wrong = [row["wrong"][kind] for row in table.values()]
    return share(w["to_demonstrated"] < w["to_asked"] for w in wrong)


def share(truths):
    return float(np.mean(list(truths)))


def markdown(table, summary):
    """The table and its summary, RMSE (SSIM)."""
    names = [setting.name for setting in SETTINGS]
    lines = [
        f"| task | {' | '.join(names)} | copy |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for name, row in table.items():
        cells = [row["settings"][n] for n in names] + [row["copy"]]
        numbers = " | ".join(f"{c['rmse']:.3f} ({c['ssim']:.2f})" for c in cells)
        lines.append(f"| {name} ({row['group']}) | {numbers} |")
    lines += ["", *(f"- {key}: {value:.0%}" for key, value in summary.items())]
    return "\n".join(lines) + "\n"


def split_card(file):
    """What a model card says before and after its evaluation; the markers belong to it.

    Raises UserError if the file cannot be read, or does not hold both markers once and in order.
    """
    try:
        text = check_file(file).read_text("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--card {file}: {error}") from None
    if re.findall("|".join(MARKERS), text) != list(MARKERS):
        raise UserError(f"--card {file}: add the lines {' and '.join(MARKERS)}, each once")
    before, _, rest = text.partition(MARKERS[0])
    return before + MARKERS[0], MARKERS[1] + rest.partition(MARKERS[1])[2]


def write_card(file, table):
    """Put a table between the markers of a model card, atomically; see split_card."""
    before, after = split_card(file)
    save_text(file, f"{before}\n\n{table}\n{after}")


def contact_sheet(source, task, cells, subjects):
    """Conditions, painted cells of all settings, truth; one row per subject, uint8."""
    columns = [truth(source, node, subjects) for node in task.conditions]
    columns += [cells[setting.name] for setting in SETTINGS]
    columns.append(truth(source, task.target, subjects))
    rows = np.concatenate(columns, 2)[:SHOWN]  # N 64 columns*64 3
    return np.rint(np.concatenate(rows) * 255).astype(np.uint8)


def main(argv):
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--out", type=cli.local_folder, default=Path("evaluation"), metavar="DIR")
    parser.add_argument("--subjects", type=int, default=64, help="of the 128 held out")
    parser.add_argument("--num-inference-steps", type=int, default=12)
    parser.add_argument("--card", type=Path, metavar="FILE", help="a model card, with the markers")
    args = parser.parse_args(argv)
    if args.card:
        split_card(args.card)  # now, not after the painting
        check_writable(args.card.parent, args.card.name, "--card")
    check_writable(args.out, "table.json")

    painter = load_painter(args.weights, args.lora, args.mesh)
    source = GraphEmojiGrids("held_out")
    if not 1 <= args.subjects <= len(source.names):
        raise UserError(f"--subjects {args.subjects}: 1 to {len(source.names)} are held out")
    subjects = np.linspace(0, len(source.names) - 1, args.subjects).astype(int)
    args.out.mkdir(parents=True, exist_ok=True)
    table = {}
    for group, names in TASKS.items():
        for name in names:
            task = graph.parse_task(name)
            steps = args.num_inference_steps
            row, cells = measure(painter, source, task, subjects, steps, steps_bar)
            table[name] = {"group": group} | row
            sheet = contact_sheet(source, task, cells, subjects)
            save_png(args.out / f"{name.replace('->', '_to_')}.png", sheet)
    summary = summarise_table(table)
    text = markdown(table, summary)
    save_text(args.out / "table.md", text)
    save_text(args.out / "table.json", json.dumps({"summary": summary, "tasks": table}, indent=1))
    if args.card:
        write_card(args.card, text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
