"""Sources of grids to learn from: what one must do, where each is found, and micro-batches of it.

A new source of data is one file and one row of `SOURCES`.
"""

from collections.abc import Hashable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, Protocol

import numpy as np

from vcloze_jax.config import UserError
from vcloze_jax.grid import Grid


class Example(NamedTuple):
    """A grid with its whole truth (masks say what is to be generated) and its sentence."""

    grid: Grid
    prompt: str


class Source(Protocol):
    """Grids drawn at random, each a function of the generator given and of nothing else."""

    masks_every_row: bool  # else only the last row of a grid has masked pixels

    def shape(self, rng: np.random.Generator) -> Hashable:
        """Draw what the grids of a micro-batch share: two examples of one are equal in
        `grid.shape`, so that they fit one program."""

    def example(self, rng: np.random.Generator, shape: Hashable) -> Example:
        """Draw one example of that shape."""

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


def micro_batch(source: Source, seed: int, index: int, size: int) -> list[Example]:
    """The micro-batch of that number: `size` examples of one shape, a function of (seed, index).

    Any can be asked for at any time; the shape is drawn from (seed, index) alone, so that all hosts
    agree.
    """
    shape = source.shape(np.random.default_rng((seed, index)))
    return [source.example(np.random.default_rng((seed, index, i)), shape) for i in range(size)]


def micro_batches(
    source: Source, seed: int, size: int, start: int, stop: int
) -> Iterator[list[Example]]:
    """Iterate over the micro-batches start … stop - 1, made ahead in a thread."""
    import grain  # which imports JAX

    numbers = grain.MapDataset.range(start, stop)
    batches = numbers.map(lambda index: micro_batch(source, seed, int(index), size))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
