"""Sizes of the user's pictures, read once and kept beside them, and the buckets that they make.

A grid's cells all have one of at most nine sizes, of the area that --resolution asks for: that
whose aspect is nearest to its query's first picture, or, where few have that, the next that is not
much unlike it. Pictures are cut to it from their centre. So a file of photographs needs a program
for each of few shapes, and not one for every pair of ratios (sampling makes one grid, and gives
each row its own size).
"""

import io
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcloze_jax.config import UserError
from vcloze_jax.data.sources import Shape
from vcloze_jax.inputs.cells import check_layout, row_size
from vcloze_jax.inputs.checks import error_context
from vcloze_jax.inputs.pictures import PictureError, measure_picture, quiet_decoders, save_bytes
from vcloze_jax.inputs.spec import open_cells, sentences

ASPECTS = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1))  # w, h
UNLIKE = math.log(1.5)  # of two aspects, from which on a third of a picture or more is cut away
SPOT = 32  # samples, spread evenly, that are looked at at every start
FIELDS = ("pair", "rows", "columns", "width", "height")  # of a sample; height 0: it is broken


def measure_samples(samples: Sequence) -> tuple[np.ndarray, dict[int, str]]:
    """`FIELDS` of all samples, int32 [N, 5], and what is wrong with those that are broken.

    They are read from `find_table` where that is of these samples, and still of the pictures of
    `SPOT` that are spread evenly; else from the headers of all their pictures, with a bar, and kept
    there; samples of which much is cut away are told then. What was broken is looked at again.
    Raises UserError for what is no sample.
    """
    file, cut = find_table(samples), []
    table, broken = _read_table(file, samples.digest), {}
    if table is None or any(_was_replaced(samples, table, i) for i in spread_evenly(len(samples))):
        table = np.zeros((len(samples), len(FIELDS)), np.int32)
    missing = np.flatnonzero(table[:, -1] == 0)
    for i in tqdm(missing, "reading sizes", unit="sample", leave=False, delay=2):
        with error_context(samples.name(i)):
            sample = samples[i]
            try:
                with quiet_decoders():
                    table[i], much = measure_sample(sample, samples.folder)
                cut += [samples.name(i)] * much
            except PictureError as error:
                broken[int(i)] = str(error)
    if cut:
        told = f"{len(cut)} samples, as {cut[0]}, hold pictures of quite other shapes than their"
        told += " first, or than 2:1 or 1:2: a third of these or more is cut away"
        tqdm.write(told, file=sys.stderr)
    if len(broken) < len(missing):
        content = io.BytesIO()
        np.savez(content, digest=samples.digest, table=table)
        with suppress(UserError):  # where nothing can be written they are read at every start
            save_bytes(file, content.getvalue())
    return table, broken


def find_table(samples: Sequence) -> Path:
    """Where the sizes are kept: beside the data, whatever asks for them, so that they come and go
    with it, and the hosts of a run read them once."""
    path = samples.path.resolve()
    return path.with_name(f"{path.name}.sizes.npz")


def measure_sample(sample, folder: Path) -> tuple[tuple[int, ...], bool]:
    """`FIELDS` of a sample, and whether much of it is cut away, as all cells get the shape of its
    first picture, and that gets one of `ASPECTS`. Raises PictureError for a picture, UserError for
    what is no sample."""
    _, cells = open_cells(sample.rows, folder, measure_picture)
    for r, row in enumerate(cells):
        if None in row:
            raise UserError(f"image[{r}][{row.index(None)}]: null; to learn it, give its picture")
    cells = [[cell if isinstance(cell, tuple) else (cell, None) for cell in row] for row in cells]
    first = cells[-1][0][0] if cells and cells[-1] else None
    aspects = [math.log(cell.width / cell.height) for row in cells for cell, _ in row]
    if first and not has_masks(sample):
        cells[-1][-1] = None, None
    check_layout(cells)
    sentences(sample.texts, len(cells), len(cells[0]))
    pair = sample.phrases is not None
    own = math.log(first.width / first.height)
    much = any(abs(aspect - own) >= UNLIKE for aspect in aspects)
    much |= min(abs(own - math.log(w / h)) for w, h in ASPECTS) >= UNLIKE
    return (pair, len(cells), len(cells[0]), first.width, first.height), much


def has_masks(sample) -> bool:
    """Whether the sample says itself what is to be generated."""
    return any(isinstance(cell, dict) and cell.get("mask") for cell in sample.rows[-1])


def spread_evenly(count: int) -> list[int]:
    """Some numbers below a count, `SPOT` of them, or all."""
    return np.linspace(0, count - 1, min(SPOT, count)).astype(int).tolist()


def _was_replaced(samples: Sequence, table: np.ndarray, i: int) -> bool:
    """Whether a sample's first picture has another size by now than a table says."""
    with suppress(UserError), quiet_decoders():
        fields, _ = measure_sample(samples[i], samples.folder)
        return tuple(table[i]) != fields and table[i, -1] > 0
    return False


def _read_table(file: Path, digest: str) -> np.ndarray | None:
    """What was kept for samples of that digest; None where there is nothing or something else."""
    with suppress(Exception), np.load(file, allow_pickle=False) as kept:
        if kept["digest"] == digest and kept["table"].shape[1] == len(FIELDS):
            return kept["table"]
    return None


def fill_buckets(table: np.ndarray, resolution: int) -> dict[Shape, np.ndarray]:
    """The numbers of the samples that are not broken, by what shape they have."""
    _, rows, columns, width, height = table.T
    sizes = [row_size(w, h, resolution) for w, h in ASPECTS]
    own = np.log(np.maximum(width, 1) / np.maximum(height, 1))
    nearest = np.abs(own[:, None] - np.log([w / h for w, h in ASPECTS])).argmin(1)
    keys = np.stack([rows, columns, nearest], 1)
    buckets: dict[Shape, np.ndarray] = {}
    for key in np.unique(keys[height > 0], axis=0):
        members = np.flatnonzero((keys == key).all(1) & (height > 0))
        w, h = sizes[key[2]]
        shape = Shape(int(key[0]), int(key[1]), h, w)
        buckets[shape] = np.sort(np.append(buckets.get(shape, members[:0]), members))
    return buckets


def merge_buckets(buckets: dict[Shape, np.ndarray], least: int) -> dict[Shape, np.ndarray]:
    """The same samples in fewer buckets: the smallest joins the one of `find_near` whose aspect is
    nearest, until each that can has at least `least`."""
    buckets, joined = dict(buckets), {shape: [shape] for shape in buckets}
    for shape in sorted(buckets, key=lambda shape: len(buckets[shape])):
        near = [other for other in buckets if other != shape]
        for own in joined[shape]:
            near = find_near(own, near)
        if len(buckets[shape]) < least and near:
            other = min(near, key=lambda other: distance(other, shape))
            buckets[other] = np.sort(np.append(buckets[other], buckets.pop(shape)))
            joined[other] += joined[shape]
    return buckets


def find_near(shape: Shape, shapes: Iterable[Shape]) -> list[Shape]:
    """Those of `shapes` in which a grid of that shape may stand: of as many rows and columns, and
    of no quite other aspect, whose cells would lose a third or more of their pictures."""
    return [x for x in shapes if x[:2] == shape[:2] and distance(x, shape) < UNLIKE]


def distance(a: Shape, b: Shape) -> float:
    """How unlike the aspects of two shapes are: the logarithm of what divides them."""
    return abs(math.log(a.width / a.height) - math.log(b.width / b.height))
