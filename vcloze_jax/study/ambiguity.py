"""The paper's first finding: examples take the ambiguity out of a question; and the dial: how far a
picture moves when its examples do.

A question is asked of every subject from several noises. That of the last row is the same however
many examples stand above it: what moves is the examples' doing.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from vcloze_jax.data import graph
from vcloze_jax.data.draws import ROWS
from vcloze_jax.grid import Grid, Spec
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.painter import initial_noise
from vcloze_jax.questions import STRIDES, choose_examples, paint_cells, pose_question, truth
from vcloze_jax.study import draw
from vcloze_jax.study.page import Chapter, Figure, Heading, TextTable

TASKS = (
    "fluent_3d->mask",
    "gray->fluent_3d",
    "mask->fluent_3d",
    "fluent_3d->gray",
    "edges->fluent_3d",
)
QUICK_TASKS, SUBJECTS, QUICK_SUBJECTS, NOISES, QUICK_NOISES = 3, 24, 6, 4, 2
COUNTS = range(len(STRIDES) + 1)
TRAINED = max(ROWS) - 1  # examples
DIALLED = 2  # examples, of the questions whose examples change
SHOWN = 4  # subjects on a sheet
COLOURS = ("#e25822", "#2255aa", "#228833", "#aa3377", "#888888")
SAYS = (
    "RMSE of the painted cell to the truth with 0 to {most} examples (training shows {trained} at "
    "most), for {subjects} held-out subjects from {noises} noises each: mean (spread over "
    "subjects; spread over noise). The first spread is the deviation of the subjects' means, the "
    "second the mean of the deviations that a subject has over its noises."
)
MOVES = (
    "`moves` is how much of a picture is the noise's choice: the root of the mean variance of its "
    "pixels over the noises (its spread over subjects). It is 0 where a question has one answer, "
    "but a blur would have 0, too: read it beside the error."
)
DIAL = (
    "The same questions with {dialled} examples and no sentence, asked again from the same noise "
    "with other examples: RMSE to the picture that it was, and in brackets the spreads as above. "
    "Another noise is the yardstick."
)


class Spread(NamedTuple):
    """A number, and its deviations over subjects and over noise."""

    mean: float
    subjects: float
    noise: float

    @classmethod
    def of(cls, values):
        """Of values [noises, subjects]."""
        deviation = partial(np.std, ddof=1)
        over_noise = deviation(values, axis=0).mean()
        return cls(float(values.mean()), float(deviation(values.mean(0))), float(over_noise))

    def __str__(self):
        return f"{self.mean:.3f} ({self.subjects:.3f}; {self.noise:.3f})"


class Asker:
    """Asks a Lab's model about its subjects, each from several noises."""

    def __init__(self, lab):
        count, noises = (QUICK_SUBJECTS, QUICK_NOISES) if lab.quick else (SUBJECTS, NOISES)
        self.lab, self.noises = lab, noises
        self.subjects = np.linspace(0, len(lab.source.names) - 1, count).astype(int)

    def truth(self, node):
        """A node of the subjects, float32 [N, 64, 64, 3]."""
        return truth(self.lab.source, node, self.subjects)

    def examples(self, count, first=0):
        """What is shown to each subject: `count` subjects, the first ones left out."""
        return [choose_examples(self.lab.source, s, count)[first:] for s in self.subjects]

    def paint(self, task, examples, sentence=False):
        """One picture per noise and subject, float32 [noises, N, 64, 64, 3]."""
        specs = []
        for seed in range(self.noises * len(self.subjects)):
            number = seed % len(self.subjects)
            asked = task, task, examples[number], self.subjects[number], sentence
            grid, prompt = pose_question(self.lab.source, *asked)
            specs.append(self.specify(grid, prompt, seed))
        cells = paint_cells(self.lab.painter, specs, self.lab.bar)
        return cells.reshape(self.noises, len(self.subjects), *cells.shape[1:])

    def specify(self, grid, prompt, seed):
        """The Spec of a grid whose noise is the end of that of the largest grid."""
        how = self.lab.steps, self.lab.painter.preset.guidance_scale, seed
        rows = grid.rows[:1] * (len(STRIDES) + 1)
        largest = initial_noise(Spec(Grid(rows, grid.columns), prompt, *how))
        return Spec(grid, prompt, *how, latents=largest[-grid.tokens :])


