"""train.py on one accelerator, for mini, whose pictures all lie there: thousands of grids a second.

    python scripts/train_mini.py --data graphemoji --from-scratch --optimizer muon --lr 3e-3 \
        --warmup 200 --batch 1024 --group 256 --micro-batch 256 --steps 20000 --decay-steps 20000

Processes draw grids as numbers, which picture stands where and what is blank, and the device looks
the rest up. All flags are train.py's but --varied N, 24 where it is left out: beside as it is every
subject is there N times more, moved and tinted (variations.py), and half of the grids of tasks show
these. All but that is train.py's own: draws, loss, optimizer, average, checkpoints, previews. A run
does not remember N: who goes on says it again.
"""

import argparse
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from variations import draw_numbers, vary_nodes

from vcloze_jax.config import UserError
from vcloze_jax.data import graphemoji, sources
from vcloze_jax.data.graph import NODES, SIZE
from vcloze_jax.grid import Grid
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.signals import follow_parent
from vcloze_jax.study.trainings import count_cores

AHEAD = 256  # groups that are drawn before they are wanted
PARTS = 8  # in which subjects are shared out
WORDS = SIZE * SIZE * 3 // 4  # of a picture, four bytes in each
MOST = 27  # variations: with more a table had 2^31 words, beyond JAX's int32 indices


class Drawn(NamedTuple):
    """Grids of one shape, before any picture: NumPy arrays, but for `grid`."""

    grid: Grid  # of that shape
    where: tuple  # int32 [B, R, C] of variation, subject and node
    masks: np.ndarray  # uint8 [B, 1 or R, h, W / 8], bits of the last row, or of all
    ids: tuple  # of T5 and CLIP, int32 [B, T] and [B, 77]
    kinds: np.ndarray  # uint8 [B, KIND], as a Batch has them


# --- processes, which know no device ---

HELD = {}  # by each


def begin(recipe, tokenizers, varied):
    """What a process does first."""
    follow_parent()
    HELD.update(recipe=recipe, tokenizers=tokenizers, varied=varied)
    HELD.update(subjects=graphemoji.read_subjects("train"), source=sources.open_source(recipe))


def make_pictures(number, part):
    """Every PARTS-th subject in one variation: uint32 [n, nodes, WORDS]."""
    subjects = HELD["subjects"]
    lists = subjects.codepoints, subjects.names, subjects.groups, subjects.rgba
    some = graphemoji.Subjects(*(x[part::PARTS] for x in lists))
    return vary_nodes(some, number).reshape(-1, len(NODES), WORDS * 4).view(np.uint32)


def draw_group(number):
    """data.sources.draw_group, of samples in place of examples, as Drawn."""
    source, recipe, names = HELD["source"], HELD["recipe"], HELD["subjects"].names

    def sample(rng, shape, queries):
        drawn = source.choose_sample(rng, shape, names, int(queries[0]))
        return drawn, draw_numbers(rng, shape.rows, HELD["varied"])[:, None]

    samples = SimpleNamespace(shape=source.shape, count=lambda _: len(names), example=sample)
    group = sources.draw_group(samples, recipe.seed, number, recipe.group)
    drawn, varied = zip(*group, strict=True)
    return draw_of(drawn, np.array(varied), source.masks_every_row)


def draw_of(samples, varied, masks_every_row):
    """Samples (data/graph.py) of one shape, and the variation of each row, int [B, R, 1]."""
    from vcloze_jax.step import KIND

    mask = np.stack([x.mask for x in samples])
    B, R, C, h, w = mask.shape
    grid = Grid.from_cells(np.zeros((R, C, h, w, 3), np.uint8), mask[0])
    nodes = [[[NODES.index(node) for node in row] for row in x.nodes] for x in samples]
    subjects = np.stack([x.subjects.reshape(R, -1) for x in samples])  # B R 1 or B R C
    where = (np.broadcast_to(x, (B, R, C)).astype(np.int32) for x in (varied, subjects, nodes))
    masks = mask[:, 0 if masks_every_row else -1 :].swapaxes(2, 3).reshape(B, -1, h, C * w)
    ids = HELD["tokenizers"]([x.prompt for x in samples])[:2]
    kinds = [x.nodes[-1][-1].encode()[:KIND].ljust(KIND) for x in samples]
    kinds = np.frombuffer(b"".join(kinds), np.uint8).reshape(B, KIND)
    return Drawn(grid, tuple(where), np.packbits(masks, -1), ids, kinds)


# --- what has a device ---


