"""Sources of grids to learn from: what one must do, where each is found, and groups drawn of it.

A new source of data is one file and one row of `SOURCES`.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, Protocol

import numpy as np

from vcloze_jax.config import PRESETS, Recipe, UserError
from vcloze_jax.grid import PATCH, Grid
from vcloze_jax.inputs.checks import explain_missing, flag


class Example(NamedTuple):
    """A grid with its whole truth (masks say what is to be generated) and its sentence."""

    grid: Grid
    prompt: str
    kind: str = ""  # of its task, by which the loss is reported


class Shape(NamedTuple):
    """What the grids of a group share, so that they fit one program: their cells are all equal."""

    rows: int
    columns: int
    height: int  # of a cell
    width: int

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every row, as `grid.shape` has them."""
        return ((self.height, self.width * self.columns),) * self.rows

    @property
    def tokens(self) -> int:
        """Image tokens of such a grid."""
        return self.rows * self.columns * self.height * self.width // PATCH**2


class Source(Protocol):
    """Grids by random access: each is a function of the arguments and of nothing else, and its
    pictures are opened when it is asked for, by any number of threads at once."""

    masks_every_row: bool  # else only the last row of a grid has masked pixels

    def shape(self, rng: np.random.Generator) -> Shape:
        """Draw what the grids of a group share."""

    def shapes(self) -> list[Shape]:
        """All that `shape` may draw, so that a run knows its programs before its first step."""

    def count(self, shape: Shape) -> int:
        """How many last rows grids of that shape may have."""

    def example(self, rng: np.random.Generator, shape: Shape, queries: Iterable[int]) -> Example:
        """Draw one example of that shape. Its last row has the first of some numbers below `count`
        that can be shown; no other grid of the group is given these. Raises UserError where none
        can."""

    def digest(self) -> str:
        """What a run knows the grids by, wherever they lie: another content, another digest."""

    def summary(self) -> str:
        """What is there, in one line or a few, for people."""

    def previews(self) -> list[Example]:
        """A few grids that are always the same; where the source knows of tasks, each question with
        0, 1 and 2 examples, its last cell blank, and all text."""

    def held_out(self) -> "Source":
        """Grids never trained on, for previews; a source that has none gives itself."""


# What --data may say -> who opens it: a function of what follows the colon and of the recipe, all
# of whose data settings but those IGNORED it obeys. It raises UserError at once, and is imported
# when it is called: whoever trains on files needs none of the others' libraries.
SOURCES = {
    "graphemoji": "vcloze_jax.data.graphemoji:open_tasks",
    "graphemoji:TASK": "vcloze_jax.data.graphemoji:open_tasks",
    "graphemoji-fill": "vcloze_jax.data.graphemoji:open_fill",
    "graph200k": "vcloze_jax.data.graph200k:open_graph200k",
    "graph200k:TASKS": "vcloze_jax.data.graph200k:open_graph200k",
}
OWN = "vcloze_jax.data.owndata:open_own"  # of any other name: a file, or a folder of pairs
IGNORED = {  # settings that mean nothing to a source, so that others than the preset's are refused
    "graphemoji": ("held_out",),
    "graphemoji-fill": (
        "held_out",
        "reverse_masking",
        "reverse_held_out",
        "keep_order",
        "task_sentence",
        "content_sentence",
    ),
    OWN: ("reverse_held_out",),
}


def is_own(data: str) -> bool:
    """Whether that is the name of the user's own file or folder, and none of `SOURCES`."""
    return data.partition(":")[:2] not in {form.partition(":")[:2] for form in SOURCES}


def open_source(recipe: Recipe) -> Source:
    """What --data names: a row of `SOURCES`, or the user's own file or folder.

    Knows no JAX, and reads nothing big: pictures wait for the first example. Raises UserError for
    a name that is neither and for what cannot be learnt from.
    """
    kind, colon, part = recipe.data.partition(":")
    if recipe.data_dir and kind != "graph200k":
        raise UserError(f"--data-dir {recipe.data_dir}: only graph200k lies in one; leave it out")
    for name in IGNORED.get(OWN if is_own(recipe.data) else kind, ()):
        if getattr(recipe, name) != getattr(PRESETS[recipe.preset].recipe, name):
            raise UserError(f"{flag(name)}: means nothing to --data {recipe.data}; leave it away")
    for form, opener in SOURCES.items():
        if form.partition(":")[:2] == (kind, colon):
            return resolve_name(opener)(part, recipe)
    if not recipe.data or not Path(recipe.data).exists():
        known = f"use {', '.join(SOURCES)}, a JSON-lines file or a folder of pairs"
        remedy = recipe.data and explain_absent(recipe.data)
        raise UserError(f"--data {recipe.data}: no such data; {remedy or known}")
    return resolve_name(OWN)(recipe.data, recipe)


