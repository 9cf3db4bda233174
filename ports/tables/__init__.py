"""The grammar of the weight tables, and where a table puts an array of ours.

A table has a row per weight: (our path, foreign name).

* A path that names a module stands for its leaves, kernel, bias and scale (LEAVES below says how
  a leaf is spelled, and which are transposed). A path that names a leaf has the foreign key in
  full and is taken as it is.
* `{name}` on both sides is one word of the path; `{3-name}` is a number that counts down from 3.
  `{i}` on the foreign side only counts the layers that we keep stacked on a leading axis.
* `to_{q,k,v}` stands for three foreign names, which are our fused weight: they are joined on the
  output axis. `name*4` among them is four times as wide as the others.
* Swapped(name): the two halves of the output axis are stored in the other order.
* Pointwise(name): our linear layer is stored as a convolution of 1 x 1.

The first row that matches a path is its row, so special rows stand before general ones.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# leaf of ours -> (foreign suffix, whether a matrix of [in, out] is stored as [out, in])
LEAVES = {"kernel": (".weight", True), "bias": (".bias", False), "scale": (".weight", False)}
AXES = {2: (1, 0), 4: (3, 2, 0, 1)}  # [in, out] to [out, in], [h, w, in, out] to [out, in, h, w]


class Swapped(str):
    """A foreign name whose output axis holds its two halves in the other order."""


class Pointwise(str):
    """A foreign name whose matrix has two more axes of length 1, those of a convolution."""


class Table(NamedTuple):
    """The rows of one model in one naming, as described above.

    A file is in this naming if one of its keys matches `sign`. `prefix` stands before every key
    when we write, and before all or none in a file that we read. Keys that match one of `ignored`
    are not read. `tied` pairs keys of the rows with a second name, read where the first is not.
    """

    rows: tuple
    sign: str = ""
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()


class Part(NamedTuple):
    """One model of a weights folder: where it lies, its rows, and how its config.json reads.

    `config` pairs entries of config.json with our fields; `fixed` are entries that must have these
    values where they appear, `harmless` is the pattern of those that change nothing
    (diagnose.refuse_entries); `written` makes, of the entries, those that only others read.
    """

    name: str  # in messages
    folder: str
    stem: str  # of its safetensors files
    tables: tuple[Table, ...]  # one a naming; the first is the one that we write
    config: dict[str, str]
    fixed: dict
    harmless: str
    written: Callable[[dict], dict] = lambda entries: {}

    @property
    def table(self) -> Table:
        return self.tables[0]


class Piece(NamedTuple):
    """One foreign tensor: its key, its shape, and where it lies in our leaf."""

    key: str
    shape: tuple[int, ...]
    layer: int | None  # of our stacked axis
    place: tuple[slice, ...]  # a slice for each of our axes


class Leaf(NamedTuple):
    """One array of ours and the foreign tensors that it is made of."""

    path: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    axes: tuple[int, ...]
    swapped: bool

    def to_ours(self, tensor):
        """A foreign tensor as one layer of ours, a view where nothing is swapped."""
        tensor = tensor.reshape(tensor.shape[: len(self.axes)])  # Pointwise has two more
        tensor = tensor.transpose(np.argsort(self.axes))
        return np.roll(tensor, tensor.shape[-1] // 2, -1) if self.swapped else tensor

    def to_foreign(self, array):
        """The inverse of `to_ours`, contiguous; of one layer, or of a leaf that is not stacked."""
        array = array.reshape(array.shape[-len(self.axes) :])
        array = np.roll(array, array.shape[-1] // 2, -1) if self.swapped else array
        return np.ascontiguousarray(array.transpose(self.axes))


def nest_rows(prefixes: tuple[str, str, str], rows) -> list[tuple]:
    """Rows of three columns with a prefix before the name in each; marks stay."""
    pairs = [zip(prefixes, row, strict=True) for row in rows]
    return [tuple(type(name)(prefix + name) for prefix, name in row) for row in pairs]


def take_column(rows, n: int) -> tuple:
    """Rows of three columns -> those of a table: (our path, name in column n)."""
    return tuple((row[0], row[n]) for row in rows)


def split_name(foreign: str) -> list[tuple[str, int]]:
    """The foreign side of a row as its parts, [(key or module, how many times as wide)]."""
    start, *rest = re.split(r"\{([^{}]*,[^{}]*)\}", foreign)
    names = [start + word + rest[1] for word in rest[0].split(",")] if rest else [start]
    return [(name, int(width or 1)) for name, _, width in (n.partition("*") for n in names)]


def fill_name(name: str, word: str, value: str) -> str:
    """A foreign name with `value` for {word} and n - value for {n-word}."""
    down = re.sub(rf"\{{(\d+)-{word}\}}", lambda n: str(int(n[1]) - int(value)), name)
    return down.replace(f"{{{word}}}", value)


def find_row(table: Table, path: str):
    """-> parts [(foreign key or module, width)], leaf name ("" for a leaf row), the mark's class.

    KeyError without a row.
    """
    module, _, leaf = path.rpartition("/")
    for ours, foreign in table.rows:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", ours)
        whole, inside = re.fullmatch(pattern, path), re.fullmatch(pattern, module)
        if whole or (inside and leaf in LEAVES):
            parts = split_name(foreign)
            for word, value in (whole or inside).groupdict().items():
                parts = [(fill_name(part, word, value), width) for part, width in parts]
            parts = [(table.prefix + part, width) for part, width in parts]
            return parts, "" if whole else leaf, type(foreign)
    raise KeyError(f"no row of the table is for {path}")


def lay_out(table: Table, path: str, shape: tuple[int, ...]) -> Leaf:
    """Where our array `path` of `shape` lies in the foreign naming; KeyError without a row."""
    parts, leaf, mark = find_row(table, path)
    suffix, transposed = LEAVES.get(leaf, ("", False))
    stacked = "{i}" in parts[0][0]
    one = shape[1:] if stacked else shape
    axes = AXES[len(one)] if transposed else tuple(range(len(one)))
    unit = one[-1] // sum(width for _, width in parts)
    pieces, start = [], 0
    for part, width in parts:
        span = slice(start, start + unit * width)
        start = span.stop
        there = tuple((*one[:-1], unit * width)[axis] for axis in axes)
        there += (1, 1) if mark is Pointwise and leaf == "kernel" else ()
        inside = (*(slice(0, n) for n in one[:-1]), span)
        for i in range(shape[0]) if stacked else [None]:
            place = (slice(i, i + 1), *inside) if stacked else inside
            pieces.append(Piece(part.replace("{i}", str(i)) + suffix, there, i, place))
    return Leaf(path, shape, pieces, axes, mark is Swapped)
