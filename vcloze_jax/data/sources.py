"""Sources of grids to learn from: what one must do, where each is found, and groups drawn of it.

A new source of data is one file and one row of `SOURCES`.
"""

from collections.abc import Collection, Hashable, Iterator
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, Protocol

import numpy as np

from vcloze_jax.config import Recipe, UserError
from vcloze_jax.grid import Grid


class Example(NamedTuple):
    """A grid with its whole truth (masks say what is to be generated) and its sentence."""

    grid: Grid
    prompt: str
    kind: str = ""  # of its task, by which the loss is reported


class Source(Protocol):
    """Grids drawn at random, each a function of the generator given and of nothing else."""

    masks_every_row: bool  # else only the last row of a grid has masked pixels

    def shape(self, rng: np.random.Generator) -> Hashable:
        """Draw what the grids of a group share: two examples of one are equal in `grid.shape`,
        so that they fit one program."""

    def shapes(self) -> list[Hashable]:
        """All that `shape` may draw, so that a run knows its programs before its first step."""

    def example(self, rng: np.random.Generator, shape: Hashable) -> Example:
        """Draw one example of that shape."""

    def digest(self) -> str:
        """What a run knows the grids by, wherever they lie: another content, another digest."""

    def previews(self) -> list[Example]:
        """A few grids that are always the same; where the source knows of tasks, each question with
        0, 1 and 2 examples, its last cell blank, and all text."""

    def held_out(self) -> "Source":
        """Grids never trained on, for previews; a source that has none gives itself."""


# What --data may say -> who opens it: a function of what follows the colon, the resolution of a
# cell and the share of examples that get no text. It raises UserError at once, and is imported when
# it is called: whoever trains on files needs none of the others' libraries. None: not yet.
SOURCES = {
    "graphemoji": "vcloze_jax.data.graphemoji:open_tasks",
    "graphemoji:TASK": "vcloze_jax.data.graphemoji:open_tasks",
    "graphemoji-fill": "vcloze_jax.data.graphemoji:open_fill",
    "graph200k": None,
}
JSON_LINES = "vcloze_jax.data.jsonlines:JSONLinesGrids"  # of any other name, which is a file's


def open_source(name: str, resolution: int, dropout: float) -> Source:
    """What --data names: a row of `SOURCES`, or a JSON-lines file.

    Knows no JAX, and reads nothing big: pictures of ours wait for the first example. Raises
    UserError for a name that is neither and for a file that cannot be learnt from.
    """
    kind, colon, part = name.partition(":")
    for form, opener in SOURCES.items():
        if form.partition(":")[:2] == (kind, colon):
            if opener is None:
                raise UserError(f"--data {name}: not yet; use graphemoji or a JSON-lines file")
            return resolve_name(opener)(part, resolution, dropout)
    if not Path(name).is_file():
        known = ", ".join(form for form, opener in SOURCES.items() if opener)
        raise UserError(f"--data {name}: no such data; use {known} or a JSON-lines file")
    return resolve_name(JSON_LINES)(name, resolution, dropout)


# What a generator draws. NumPy pads seeds with zeros, so that (seed, 7) and (seed, 7, 0) would be
# one stream; as spawn keys, behind a purpose of their own, no two are.
PURPOSES = ("shape", "example", "preview", "validation")


def random_generator(purpose: str, seed: int, number: int) -> np.random.Generator:
    """The generator of one thing that is drawn: a function of its purpose, the seed, its number."""
    key = PURPOSES.index(purpose), number
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_group(
    source: Source, seed: int, number: int, size: int, drawn: Collection[int] | None = None
) -> list[Example | None]:
    """The group of that number: `size` grids of one shape, a function of (seed, number).

    Any can be asked for at any time; the shape is drawn apart from the grids, so that hosts which
    draw only some of them agree: those whose places are in `drawn` (default: all), None for others.
    A step of two groups of 8 is not measurably noisier than one of 16 grids that each had
    a shape of its own: on mini the variance of its gradient is 0.94 ± 0.04 of theirs where training
    begins, and 0.99 ± 0.01 where it ends (benchmarks/gradient_variance.py).
    """
    shape = source.shape(random_generator("shape", seed, number))
    group = [None] * size
    for place in range(size) if drawn is None else drawn:
        rng = random_generator("example", seed, number * size + place)
        group[place] = source.example(rng, shape)
    return group


def draw_groups(
    source: Source, recipe: Recipe, step: int, drawn: Collection[int] | None = None
) -> Iterator[list[Example | None]]:
    """Iterate over a run's groups after that step, made ahead in a thread; see `draw_group`."""
    import grain  # which imports JAX

    numbers = (n * recipe.batch // recipe.group for n in (step, recipe.steps))
    draw = partial(draw_group, source, recipe.seed, size=recipe.group, drawn=drawn)
    groups = grain.MapDataset.range(*numbers).map(lambda number: draw(int(number)))
    return iter(groups.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def draw_of_shape(source: Source, shape: Hashable) -> Example:
    """A grid of that shape, always the same."""
    return source.example(random_generator("preview", 0, 0), shape)


def draw_validation(source: Source, size: int, count: int) -> list[list[Example]]:
    """Groups that are always the same, of the first shapes of a source."""
    rngs = [random_generator("validation", 0, i) for i in range(size)]
    return [[source.example(rng, shape) for rng in rngs] for shape in source.shapes()[:count]]