def explain_absent(data: str) -> str:
    """What helps where data are not there that seem to be elsewhere; "" where nothing tells."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data) and not FILE.search(data)
    if named and not Path(data).parent.exists():
        fetch = f"hf download {data} --repo-type dataset --local-dir {Path(data).name}"
        return f"of Hugging Face they are fetched first: {fetch}"
    return explain_missing(data)


# What a generator draws. NumPy pads seeds with zeros, so that (seed, 7) and (seed, 7, 0) would be
# one stream; as spawn keys, behind a purpose of their own, no two are.
DRAW_PURPOSES = ("shape", "example", "preview", "validation")
FILE = re.compile(r"\.(jsonl?|csv|tsv)$", re.IGNORECASE)  # how no dataset's name ends
SPARE = 64  # numbers that a grid of a group may try, should the first not be one to show


def random_generator(purpose: str, seed: int, number: int) -> np.random.Generator:
    """The generator of one thing that is drawn: a function of its purpose, the seed, its number."""
    key = DRAW_PURPOSES.index(purpose), number
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def deal(rng: np.random.Generator, count: int, size: int) -> list[np.ndarray]:
    """For each grid of a group of `size`, numbers below `count` to ask for its last row: int [k],
    k at most `SPARE`. No two grids get the same one first, but where `count` is less than `size`:
    then each number comes again as late as can be. Only who has tried all of his own tries those
    of others."""
    numbers = rng.choice(count, min(count, SPARE * size), replace=False)
    numbers = np.resize(numbers, max(len(numbers), size))  # repeats them
    places = (np.arange(len(numbers)) - i for i in range(size))
    return [numbers[np.argsort(place % size, kind="stable")][:SPARE] for place in places]


def draw_group(
    source: Source, seed: int, number: int, size: int, drawn: Collection[int] | None = None
) -> list[Example | None]:
    """The group of that number: `size` different grids of one shape, a function of (seed, number).

    Any can be asked for at any time; shape and last rows are drawn apart from the grids, so that
    hosts agree which draw only some of them: those whose places are in `drawn` (default: all), None
    for others. A step of two groups of 8 is not measurably noisier than one of 16 grids that
    each had a shape of its own: on mini the variance of its gradient is 0.94 ± 0.04 of theirs where
    training begins, and 0.99 ± 0.01 where it ends (benchmarks/gradient_variance.py).
    """
    rng = random_generator("shape", seed, number)
    shape = source.shape(rng)
    queries, group = deal(rng, source.count(shape), size), [None] * size
    for place in range(size) if drawn is None else drawn:
        rng = random_generator("example", seed, number * size + place)
        group[place] = source.example(rng, shape, queries[place])
    return group


def draw_groups(
    source: Source, recipe: Recipe, start: int, stop: int, drawn: Collection[int] | None = None
) -> Iterator[list[Example | None]]:
    """Iterate over the groups start … stop - 1 of a run (`draw_group`), made ahead in threads."""
    import grain  # which imports JAX

    draw = partial(draw_group, source, recipe.seed, size=recipe.group, drawn=drawn)
    groups = grain.MapDataset.range(start, stop).map(lambda number: draw(int(number)))
    ahead = max(4, recipe.threads)
    options = grain.ReadOptions(num_threads=recipe.threads, prefetch_buffer_size=ahead)
    return iter(groups.to_iter_dataset(options))


def draw_of_shape(source: Source, shape: Shape) -> Example:
    """A grid of that shape, always the same."""
    return draw_fixed(source, shape, "preview", 0, 1)[0]


def draw_validation(source: Source, size: int, count: int) -> list[list[Example]]:
    """Groups that are always the same, of a source's first shape, with more rows than that where
    it has such: with examples, that is."""
    first, *others = source.shapes()
    alike = sorted(others, key=lambda shape: shape[1:] != first[1:])  # but for the rows
    shapes = enumerate([first, *alike][:count])
    return [draw_fixed(source, shape, "validation", i, size) for i, shape in shapes]


def draw_fixed(source: Source, shape: Shape, purpose: str, number: int, size: int) -> list[Example]:
    """`size` different grids of that shape, by what they are for alone."""
    rng = random_generator(purpose, 0, number)
    queries = deal(rng, source.count(shape), size)
    return [source.example(rng, shape, q) for q in queries]
