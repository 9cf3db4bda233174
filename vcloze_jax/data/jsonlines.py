"""The user's own grids to learn from: a file with one JSON object a line."""

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from vcloze_jax import prompts
from vcloze_jax.config import UserError
from vcloze_jax.data.sources import Example
from vcloze_jax.inputs.cells import build_grid
from vcloze_jax.inputs.checks import (
    check_keys,
    check_text,
    check_type,
    error_context,
    parse_json,
    read_key,
)
from vcloze_jax.inputs.pictures import check_file, quiet_decoders
from vcloze_jax.inputs.spec import PROMPTS, open_cells, sentences

KEYS = ("image", *PROMPTS, "task")
PREVIEWS = 4


class JSONLinesGrids:
    """A Source: grids of a file, all opened now, drawn uniformly within their shapes.

    A line is a spec without numbers: `image` holds rows of paths, relative to the file, all given.
    What is to be generated is the last cell of the last row, or there what masks say. Raises
    UserError naming the line and the key.
    """

    masks_every_row = False

    def __init__(self, path, resolution, dropout=0.1):
        self.dropout = dropout
        self.groups = defaultdict(list)
        self.hash = hashlib.sha256()
        with error_context(path), quiet_decoders():
            lines = check_file(path).read_bytes().split(b"\n")
            for number, line in enumerate(lines, start=1):
                if line.strip() or number < len(lines):  # the last line may end the file
                    with error_context(f"line {number}"):
                        table = parse_line(line)
                        example = read_example(table, resolution, Path(path).parent)
                    self.groups[example.grid.shape].append(example)
                    self.hash.update(line.strip())
                    for row in example.grid.rows:
                        self.hash.update(row.pixels.tobytes() + row.mask.tobytes())
            if not self.groups:
                raise UserError("no grid in it; write one JSON object a line")

    def digest(self):
        """Of the lines and of every pixel that is learnt."""
        return self.hash.hexdigest()[:16]

    def shapes(self):
        """The sizes of the rows of all grids."""
        return list(self.groups)

    def held_out(self):
        """The same grids: a file holds none back."""
        return self

    def previews(self):
        """The first grids of the file."""
        return [example for group in self.groups.values() for example in group][:PREVIEWS]

    def shape(self, rng):
        """The sizes of the rows, which the members of a group share."""
        counts = np.array([len(examples) for examples in self.groups.values()])
        return self.shapes()[rng.choice(len(counts), p=counts / counts.sum())]

    def example(self, rng, shape):
        """Draw one example of that shape."""
        example = self.groups[shape][rng.integers(len(self.groups[shape]))]
        return example._replace(prompt="") if rng.random() < self.dropout else example


def parse_line(line):
    """The object of a line, or UserError that says what a line must be."""
    try:
        return check_type(parse_json(line), dict)
    except UserError as error:
        raise UserError(f"{error}; each line is a JSON object, a grid whole") from None


def read_example(table, resolution, folder):
    """One line's object -> Example."""
    check_keys(table, KEYS)
    table = {key: value for key, value in table.items() if value is not None}
    if "image" not in table:
        raise UserError("image: missing; give rows of pictures, the last cell is learnt")
    given = {key: read_key(table, key, None, check_text) for key in KEYS[1:]}
    _, cells = open_cells(table["image"], folder)
    for r, row in enumerate(cells):
        if None in row:
            raise UserError(f"image[{r}][{row.index(None)}]: null; to learn it, give its picture")
    if cells and cells[-1] and not any(isinstance(cell, tuple) for cell in cells[-1]):
        last = cells[-1][-1]
        cells[-1][-1] = last, np.ones((last.height, last.width), bool)
    grid = build_grid(cells, resolution)
    layout, task, content = sentences(given, grid)
    prompt = prompts.join(layout, task, prompts.content_sentence(content))
    return Example(grid, prompt, given["task"] or "")
