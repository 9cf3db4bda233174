"""(seed, step) -> one micro-batch of grids. Stateless: any step can be asked for at any time.

All pictures are derived once into one array; an element of a batch is a lookup, so that a large
accelerator is not starved. A micro-batch shares one shape, drawn from (seed, step) alone, so that
all hosts agree.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from vcloze_jax import prompts
from vcloze_jax.config import UserError
from vcloze_jax.data import graph
from vcloze_jax.data.conditions import NODES, nodes
from vcloze_jax.data.graphemoji import SIZE, load
from vcloze_jax.grid import Grid, build_grid
from vcloze_jax.images import open_picture


class Example(NamedTuple):
    """A grid with its whole truth (`mask` says what is to be generated) and its sentence."""

    grid: Grid
    prompt: str


class GraphEmojiGrids:
    """Grids of the task graph, of one of its tasks, or (fill) of unrelated pictures."""

    def __init__(self, split="train", task=None, fill=False, dropout=0.1):
        subjects = load(split)
        self.names = subjects.names
        self.pictures = nodes(subjects)  # uint8 [subject, node, 64, 64, 3]
        self.dropout, self.fill = dropout, fill
        self.tasks = {task: 1.0} if task else graph.TRAIN

    def shape(self, rng):
        """What the elements of a micro-batch share: (rows, columns)."""
        return graph.draw_fill_shape(rng) if self.fill else graph.draw_shape(rng, self.tasks)

    def example(self, rng, shape):
        """Draw one example of that shape."""
        args = (rng, *shape, self.names, SIZE, self.dropout)
        sample = graph.draw_fill(*args) if self.fill else graph.draw_sample(*args, self.tasks)
        return self.picture(sample)

    def picture(self, sample):
        """Look the sample's cells up."""
        subjects = sample.subjects.reshape(len(sample.nodes), -1)  # R 1 or R C
        columns = [[NODES.index(node) for node in row] for row in sample.nodes]
        return Example(
            Grid.from_cells(self.pictures[subjects, columns], sample.mask), sample.prompt
        )


class JSONLinesGrids:
    """The user's own grids, one JSON object a line, drawn uniformly within their shapes.

    `image`: rows of paths, all given, relative to the file; the last cell of the last row is the
    target. `task_prompt`, `content_prompt`, `layout_prompt`: as in a spec, all optional.
    """

    def __init__(self, path, resolution, dropout=0.1):
        self.dropout = dropout
        self.groups = defaultdict(list)
        for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
            try:
                record = json.loads(line)
                unknown = set(record) - {"image", "task_prompt", "content_prompt", "layout_prompt"}
                if unknown or not record["image"]:
                    raise KeyError(*unknown or ["image"])
                example = self._read(record, Path(path).parent, resolution)
            except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
                raise UserError(f"{path}: line {number}: {error}; expected image: [[…]]") from None
            self.groups[example.grid.shape].append(example)
        if not self.groups:
            raise UserError(f"{path}: no grid in it; write one JSON object a line")
        self.shapes = list(self.groups)

    def _read(self, record, folder, resolution):
        pictures = [[open_picture(folder / cell) for cell in row] for row in record["image"]]
        query = pictures[-1][-1]
        pictures[-1][-1] = (query, np.ones((query.height, query.width), bool))
        grid = build_grid(pictures, resolution)
        layout = prompts.layout_prompt(len(pictures), len(pictures[0]))
        prompt = prompts.join(
            record.get("layout_prompt", layout),
            record.get("task_prompt") or "",
            prompts.content_sentence(record.get("content_prompt") or ""),
        )
        return Example(grid, prompt)

    def shape(self, rng):
        counts = np.array([len(self.groups[shape]) for shape in self.shapes])
        return self.shapes[rng.choice(len(counts), p=counts / counts.sum())]

    def example(self, rng, shape):
        grid, prompt = self.groups[shape][rng.integers(len(self.groups[shape]))]
        return Example(grid, "" if rng.random() < self.dropout else prompt)


def open_data(name, preset, split="train"):
    """What `--data` names. Raises UserError for a name or file that is not there."""
    dropout = preset.flow.caption_dropout
    kind, _, task = name.partition(":")
    if name == "graph200k":
        raise UserError("--data graph200k: not yet; use graphemoji or a JSON-lines file")
    if name == "graphemoji-fill":
        return GraphEmojiGrids(split, fill=True, dropout=dropout)
    if kind == "graphemoji":
        try:
            return GraphEmojiGrids(split, graph.parse_task(task) if task else None, dropout=dropout)
        except ValueError as error:
            raise UserError(f"--data {error}") from None
    if not Path(name).is_file():
        raise UserError(
            f"--data {name}: no such data; use graphemoji, graphemoji:TASK, graphemoji-fill "
            "or a JSON-lines file"
        )
    return JSONLinesGrids(name, preset.resolution, dropout)


def micro_batch(source, seed, index, size):
    """The micro-batch of that number: `size` examples of one shape, a function of (seed, index)."""
    shape = source.shape(np.random.default_rng((seed, index)))
    return [source.example(np.random.default_rng((seed, index, i)), shape) for i in range(size)]


def micro_batches(source, seed, size, start, stop):
    """Iterate over the micro-batches start … stop - 1, made ahead in a thread."""
    numbers = grain.MapDataset.range(start, stop)
    batches = numbers.map(lambda index: micro_batch(source, seed, int(index), size))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
