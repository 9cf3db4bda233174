"""(seed, step) -> one micro-batch of grids. Stateless: any step can be asked for at any time.

All pictures are derived once into one array; an element of a batch is a lookup, so that a large
accelerator is not starved. A micro-batch shares one shape, drawn from (seed, step) alone, so that
all hosts agree.
"""

import grain
import numpy as np

from vcloze_jax.config import UserError
from vcloze_jax.data import graph
from vcloze_jax.data.conditions import NODES, nodes
from vcloze_jax.data.graphemoji import SIZE, load
from vcloze_jax.data.jsonlines import Example, open_own
from vcloze_jax.grid import Grid


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


def open_data(name, preset, split="train"):
    """What `--data` names. Raises UserError for a name or file that is not there."""
    dropout = preset.recipe.caption_dropout
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
    return open_own(name, preset)


def micro_batch(source, seed, index, size):
    """The micro-batch of that number: `size` examples of one shape, a function of (seed, index)."""
    shape = source.shape(np.random.default_rng((seed, index)))
    return [source.example(np.random.default_rng((seed, index, i)), shape) for i in range(size)]


def micro_batches(source, seed, size, start, stop):
    """Iterate over the micro-batches start … stop - 1, made ahead in a thread."""
    numbers = grain.MapDataset.range(start, stop)
    batches = numbers.map(lambda index: micro_batch(source, seed, int(index), size))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
