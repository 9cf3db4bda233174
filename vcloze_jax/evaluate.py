"""Does the model read its examples? `python -m vcloze_jax.evaluate` (paper, section 4.2).

Every task is asked of the same held-out subjects from the same seeds: with 0, 1 and 2 in-context
examples, with the task sentence and without, and with two examples of another task: a wrong
demonstration, once of the target most unlike the asked one and once of the most alike.

RMSE and SSIM are those of the painted cell to the truth, in [0, 1], on white. Content: among the
true pictures of all held-out subjects the nearest is the asked subject's; kind: among the true
pictures of all its nodes the nearest is the asked one, or one as good (ONE_KIND); edge F1, where
edges are asked: of pixels that may be one off. The same of pictures that need no model: chance, the
mean picture of the trained subjects, the best condition, the truth through the autoencoder.

--data PAIRS asks what is held out of data of your own, and draws a sheet (evaluate_own.py).

--card README.md writes table and summary between the markers of a model card, too, and a sheet of
all tasks beside it: no figure in it is typed by hand, and no picture chosen.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vcloze_jax import conditioning
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data import graph
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.evaluate_own import add_own_flags, check_flags, evaluate_own
from vcloze_jax.grid import Spec
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.card import format_table, split_card, write_card
from vcloze_jax.inputs.measures import edge_f1, hits, rmse, ssim
from vcloze_jax.inputs.pictures import check_writable, save_png, save_text
from vcloze_jax.inputs.sheet import label_cells, stack_sheets
from vcloze_jax.pipeline import load_painter, steps_bar
from vcloze_jax.questions import choose_examples, paint_cells, pose_question, truth

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
SHOWN = 6  # subjects on a task's contact sheet
BESIDE = 3  # at most, spread evenly, on the sheet of all tasks
SHEET = "evaluation.png"  # of all tasks, beside the card, too
WRONG = ("unlike", "alike")
# Nodes that show the subject as it is drawn in 3D, more or less well, count as one.
ONE_KIND = "fluent_3d", "fluent_color", "blur", "low_resolution", "noise", "hole", "palette"
MEASURES = {"rmse": "RMSE", "ssim": "SSIM", "content": "content", "kind": "kind", "f1": "edge F1"}
PAINTERS = ("chance", "mean picture", "copy", "2", "autoencoder")  # rows of the means
LABELS = {"2": "**the model**"}  # with 2 examples and no sentence


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


def ask(source, task, shown, setting, subject):
    """The grid and prompt of one subject in a Setting, whose examples are those of `shown`."""
    examples = choose_examples(source, subject, setting.examples)
    return pose_question(source, task, shown, examples, subject, setting.sentence)


def measure(painter, source, task, subjects, steps, progress):
    """One task in all settings -> (row of the table, painted cells by setting)."""
    asked = truth(source, task.target, subjects)
    cells = {}
    row = {"settings": {}, "wrong": {}}
    others = other_tasks(source, task, subjects)
    for setting in SETTINGS:
        shown = others.get(setting.wrong, task)
        questions = [ask(source, task, shown, setting, subject) for subject in subjects]
        out = cells[setting.name] = paint(painter, questions, steps, progress)
        row["settings"][setting.name] = scores(source, task, subjects, out)
        if setting.wrong:
            demonstrated = truth(source, shown.target, subjects)
            row["wrong"][setting.wrong] = {
                "demonstrated": shown.name,
                "to_asked": float(rmse(out, asked).mean()),
                "to_demonstrated": float(rmse(out, demonstrated).mean()),
            }
    return row | compare(painter, source, task, subjects), cells


def paint(painter, questions, steps, progress):
    """Questions (grid, prompt), each with the noise of its number -> their last cells as painted,
    float32 [N, 64, 64, 3] in [0, 1]."""
    guidance = painter.preset.guidance_scale
    specs = [Spec(grid, prompt, steps, guidance, i) for i, (grid, prompt) in enumerate(questions)]
    return paint_cells(painter, specs, progress)


def reconstruct(painter, rows):
    """What the autoencoder makes of query rows, uint8 [h, W, 3] each, with nothing hidden."""
    vae, out = painter.models.vae, []
    for pixels in rows:
        h, w, _ = pixels.shape
        latents = painter.encode_picture(vae, pixels[None])
        decoded = painter.decode_row(vae, latents, (h // 8, w // 8))
        out.append(conditioning.to_pixels(decoded[0]))
    return out


def scores(source, task, subjects, out):
    """Means of all measures over cells [N, 64, 64, 3] that were painted of a task."""
    asked = truth(source, task.target, subjects)
    everyone = np.arange(len(source.names))
    others = truth(source, task.target, everyone)[None]  # 1 128 64 64 3
    nodes = source.pictures[subjects].astype(np.float32) / 255  # N 17 64 64 3
    values = {
        "rmse": rmse(out, asked),
        "ssim": ssim(out, asked),
        "content": hits(out, others, everyone == np.asarray(subjects)[:, None]),
        "kind": hits(out, nodes, find_alike(task.target)),
    }
    if task.target == "edges":
        values["f1"] = edge_f1(out, asked)
    return {name: float(np.mean(value)) for name, value in values.items()}


def find_alike(target):
    """Which of the nodes count as the target, bool [17]."""
    return np.array([n == target or {n, target} <= {*ONE_KIND} for n in graph.NODES])


def compare(painter, source, task, subjects):
    """Scores of what needs no model: {"chance", "mean picture", "copy", "autoencoder": scores}."""
    asked = truth(source, task.target, subjects)
    copies = [truth(source, node, subjects) for node in task.conditions]
    mean = truth(open_tasks("", MINI.recipe), task.target, slice(None)).mean(0)
    grids = [pose_question(source, task, task, (), subject)[0] for subject in subjects]
    rows = reconstruct(painter, [grid.query.pixels for grid in grids])
    cells = [grid.split(row)[-1] for grid, row in zip(grids, rows, strict=True)]
    pictures = {
        "mean picture": np.broadcast_to(mean, asked.shape),
        "copy": min(copies, key=lambda copy: rmse(copy, asked).mean()),
        "autoencoder": np.stack(cells).astype(np.float32) / 255,
    }
    found = {name: scores(source, task, subjects, out) for name, out in pictures.items()}
    chance = {"content": 1 / len(source.names), "kind": float(find_alike(task.target).mean())}
    return {"chance": chance} | found


def summarise_table(table):
    """What the table should show, as shares and a fall, each of one number."""
    trained = [row for row in table.values() if row["group"] == "trained"]
    zero, two = ([r["settings"][name]["rmse"] for r in trained] for name in ("0", "2"))
    hard = [row for row in table.values() if row["copy"]["rmse"] >= row["mean picture"]["rmse"]]
    return {
        **{f"wrong demonstration followed, {kind}": followed(table, kind) for kind in WRONG},
        "2 examples beat 0 on trained tasks": share(b < a for a, b in zip(zero, two, strict=True)),
        "fall of their mean RMSE from 0 to 2": 1 - sum(two) / sum(zero),
        "output beats copying where the mean picture does": share(
            row["settings"]["2"]["rmse"] < row["copy"]["rmse"] for row in hard
        ),
        **{
            f"output is no worse than the {who}": share(
                row["settings"]["2"]["rmse"] <= row[who]["rmse"] for row in table.values()
            )
            for who in ("copy", "mean picture")
        },
    }


def followed(table, kind):
    """In how many of the tasks the output is nearer to what was shown than to what was asked."""
    wrong = [row["wrong"][kind] for row in table.values()]
    return share(w["to_demonstrated"] < w["to_asked"] for w in wrong)


def share(truths):
    return float(np.mean(list(truths)))


def markdown(table, summary):
    """All tables and the summary: RMSE (SSIM) in all settings; all measures with two examples and
    no sentence, by task; their means, beside what needs no model."""
    names = [setting.name for setting in SETTINGS]
    rows = [["task", *names, "copy"]]
    for name, row in table.items():
        cells = [row["settings"][n] for n in names] + [row["copy"]]
        numbers = (f"{c['rmse']:.3f} ({c['ssim']:.2f})" for c in cells)
        rows.append([f"{name} ({row['group']})", *numbers])
    by_task = [["2 examples, no sentence", *MEASURES.values()]]
    by_task += [[name, *show_scores(row["settings"]["2"])] for name, row in table.items()]
    means = [["means", "painted by", *MEASURES.values()]]
    for group in TASKS:
        for painter in PAINTERS:
            found = [who | who["settings"] for who in table.values() if who["group"] == group]
            each = [row[painter] for row in found]
            means.append([group, LABELS.get(painter, painter), *show_scores(average(each))])
    tables = "\n\n".join(map(format_table, (rows, by_task, means)))
    shares = "".join(f"- {key}: {value:.0%}\n" for key, value in summary.items())
    return f"{tables}\n\n{shares}\n![Queries, what is painted of them, and the truth]({SHEET})\n"


def average(each):
    """Means of some scores, over those that have a measure."""
    found = {name: [scores[name] for scores in each if name in scores] for name in MEASURES}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def show_scores(found):
    """Scores as cells of a table, in the order of MEASURES."""
    digits = {"rmse": 3}
    return [f"{found[n]:.{digits.get(n, 2)}f}" if n in found else "–" for n in MEASURES]


def contact_sheet(source, task, cells, subjects):
    """Conditions, painted cells of all settings, truth; one row per subject, uint8."""
    columns = [truth(source, node, subjects) for node in task.conditions]
    columns += [cells[setting.name] for setting in SETTINGS]
    columns.append(truth(source, task.target, subjects))
    rows = np.concatenate(columns, 2)[:SHOWN]  # N 64 columns*64 3
    return np.rint(np.concatenate(rows) * 255).astype(np.uint8)


def draw_strip(source, task, painted, subjects):
    """Of a few subjects the query, what was painted of it, and the truth, side by side."""
    strip, step = [], -(-len(subjects) // BESIDE)
    for subject, cell in zip(subjects[::step], painted[::step], strict=True):
        true = {node: truth(source, node, [subject])[0] for node in (*task.conditions, task.target)}
        strip += [(node, true[node]) for node in task.conditions]
        strip += [("painted", cell), (task.target, true[task.target])]
    return label_cells([(label, np.rint(cell * 255).astype(np.uint8)) for label, cell in strip])


def main(argv):
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--out", type=cli.path, default=Path("evaluation"), metavar="DIR")
    parser.add_argument("--subjects", type=int, default=64, help="of the 128 held out, at most")
    parser.add_argument("--num-inference-steps", type=cli.positive_int, default=12)
    parser.add_argument(
        "--card", type=cli.path, metavar="FILE", help="a model card, with the markers"
    )
    add_own_flags(parser)
    args = parser.parse_args(argv)
    check_writable(args.out, "table.json")
    check_flags(args)
    if args.data is not None:
        return evaluate_own(args)
    if args.card:
        split_card(args.card)  # now, not after the painting
        for name in (args.card.name, SHEET):
            check_writable(args.card.parent, name, "--card")

    source = open_tasks("", MINI.recipe).held_out()
    if not 1 <= args.subjects <= len(source.names):
        raise UserError(f"--subjects {args.subjects}: 1 to {len(source.names)} are held out")
    painter = load_painter(cli.fetch_weights(args), args.lora, args.mesh)
    subjects = np.linspace(0, len(source.names) - 1, args.subjects).astype(int)
    args.out.mkdir(parents=True, exist_ok=True)
    table, strips = {}, []
    for group, names in TASKS.items():
        for name in names:
            task = graph.parse_task(name)
            steps = args.num_inference_steps
            row, cells = measure(painter, source, task, subjects, steps, steps_bar)
            table[name] = {"group": group} | row
            sheet = contact_sheet(source, task, cells, subjects)
            save_png(args.out / f"{name.replace('->', '_to_')}.png", sheet)
            strips.append(draw_strip(source, task, cells["2"], subjects))
    summary = summarise_table(table)
    text = markdown(table, summary)
    save_text(args.out / "table.md", text)
    save_text(args.out / "table.json", json.dumps({"summary": summary, "tasks": table}, indent=1))
    save_png(args.out / SHEET, stack_sheets(strips))
    if args.card:
        save_png(args.card.parent / SHEET, stack_sheets(strips))
        write_card(args.card, text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
