"""All that grids of the user's own data are made of, for whoever computes on it beforehand.

A row that is shown is a sample's, its conditions in some order, and in the last row of a grid one
of its cells is blank; a prompt is worded by some of the templates. So both are numbered.
"""

import math
from collections.abc import Iterator
from contextlib import suppress

from vcloze_jax.config import UserError
from vcloze_jax.data.draws import list_blanks, list_orders, list_sentences
from vcloze_jax.data.owndata import OwnGrids, tell_of
from vcloze_jax.data.sizes import has_masks
from vcloze_jax.data.sources import Shape
from vcloze_jax.grid import Grid


def list_members(source: OwnGrids) -> list[tuple[int, Shape]]:
    """The number of every sample to learn from, and the shape of a grid of it alone."""
    return [(int(i), shape) for shape, members in source.buckets.items() for i in members]


def list_grids(source: OwnGrids, number: int, shape: Shape) -> list[Grid]:
    """Grids that have every row which is made of a sample; of one that cannot be read, none."""
    grids = []
    for read in source.try_to_read([number], shape):
        if has_masks(read.sample):
            return [Grid.from_cells(read.pixels, read.mask)]
        for order in list_orders(shape.columns, source.recipe):
            for blank in list_blanks(shape.columns, source.recipe):
                mask = read.mask.copy()
                mask[-1, blank] = True
                grids.append(Grid.from_cells(read.pixels[:, order], mask))
    return grids


def count_rows(source: OwnGrids) -> tuple[int, int]:
    """How many rows `list_grids` gives, of all samples, at most, a row that is whole and one with a
    cell blank being two, and how many image tokens these have. No picture is opened."""
    rows = tokens = 0
    for number, shape in list_members(source):
        orders = 1 if source.recipe.keep_order else math.factorial(shape.columns - 1)
        blanks = len(list_blanks(shape.columns, source.recipe))
        if not source.pairs and has_masks(source.samples[number]):
            orders = blanks = 1
        count = orders * (shape.rows + blanks)
        rows, tokens = rows + count, tokens + count * shape.tokens // shape.rows
    return rows, tokens


def list_prompts(source: OwnGrids) -> Iterator[str]:
    """All prompts that training on a source and its previews may ask for, some more than once."""
    yield from (example.prompt for example in source.held_out().previews())
    yield ""
    seen = set()
    for part in (source, source.held_out()):
        for shape in part.shapes():
            for number in part.members(shape):
                for told in list_told(part, number, shape):
                    if told not in seen:
                        seen.add(told)
                        yield from list_sentences(source.recipe, *told)


def list_told(source: OwnGrids, number: int, shape: Shape) -> Iterator[tuple]:
    """What a sample says of grids of a shape, in every order of its columns: rows and columns,
    task, content and layout."""
    with suppress(UserError):  # one that cannot be read is noted when it is drawn
        sample = source.samples[number]
        for order in list_orders(shape.columns, source.recipe):
            task, content, layout = tell_of(sample, shape, order)
            task = task if isinstance(task, str) else tuple(task)
            yield shape[:2], task, content, layout
