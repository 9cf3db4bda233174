"""The paper's Tables 1 to 3 as code: what is asked, from how many examples, and the columns.

On mini they are asked of GraphEmoji, with stand-ins for the tasks, which proves the plumbing and
nothing else; with --data-dir of Graph200K's test items, of any weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vcloze_jax.data import graph
from vcloze_jax.data.graph200k import LEAST
from vcloze_jax.data.graph200k_tasks import NAMED, PHRASES, node_type
from vcloze_jax.data.sources import random_generator
from vcloze_jax.inputs import prompts
from vcloze_jax.questions import paint_cells
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, Spread, specify, to_levels
from vcloze_jax.study.page import (
    Chapter,
    Figure,
    Heading,
    TextTable,
    list_records,
    tabulate_records,
)
from vcloze_jax.study.papermetrics import Pair, list_metrics, measure_all


class PaperTable(NamedTuple):
    """One table of the paper: rows {what it calls the task: Graph200K's task, mini's stand-in},
    and columns."""

    title: str
    tasks: dict[str, tuple[str, str]]
    metrics: tuple[str, ...]


BESIDE = ("LPIPS", "DISTS")  # not the paper's; they are to be had
TABLES = (
    PaperTable(
        "Table 1: conditional generation and restoration",
        {
            "Canny": ("canny->target", "edges->fluent_3d"),
            "Depth": ("depth->target", "distance->fluent_3d"),
            "Deblur": ("GaussianBlur->target", "blur->fluent_3d"),
        },
        (
            *("Canny F1", "depth RMSE", "RMSE", "FID", "SSIM", "MAN-IQA", "MUSIQ", "CLIP-Score"),
            *BESIDE,
        ),
    ),
    PaperTable(
        "Table 2: subject-driven generation",
        {"Subject": ("reference->target", "noto->fluent_3d")},
        ("DINOv2", "CLIP-I", "CLIP-T", *BESIDE),
    ),
    PaperTable(
        "Table 3: style transfer",
        {"Style": ("target+InstantStyle-style->InstantStyle", "fluent_3d->openmoji")},
        ("CLIP-T", "CLIP-I", *BESIDE),
    ),
)
QUICK_ROWS = 1  # of each table
SHOWN = 4  # subjects of a sheet
ON_EMOJI = (
    "The columns of the paper's tables, by number of examples, asked of held-out emoji: stand-ins "
    "for its tasks, which prove that all of it runs. No number here can be compared with the "
    "paper's: for that, every cell needs the published weights and Graph200K's test items "
    "(`--weights FLUX --lora visualcloze-384-lora.pth --data-dir GRAPH200K`). So small a picture, "
    "enlarged, has hardly an edge of the paper's Canny thresholds."
)
ON_ITEMS = (
    "The columns of the paper's tables, by number of examples, asked of the test items of "
    "Graph200K that --data-dir names. They are the paper's only with the published weights."
)
UNSAID = (
    "The paper says neither how many pictures its FID and means are of, nor at which size: all "
    "that is drawn here is in the command. A dash needs what the table of metrics names."
)


def fill_tables(lab):
    """Chapter of a Lab: the three tables, and what each metric is computed by."""
    blocks = [ON_ITEMS if lab.items else ON_EMOJI, UNSAID, Asker(lab).spreads]
    numbers, figures = {}, []
    for table in TABLES:
        records = []
        for name in [*table.tasks][: QUICK_ROWS if lab.quick else None]:
            of_items, stand_in = table.tasks[name]
            asked = ask_items(lab, of_items) if lab.items else ask_emoji(lab, stand_in)
            title = f"{name}: `{of_items if lab.items else stand_in}`"
            if asked is None:
                records.append({"task": title, "examples": f"fewer than {LEAST} items show it"})
                continue
            found, figure = fill_rows(table, title, asked, lab.judges)
            records += found
            figures.append(figure)
        blocks += [Heading(table.title), TextTable(tabulate_records(records))]
        numbers[table.title] = list_records(records)
    metrics = Heading("What each metric is computed by"), TextTable(list_metrics(lab.judges))
    return Chapter([*blocks, *metrics, *figures], numbers)


def fill_rows(table, title, asked, judges):
    """Records of one task by number of examples, and a sheet."""
    records, columns = [], {}
    for count in range(DIALLED + 1):
        painted = asked.paint(count)  # noises N h w 3
        flat, noises = painted.reshape(-1, *painted.shape[2:]), len(painted)
        pair = Pair(flat, np.concatenate([asked.truth] * noises), asked.texts * noises)
        found = measure_all(pair, table.metrics, judges)
        spreads = {name: Spread.of(x.reshape(painted.shape[:2])) for name, x in found.items()}
        place = {"task": title, "examples": count}
        records.append(place | dict.fromkeys(table.metrics, "–") | spreads)
        columns[f"{count}"] = painted[0]
    columns = {"given": asked.given, **columns, "truth": asked.truth}
    sheet = draw.label_columns({label: to_levels(x[:SHOWN]) for label, x in columns.items()})
    return records, Figure(sheet, f"{title}, by number of examples, the first noise.")


class Asked(NamedTuple):
    """A task as it is asked of some queries, of emoji or of items alike."""

    given: np.ndarray  # float32 [N, h, w, 3], the first condition
    truth: np.ndarray  # float32 [N, h, w, 3]
    texts: list[str]  # what it shows
    paint: Callable  # number of examples -> float32 [noises, N, h, w, 3]


def ask_emoji(lab, name):
    """A task of GraphEmoji."""
    asker, task = Asker(lab), graph.parse_task(name)
    paint = lambda count: asker.paint(task, asker.examples(count), sentence=True)  # noqa: E731
    return Asked(asker.truth(task.conditions[0]), asker.truth(task.target), asker.names, paint)


def ask_items(lab, name):
    """A task of Graph200K, of items that have what it shows; None if they are too few.

    A query and its examples are a function of the query alone, so that with fewer examples the last
    ones are left. All sentences are said, as the authors' sampling has them.
    """
    (task,) = NAMED[name]
    items = lab.items
    shape = Asker(lab)
    if not items.can_show(task):
        return None
    able, nodes = items.candidates(task), (*task.conditions, task.target)
    chosen = able[np.linspace(0, len(able) - 1, min(len(shape.subjects), len(able))).astype(int)]
    drawn = []
    for query in np.searchsorted(items.numbers, chosen):
        rng = random_generator("preview", 0, int(query))
        drawn.append(items.draw_cells(rng, task, nodes, DIALLED + 1, [query]))
    cells = np.stack([each for each, _ in drawn])  # N R C h w 3

    def paint(count):
        specs = []
        for seed in range(shape.noises * len(drawn)):
            rows, content = drawn[seed % len(drawn)]
            said = say_question(count + 1, nodes, content)
            grid = items.ask(rows[-count - 1 :], task, len(nodes) - 1, said).grid
            specs.append(specify(lab, grid, said, seed))
        painted = paint_cells(lab.painter, specs, lab.bar)
        return painted.reshape(shape.noises, len(drawn), *painted.shape[1:])

    first, last = (cells[:, -1, column].astype(np.float32) / 255 for column in (0, -1))
    return Asked(first, last, [items.items.describe(int(item)) for item in chosen], paint)


def say_question(rows, nodes, content):
    """The prompt of a grid of Graph200K, with the first phrase of each node."""
    task = prompts.task_prompt([PHRASES[node_type(node)][0] for node in nodes])
    content = prompts.content_sentence(content) if content else ""
    return prompts.join(prompts.layout_prompt(rows, len(nodes)), task, content)
