"""The grammar of the weight tables, and where a table puts an array of ours.

A table has a row per weight: (our path, foreign name).

* A path that names a module stands for its leaves: kernel, bias, scale and those of a LoRA branch
  (LEAVES below says how a leaf is spelled, and which are transposed). A path that names a leaf has
  the foreign key in full and is taken as it is.
* `{name}` on both sides is one word of the path; `{3-name}` is a number that counts down from 3.
  `{i}` on the foreign side only counts the layers that we keep stacked on a leading axis.
* A tuple of foreign names is our fused weight: they are joined on the output axis. A part that is
  n times as wide as the others is written (name, n).
* Swapped(name): the two halves of the output axis are stored in the other order.
* Pointwise(name): our linear layer is stored as a convolution of 1 x 1.

The first row that matches a path is its row, so special rows stand before general ones.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# leaf of ours -> (foreign suffix, whether a matrix of [in, out] is stored as [out, in])
LEAVES = {
    "kernel": (".weight", True),
    "bias": (".bias", False),
    "scale": (".weight", False),
    "lora_a": (".lora_A.weight", True),
    "lora_b": (".lora_B.weight", True),
    "lora_bias": (".lora_B.bias", False),
}
AXES = {2: (1, 0), 4: (3, 2, 0, 1)}  # [in, out] to [out, in], [h, w, in, out] to [out, in, h, w]


class Swapped(str):
    """A foreign name whose output axis holds its two halves in the other order."""


class Pointwise(str):
    """A foreign name whose matrix has two more axes of length 1, those of a convolution."""


class Table(NamedTuple):
    """The rows of one model in one naming, as described above.

    A file is in this naming if one of its keys matches `sign`. `prefix` stands before every key
    when we write, and before all or none in a file that we read. `ignored` gives patterns of keys
    that are not read, each with its reason; `hints` gives words of keys with what a wrong shape of
    theirs tells the user.
    """

    rows: tuple
    sign: str = ""
    prefix: str = ""
    ignored: tuple = ()
    hints: tuple = ()


class Part(NamedTuple):
    """One model of a weights folder: where it lies, its rows, and how its config.json reads.

    `config` pairs entries of config.json with our fields; `fixed` are entries that must have these
    values where they appear; `written` makes, of the entries, those that only others read.
    """

    name: str  # in messages
    folder: str
    stem: str  # of its safetensors files
    tables: tuple[Table, ...]  # one a naming; the first is the one that we write
    config: dict[str, str]
    fixed: dict
    written: Callable[[dict], dict] = lambda entries: {}

    @property
    def table(self) -> Table:
        return self.tables[0]


class Piece(NamedTuple):
    """One foreign tensor: its key, its shape, and where it lies in our leaf."""

    key: str
    shape: tuple[int, ...]
    index: tuple


@dataclass(frozen=True)
class Leaf:
    """One array of ours and the foreign tensors that it is made of."""

    path: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axes: tuple[int, ...]
    swapped: bool

    @property
    def whole(self):
        return (slice(None),) * len(self.shape)

    def span(self, piece):
        """Where a piece lies, as a slice for each of our axes."""
        *layer, _, last = piece.index
        first = [slice(i, i + 1) for i in layer]
        return (*first, *self.whole[len(first) : -1], last)

    def to_ours(self, tensor):
        tensor = tensor.reshape(tensor.shape[: len(self.axes)])  # Pointwise has two more
        tensor = tensor.transpose(np.argsort(self.axes))
        return np.roll(tensor, tensor.shape[-1] // 2, -1) if self.swapped else tensor

    def to_foreign(self, array):
        array = array.reshape(array.shape[-len(self.axes) :])  # one of stacked layers, or all of it
        array = np.roll(array, array.shape[-1] // 2, -1) if self.swapped else array
        return np.ascontiguousarray(array.transpose(self.axes))


def find(table: Table, path: str):
    """-> parts [(foreign key or module, width)], leaf name ("" for a leaf row), the mark's class.

    KeyError without a row.
    """
    module, _, name = path.rpartition("/")
    for ours, foreign in table.rows:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", ours)
        whole, inside = re.fullmatch(pattern, path), re.fullmatch(pattern, module)
        if not whole and not (inside and name in LEAVES):
            continue
        parts = foreign if isinstance(foreign, tuple) else (foreign,)
        parts = [part if isinstance(part, tuple) else (part, 1) for part in parts]
        for word, value in (whole or inside).groupdict().items():
            parts = [(put(part, word, value), width) for part, width in parts]
        parts = [(table.prefix + part, width) for part, width in parts]
        return parts, "" if whole else name, type(foreign)
    raise KeyError(f"no row of the table is for {path}")


def put(part, word, value):
    """A foreign name with `value` for {word} and n - value for {n-word}."""
    down = re.sub(rf"\{{(\d+)-{word}\}}", lambda n: str(int(n[1]) - int(value)), part)
    return down.replace(f"{{{word}}}", value)


def leaf(table: Table, path: str, shape: tuple[int, ...]) -> Leaf:
    """Where our array `path` of `shape` lies in the foreign naming; KeyError without a row."""
    parts, name, mark = find(table, path)
    suffix, transposed = LEAVES.get(name, ("", False))
    stacked = "{i}" in parts[0][0]
    one = shape[1:] if stacked else shape
    axes = AXES[len(one)] if transposed else tuple(range(len(one)))
    unit = one[-1] // sum(width for _, width in parts)
    pieces, start = [], 0
    for part, width in parts:
        size = unit * width
        span = slice(start, start + size)
        if name == "lora_a":  # every part of a fused weight has its own copy of the whole A
            size, span = one[-1], slice(None)
        shape_there = tuple((*one[:-1], size)[axis] for axis in axes)
        if mark is Pointwise and name == "kernel":
            shape_there += (1, 1)
        for i in range(shape[0]) if stacked else [None]:
            index = (..., span) if i is None else (i, ..., span)
            pieces.append(Piece(part.replace("{i}", str(i)) + suffix, shape_there, index))
        start += size
    return Leaf(path, shape, tuple(pieces), axes, mark is Swapped and name != "lora_a")
