"""The user's own grids to learn from: a file with one JSON object a line. Knows no JAX."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vcloze_jax import prompts
from vcloze_jax.config import UserError
from vcloze_jax.grid import Grid, build_grid
from vcloze_jax.inputs import checks
from vcloze_jax.inputs.checks import named
from vcloze_jax.inputs.pictures import check_file, quiet_decoders
from vcloze_jax.inputs.spec import PROMPTS, open_cells, parse, sentences

KEYS = ("image", *PROMPTS, "task")


class Example(NamedTuple):
    """A grid with its whole truth (`mask` says what is to be generated) and its sentence."""

    grid: Grid
    prompt: str


class JSONLinesGrids:
    """Grids of a file, all opened now, drawn uniformly within their shapes.

    A line is a spec without numbers: `image` holds rows of paths, relative to the file, all given.
    What is to be generated is the last cell of the last row, or there what masks say. Raises
    UserError naming the line and the key.
    """

    def __init__(self, path, resolution, dropout=0.1):
        self.dropout = dropout
        self.groups = defaultdict(list)
        with named(path), quiet_decoders():
            lines = check_file(path).read_bytes().split(b"\n")
            for number, line in enumerate(lines, start=1):
                if line.strip() or number < len(lines):  # the last line may end the file
                    with named(f"line {number}"):
                        example = read_example(parse(line), resolution, Path(path).parent)
                    self.groups[example.grid.shape].append(example)
            if not self.groups:
                raise UserError("no grid in it; write one JSON object a line")
        self.shapes = list(self.groups)

    def shape(self, rng):
        """What the elements of a micro-batch share: the sizes of their rows."""
        counts = np.array([len(self.groups[shape]) for shape in self.shapes])
        return self.shapes[rng.choice(len(counts), p=counts / counts.sum())]

    def example(self, rng, shape):
        """Draw one example of that shape."""
        grid, prompt = self.groups[shape][rng.integers(len(self.groups[shape]))]
        return Example(grid, "" if rng.random() < self.dropout else prompt)


def open_own(name, preset):
    """The file that `--data` names, opened; None where it names data of ours. Raises UserError."""
    if name.partition(":")[0] == "graphemoji" or name in ("graphemoji-fill", "graph200k"):
        return None
    if not Path(name).is_file():
        raise UserError(
            f"--data {name}: no such data; use graphemoji, graphemoji:TASK, graphemoji-fill "
            "or a JSON-lines file"
        )
    return JSONLinesGrids(name, preset.resolution, preset.recipe.caption_dropout)


def read_example(table, resolution, folder):
    """One line's object -> Example."""
    checks.keys(checks.typed(table, dict), KEYS)
    table = {key: value for key, value in table.items() if value is not None}
    if "image" not in table:
        raise UserError("image: missing; give rows of pictures, the last cell is learnt")
    given = {key: checks.take(table, key, None, checks.text) for key in KEYS[1:]}
    _, cells = open_cells(table["image"], folder)
    for r, row in enumerate(cells):
        if None in row:
            raise UserError(f"image[{r}][{row.index(None)}]: null; to learn it, give its picture")
    if cells and cells[-1] and not any(isinstance(cell, tuple) for cell in cells[-1]):
        last = cells[-1][-1]
        cells[-1][-1] = last, np.ones((last.height, last.width), bool)
    grid = build_grid(cells, resolution)
    layout, task, content = sentences(given, grid)
    return Example(grid, prompts.join(layout, task, prompts.content_sentence(content)))
