"""The paper's first finding: examples take the ambiguity out of a question.

A question is asked of every subject from several noises. That of the last row is the same however
many examples stand above it: what moves is the examples' doing.
"""

import numpy as np

from vcloze_jax.data.draws import ROWS
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.questions import STRIDES
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, Spread, parse_tasks, to_levels
from vcloze_jax.study.page import Chapter, Figure, Heading, TextTable

TASKS = (
    "fluent_3d->mask",
    "gray->fluent_3d",
    "mask->fluent_3d",
    "fluent_3d->gray",
    "edges->fluent_3d",
)
QUICK_TASKS = 1
COUNTS = range(len(STRIDES) + 1)
TRAINED = max(ROWS) - 1  # examples
SHOWN = 4  # subjects on a sheet
COLOURS = ("#e25822", "#2255aa", "#228833", "#aa3377", "#888888")
SAYS = (
    "RMSE of the painted cell to the truth with 0 to {most} examples (training shows {trained} at "
    "most), with and without the sentence that names the task."
)
MOVES = (
    "`moves` is how much of a picture is the noise's choice: the root of the mean variance of its "
    "pixels over the noises (its spread over subjects). It is 0 where a question has one answer, "
    "but a blur would have 0, too: read it beside the error."
)
CURVES = (
    "Dashed: with the sentence. Bars: over subjects. Grey: more than the {trained} examples of "
    "training."
)


def measure_ambiguity(lab):
    """Chapter of a Lab: a table, curves and a sheet for every task."""
    asker = Asker(lab)
    tasks = parse_tasks(TASKS, QUICK_TASKS if lab.quick else None)
    results, sheets = {}, []
    for task in tasks:
        pictures = {
            (sentence, count): asker.paint(task, asker.examples(count), sentence)
            for sentence in (False, True)
            for count in COUNTS
        }
        asked = asker.truth(task.target)
        results[task.name] = {
            place: {"error": Spread.of(rmse(p, asked)), "moves": measure_movement(p)}
            for place, p in pictures.items()
        }
        sheets += draw_sheets(asker, task, pictures)
    blocks = [
        SAYS.format(most=COUNTS[-1], trained=TRAINED),
        asker.spreads,
        MOVES,
        sum_up(results),
        Figure(draw_curves_of(results), CURVES.format(trained=TRAINED)),
        TextTable(tabulate_counts(results)),
        *sheets,
    ]
    numbers = {"subjects": asker.names, "noises": asker.noises}
    return Chapter(blocks, numbers | {"ambiguity": list_results(results)})


def sum_up(results):
    """The means over all tasks, in words."""

    def mean(sentence, count, what):
        return np.mean([found[sentence, count][what][0] for found in results.values()])

    steps = [
        f"{count}: {mean(False, count, 'error'):.3f} and {mean(False, count, 'moves'):.3f}"
        for count in COUNTS
    ]
    said = mean(True, DIALLED, "error") - mean(False, DIALLED, "error")
    return (
        f"Over all tasks, without a sentence, error and movement by number of examples are "
        f"{', '.join(steps)}; with {DIALLED} examples the sentence adds {said:+.3f} to the error."
    )


def measure_movement(pictures):
    """How far pictures [noises, N, h, w, 3] of one question lie apart: mean over subjects, and its
    deviation over them."""
    each = np.sqrt(pictures.var(0, ddof=1).mean((-3, -2, -1)))
    return float(each.mean()), float(each.std(ddof=1))


def draw_sheets(asker, task, pictures):
    """Figures of one task: subjects by number of examples; the first subjects' noises likewise."""
    given = {node: asker.truth(node) for node in task.conditions}
    asked = asker.truth(task.target)
    chosen = np.linspace(0, len(asked) - 1, SHOWN).astype(int)
    columns = given | {str(n): pictures[False, n][0] for n in COUNTS}
    columns |= {"+ words": pictures[True, DIALLED][0], "truth": asked}
    columns = {label: to_levels(x[chosen]) for label, x in columns.items()}
    one = chosen[1]
    noises = {str(n): to_levels(pictures[False, n][:, one]) for n in COUNTS}
    return [
        Heading(f"`{task.name}`"),
        Figure(
            draw.label_columns(columns),
            f"Subjects by number of examples, no sentence; and {DIALLED} examples with it.",
        ),
        Figure(draw.label_columns(noises), "The second of them: a row for each noise."),
    ]


def draw_curves_of(results):
    """Error and movement by number of examples, a colour a task, dashed with the sentence."""
    figure, panels = draw.new_figure(panels=2)
    for panel, label in zip(panels, ("RMSE to the truth", "RMS over noise"), strict=True):
        panel.axvspan(TRAINED + 0.5, COUNTS[-1] + 0.2, color="#eeeeee")
        panel.set(xlabel="examples", ylabel=label, xticks=COUNTS)
    for colour, (name, found) in zip(COLOURS, results.items(), strict=False):
        for sentence, style in ((False, "o-"), (True, "o--")):
            errors = [found[sentence, n]["error"] for n in COUNTS]
            label, bars = (None, None) if sentence else (name, [e.subjects for e in errors])
            how = dict(color=colour, markersize=3, linewidth=1)
            panels[0].errorbar(
                COUNTS, [e.mean for e in errors], bars, fmt=style, label=label, capsize=2, **how
            )
            panels[1].plot(COUNTS, [found[sentence, n]["moves"][0] for n in COUNTS], style, **how)
    panels[0].legend(fontsize=8)
    return draw.render_figure(figure)


def tabulate_counts(results):
    """Rows of the table of errors and movements by number of examples."""
    rows = [["task", "sentence", "", *map(str, COUNTS)]]
    for name, found in results.items():
        for sentence in (False, True):
            said = "yes" if sentence else "no"
            each = [found[sentence, n] for n in COUNTS]
            rows.append([f"`{name}`", said, "error", *(str(e["error"]) for e in each)])
            moves = (
                f"{mean:.3f} ({deviation:.3f})" for mean, deviation in (e["moves"] for e in each)
            )
            rows.append([f"`{name}`", said, "moves", *moves])
    return rows


def list_results(results):
    """The same numbers for a program: a record for each task, sentence and number of examples."""
    return [
        {"task": name, "sentence": sentence, "examples": count}
        | {"error": found["error"]._asdict()}
        | {"moves": dict(zip(("mean", "subjects"), found["moves"], strict=True))}
        for name, by_place in results.items()
        for (sentence, count), found in by_place.items()
    ]
