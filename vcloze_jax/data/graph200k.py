"""Graph200K as a Source: grids of the authors' task lists, over items that lie elsewhere.

data/graph200k_tasks.py says what is asked, data/graph200k_items.py where the pictures are. Each row
of a grid has a generator of its own, which draws its style, its edit and how it is spoilt; the
grid's generator draws the rest. Rules: lzyhha/VisualCloze:data/dataset.py, and data_reader.py
beside it.
"""

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from vcloze_jax.config import PRESETS, Recipe, UserError
from vcloze_jax.data.degradations import DEGRADATIONS, degrade
from vcloze_jax.data.draws import ROWS, draw_order, draw_rows, draw_sentences
from vcloze_jax.data.graph import Task
from vcloze_jax.data.graph200k_items import EDITS, STYLES, ArrowItems, JSONItems, open_items
from vcloze_jax.data.graph200k_tasks import (
    GROUP_OF,
    STYLE,
    Selection,
    draw_phrases,
    select_tasks,
)
from vcloze_jax.data.owndata import ASKED, Broken
from vcloze_jax.data.sizes import spread_evenly
from vcloze_jax.data.sources import Example, Shape, random_generator
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.cells import floor

LEAST = max(ROWS)  # so many items must be able to show a task


def needs(node: str) -> tuple[str, ...]:
    """The annotations that an item must have to show a node."""
    if node in DEGRADATIONS:
        return ("target",)
    if node in ("foreground", "background"):
        return ("target", "foreground")
    return (node.removesuffix(STYLE),)