def measure_ambiguity(lab):
    """Chapter of a Lab: a table, curves and a sheet for every task; and the dial."""
    asker, tasks = Asker(lab), [*map(graph.parse_task, TASKS[: QUICK_TASKS if lab.quick else None])]
    results, dials, sheets = {}, {}, []
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
        dials[task.name] = turn_dial(asker, task, pictures)
        sheets += draw_sheets(asker, task, pictures)
    names = [str(lab.source.names[s]) for s in asker.subjects]
    says = dict(most=COUNTS[-1], trained=TRAINED, subjects=len(names), noises=asker.noises)
    blocks = [
        SAYS.format(**says),
        MOVES,
        sum_up(results),
        Figure(
            draw_curves_of(results), f"Bars: over subjects. Grey: more than {TRAINED} examples."
        ),
        TextTable(tabulate_counts(results)),
        *sheets,
        Heading("The dial"),
        DIAL.format(dialled=DIALLED),
        TextTable(tabulate_dials(dials)),
    ]
    numbers = {"subjects": names, "noises": asker.noises, "dial": to_json(dials)}
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


def turn_dial(asker, task, pictures):
    """{what is changed: Spread of the RMSE to the pictures that were}, from the same noise."""
    was = pictures[False, DIALLED]
    shown, more = asker.examples(DIALLED), asker.examples(2 * DIALLED)
    now = {
        "examples swapped": asker.paint(task, [e[::-1] for e in shown]),
        "the last replaced": asker.paint(task, [[*e[: DIALLED - 1], e[DIALLED]] for e in more]),
        "all replaced": asker.paint(task, asker.examples(2 * DIALLED, DIALLED)),
        "the first dropped": asker.paint(task, asker.examples(DIALLED, 1)),
        "all dropped": pictures[False, 0],
        "one more": pictures[False, DIALLED + 1],
        "the sentence said": pictures[True, DIALLED],
        "another noise": np.roll(was, 1, 0),
    }
    return {change: Spread.of(rmse(pictures, was)) for change, pictures in now.items()}


def draw_sheets(asker, task, pictures):
    """Figures of one task: subjects by number of examples; the first subjects' noises likewise."""
    eight = lambda x: np.rint(x * 255).astype(np.uint8)  # noqa: E731
    given = {node: asker.truth(node) for node in task.conditions}
    asked = asker.truth(task.target)
    chosen = np.linspace(0, len(asked) - 1, SHOWN).astype(int)
    columns = {name: eight(x[chosen]) for name, x in given.items()}
    columns |= {str(n): eight(pictures[False, n][0][chosen]) for n in COUNTS}
    columns |= {"+ words": eight(pictures[True, DIALLED][0][chosen]), "truth": eight(asked[chosen])}
    one = chosen[1]
    noises = {str(n): eight(pictures[False, n][:, one]) for n in COUNTS}
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


def tabulate_dials(dials):
    """Rows of the table of changes, a column a task."""
    names, changes = list(dials), list(next(iter(dials.values())))
    rows = [[change, *(str(dials[name][change]) for name in names)] for change in changes]
    return [["changed", *(f"`{name}`" for name in names)], *rows]


def list_results(results):
    """The same numbers for a program: a record for each task, sentence and number of examples."""
    return [
        {"task": name, "sentence": sentence, "examples": count}
        | {"error": found["error"]._asdict()}
        | {"moves": dict(zip(("mean", "subjects"), found["moves"], strict=True))}
        for name, by_place in results.items()
        for (sentence, count), found in by_place.items()
    ]


def to_json(dials):
    """{task: {change: Spread}} as plain tables."""
    return {n: {c: s._asdict() for c, s in changes.items()} for n, changes in dials.items()}