def look_up(table, where, masks):
    """Pictures uint32 [variation, subject, node, WORDS] and arrays of Drawn -> a Batch's rows."""
    import jax
    import jax.numpy as jnp

    B, R, C = where[0].shape
    cells = jax.lax.bitcast_convert_type(table[where], jnp.uint8).reshape(B, R, C, SIZE, SIZE, 3)
    rows = cells.swapaxes(2, 3).reshape(B, R, SIZE, C * SIZE, 3)
    masks = jnp.unpackbits(masks, axis=-1).astype(bool)
    masks = [None] * (R - masks.shape[1]) + [masks[:, i] for i in range(masks.shape[1])]
    return tuple((rows[:, r], mask) for r, mask in enumerate(masks))


def make_trainer(base, ending, varied):
    """Trainer, whose grids come as numbers; `ending` ends the processes."""
    import jax

    from vcloze_jax import conditioning
    from vcloze_jax.step import Batch

    class MiniTrainer(base):
        # The reader of rows that is set first stays: on a CPU train.py has one that remembers them.
        read_rows = property(
            lambda self: self.__dict__["reader"],
            lambda self, reader: self.__dict__.setdefault("reader", reader),
        )

        def __init__(self, parts, preset, tokenizers, mesh, tx, masks_every_row):
            super().__init__(parts, preset, tokenizers, mesh, tx, masks_every_row)
            recipe, cores = preset.recipe, count_cores()
            emoji = recipe.data.partition(":")[0] in ("graphemoji", "graphemoji-fill")
            if mesh.size > 1 or recipe.placement != "fill" or not emoji:
                what = "one device, --data graphemoji… and --placement fill"
                raise UserError(f"train_mini.py: it is for {what}; leave out what is else")
            if self.micro != recipe.group:
                raise UserError(
                    f"train_mini.py: a group goes at once; add --micro-batch {recipe.group}"
                )
            spawn = dict(mp_context=get_context("spawn"), initializer=begin)
            self.varied = 0 if masks_every_row else varied  # those of tasks alone
            spawn["initargs"] = recipe, tokenizers, self.varied
            self.pool = ending.enter_context(ProcessPoolExecutor(cores, **spawn))
            ending.callback(self.pool.shutdown, cancel_futures=True)
            tasks = product(range(1 + self.varied), range(PARTS))
            self.pictures = [self.pool.submit(make_pictures, *task) for task in tasks]
            self.table, self.look_up, self.turns = None, jax.jit(look_up), {}

        def draw_groups(self, first, last):
            """All pictures to the device, then the groups of these numbers, in their order; nothing
            before the first is wanted, so that programs are compiled while pictures are made."""
            parts = [future.result() for future in self.pictures]
            count = sum(map(len, parts[:PARTS]))
            table = np.empty((1 + self.varied, count, *parts[0].shape[1:]), np.uint32)
            for i, part in enumerate(parts):
                table[i // PARTS, i % PARTS :: PARTS] = part
            self.table, self.pictures = jax.device_put(table), None
            del table, parts
            waiting = deque()
            for number in range(first, last):
                waiting.append(self.pool.submit(draw_group, number))
                if len(waiting) > AHEAD:
                    yield self.as_group(waiting.popleft())
            yield from map(self.as_group, waiting)

        def as_group(self, future):
            """As a group that one host has all of."""
            return [future.result()] + [None] * (self.recipe.group - 1)

        def encode(self, examples, numbers, key):
            drawn = examples[0]
            if not isinstance(drawn, Drawn):
                return super().encode(examples, numbers, key)
            shape = drawn.grid.shape, drawn.grid.columns
            if shape not in self.turns:
                sizes = self.preset.flux, self.preset.t5.max_length, drawn.grid.tokens
                self.turns[shape] = conditioning.position_table([drawn.grid], *sizes)
            rows = self.look_up(self.table, drawn.where, drawn.masks)
            numbers = np.asarray(numbers, np.int32)
            batch = Batch(rows, *drawn.ids, numbers, self.turns[shape], drawn.kinds)
            args = self.frozen, batch, key
            return self.program("encode", shape, *args)(*args)

    return MiniTrainer


def main(argv):
    import vcloze_jax.train
    import vcloze_jax.trainer  # JAX from here on, once cli.run has told it its cache

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--varied", type=int, default=24)
    own, argv = parser.parse_known_args(argv)
    if {"-h", "--help"} & {*argv}:
        print(__doc__)  # train.py then tells its own
    if not 0 <= own.varied <= MOST:
        raise UserError(f"--varied {own.varied}: 0 to {MOST}, of 0.3 GB each")
    sys.argv[0] = str(Path(__file__).parents[1] / "train.py")  # other commands lie beside that
    made = []
    with ExitStack() as ending:
        trainer = make_trainer(vcloze_jax.trainer.Trainer, ending, own.varied)
        vcloze_jax.trainer.Trainer = lambda *args: made.append(trainer(*args)) or made[0]
        vcloze_jax.train.draw_groups = lambda *args: made[0].draw_groups(*args[2:4])
        return vcloze_jax.train.main(argv)


if __name__ == "__main__":
    cli.run(main)