@dataclass(frozen=True, eq=False)
class Graph200KGrids:
    """A Source: grids of R x R cells, to which every picture is stretched, as the authors do."""

    items: ArrowItems | JSONItems
    members: np.ndarray  # bool [N], those of the split
    selection: Selection
    recipe: Recipe
    broken: Broken
    reserve: "Graph200KGrids | None" = None
    masks_every_row = False

    @cached_property
    def numbers(self):
        """The items of the split: int [n]."""
        return np.flatnonzero(self.members)

    @property
    def side(self):
        """R, in whole tokens."""
        return floor(self.recipe.resolution)

    def candidates(self, task: Task) -> np.ndarray:
        """The items that have all that a task shows: int [k]."""
        names = {name for node in (*task.conditions, task.target) for name in needs(node)}
        return np.flatnonzero(np.all([self.members, *(self.items.has[n] for n in names)], axis=0))

    def can_show(self, task: Task) -> bool:
        """Whether enough items have all that it shows."""
        return len(self.candidates(task)) >= LEAST

    def digest(self) -> str:
        """Of the tasks and of what the items are known by: shards by the fingerprint that their
        writer gave them and by their sizes, a JSON file by its content; not of pictures."""
        shares = {task.name: round(share, 12) for task, share in self.selection.shares.items()}
        left_out = sorted(task.name for task in self.selection.left_out)
        what = f"{self.items.content} {self.members.sum()} {shares} {left_out} {self.side}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """Items, tasks, and how many items have which annotation."""
        held = f", {len(self.reserve.numbers)} held out" if self.reserve else ""
        lines = [f"Graph200K: {len(self.numbers)} items{held}; {len(self.selection.shares)} tasks"]
        counts = (f"{name} {there[self.members].sum()}" for name, there in self.items.has.items())
        return "\n".join([*lines, f"  {', '.join(counts)}"])

    def shape(self, rng: np.random.Generator) -> Shape:
        """What the members of a group share: the columns are those of a drawn task."""
        return Shape(draw_rows(rng), self.selection.draw(rng).columns, self.side, self.side)

    def shapes(self) -> list[Shape]:
        """All that are drawn."""
        widths = sorted({task.columns for task in self.selection.shares})
        return [Shape(rows, columns, self.side, self.side) for rows in ROWS for columns in widths]

    def count(self, shape: Shape) -> int:
        """Any item may stand in the last row."""
        return len(self.numbers)

    def held_out(self) -> "Graph200KGrids":
        """The same kind of grids of the test split, or of items that are never trained on."""
        return self.reserve or self

    def previews(self) -> list[Example]:
        """Two questions, each with 0, 1 and 2 examples."""
        examples, asked = [], replace(self.recipe, **ASKED)
        for number in range(2):
            rng = random_generator("preview", 0, number)
            task = self.selection.draw(rng)
            nodes = (*task.conditions, task.target)
            phrases = draw_phrases(rng, nodes)
            cells, content = self.draw_cells(rng, task, nodes, LEAST)
            for rows in range(1, LEAST + 1):
                prompt = draw_sentences(rng, asked, (rows, len(nodes)), phrases, content)
                examples.append(self.ask(cells[-rows:], task, len(nodes) - 1, prompt))
        return examples

    def example(self, rng: np.random.Generator, shape: Shape, queries: Iterable[int]) -> Example:
        """Draw one example of that shape. Raises UserError if too many items are broken."""
        task = self.selection.draw(rng, shape.columns)
        columns = (*task.conditions, task.target)
        nodes = tuple(columns[i] for i in draw_order(rng, shape.columns, self.recipe))
        blank = self.selection.choose_blank(rng, nodes, self.recipe)
        phrases = draw_phrases(rng, nodes)
        cells, content = self.draw_cells(rng, task, nodes, shape.rows, queries)
        prompt = draw_sentences(rng, self.recipe, shape[:2], phrases, content)
        return self.ask(cells, task, blank, prompt)

    def ask(self, cells: np.ndarray, task: Task, blank: int, prompt: str) -> Example:
        """The grid of uint8 [R, C, h, w, 3] whose last row is blank in one column."""
        mask = np.zeros((*cells.shape[:2], 1, 1), bool)
        mask[-1, blank] = True
        return Example(Grid.from_cells(cells, mask), prompt, GROUP_OF[task])

    def draw_cells(self, rng, task, nodes, rows, queries=()) -> tuple[np.ndarray, str]:
        """Cells of that many different items, uint8 [R, C, h, w, 3], and what the target of the
        last one shows.

        The last row's item is the first of `queries`, numbers in the split, that has what the task
        shows; without one, it is drawn as the others are. An item that turns out to be broken is
        drawn anew; the task stays.
        """
        left, cells = self.candidates(task), []
        asked = self.numbers[list(queries)]
        wanted = asked[np.isin(asked, left)].tolist()
        for row_rng in rng.spawn(rows)[::-1]:  # from the last row on
            while True:
                if not len(left):
                    raise UserError(f"{task.name}: no item is left that can be shown")
                item = int(wanted.pop(0) if wanted and not cells else row_rng.choice(left))
                left = left[left != item]
                try:
                    cells.append(self.show(item, nodes, row_rng))
                    break
                except UserError as error:
                    self.broken.note(item, str(error))
            if len(cells) == 1:
                content = self.items.describe(item) if task.target == "target" else ""
        return np.stack(cells[::-1]), content

    def show(self, item, nodes, rng) -> np.ndarray:
        """One row of an item: uint8 [C, h, w, 3]. Raises UserError for a picture that is broken."""
        numbers = [rng.integers(n) for n in (STYLES, EDITS)]
        pictures = [self.draw_node(item, node, numbers, rng) for node in nodes]
        side = (self.side, self.side)
        return np.stack([np.asarray(p.resize(side, Image.Resampling.LANCZOS)) for p in pictures])

    def draw_node(self, item, node, numbers, rng) -> Image.Image:
        """One cell at its own size; `numbers` say which style and which edit of the item."""
        (style, edit), open_picture = numbers, self.items.picture
        if node in DEGRADATIONS:
            return Image.fromarray(degrade(np.asarray(open_picture(item, "target")), node, rng))
        if node in ("foreground", "background"):
            target, mask = open_picture(item, "target"), open_picture(item, "foreground")
            if target.size != mask.size:
                raise UserError(f"foreground is {mask.size}, target {target.size}")
            kept = np.asarray(mask.convert("L"))[..., None] > 127
            shown = kept if node == "foreground" else ~kept
            return Image.fromarray(np.asarray(target) * shown)
        if node == "FillEdit":
            return open_picture(item, node, edit)
        if node.removesuffix(STYLE) in ("InstantStyle", "ReduxStyle"):
            number = style + STYLES if node.endswith(STYLE) else style
            return open_picture(item, node.removesuffix(STYLE), number)
        return open_picture(item, node)


def open_graph200k(part: str, recipe: Recipe) -> Graph200KGrids:
    """Grids of the tasks that `part` selects, of the items in --data-dir: of its train split, with
    its test split held out, or of that folder or file itself, of which --held-out is.

    Tells on stderr what the items lack. Raises UserError naming what is unknown or not there.
    """
    folder = recipe.data_dir
    try:
        selection = select_tasks(part)
    except ValueError as error:
        raise UserError(f"--data graph200k:{error}") from None
    if not folder:
        raise UserError("--data graph200k: --data-dir is missing; name the folder that it is in")
    items, test = open_items(Path(folder, "train")), open_items(Path(folder, "test"))
    if test is not None and recipe.held_out != PRESETS[recipe.preset].recipe.held_out:
        reason = f"the items in {folder}/test are held out"
        raise UserError(f"--held-out {recipe.held_out:g}: {reason}; leave it away")
    items = items or open_items(Path(folder))
    if items is None:
        what = "shards of save_to_disk, or the authors' data.json, in it or in its train folder"
        raise UserError(f"--data-dir {folder}: holds no Graph200K; it has {what}")
    kept = np.ones(len(items), bool)
    if test is None and recipe.held_out:
        kept[-max(round(recipe.held_out * len(items)), LEAST) :] = False
    grids = Graph200KGrids(items, kept, selection, recipe, Broken(items, {}))
    possible = selection.restrict(grids.can_show)
    tell_missing(items, [task for task in selection.shares if task not in possible.shares], folder)
    if not possible.shares:
        raise UserError(f"--data-dir {folder}: no task is left that {LEAST} items could show")
    look_at_some(items, grids.numbers)
    held = replace(grids, members=~kept)
    if test is not None:
        held = replace(held, items=test, members=np.ones(len(test), bool), broken=Broken(test, {}))
    held = replace(held, selection=possible.restrict(held.can_show))
    if held.members.any() and not held.selection.shares:
        told = "nothing held out can show these tasks: previews and their losses are of trained"
        print(f"--data-dir {folder}: {told} items", file=sys.stderr)
    return replace(grids, selection=possible, reserve=held if held.selection.shares else None)


def look_at_some(items, numbers):
    """Raise UserError where no target of some items, spread evenly, can be read, as where a list of
    paths stayed and its pictures moved."""
    there = numbers[items.has["target"][numbers]]
    for i in there[spread_evenly(len(there))]:
        try:
            items.picture(i, "target")
            return
        except UserError as error:
            reason = f"{items.name(i)}: {error}"
    if len(there):
        raise UserError(f"{reason}; nor can those of others that were tried")


def tell_missing(items, tasks, folder):
    """Say on stderr what is unlike the published data, and which tasks are left out for it."""
    lines = list(items.notes)
    if tasks:
        names = {name for t in tasks for node in (*t.conditions, t.target) for name in needs(node)}
        counts = [f"{name} ({items.has[name].sum()})" for name in sorted(names)]
        lines.append(
            f"{len(tasks)} tasks are left out, as less than {LEAST} items have all that they show: "
            f"{', '.join(task.name for task in tasks)}; items that have it: {', '.join(counts)}"
        )
    for line in lines:
        print(f"--data-dir {folder}: {line}", file=sys.stderr)
