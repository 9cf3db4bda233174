"""The grammar of the weight tables, and where a table puts an array of ours.

A table has a row per weight: (our path, foreign name).

* A path that names a module stands for its leaves, kernel, bias and scale (LEAVES below says how
  a leaf is spelled). A path that names a leaf has the foreign key in
  full and is taken as it is.
* `{name}` on both sides is one word of the path; `{3-name}` is a number that counts down from 3.
  `{i}` on the foreign side only counts the layers that we keep stacked on a leading axis.
* A kernel is [in, *out] and a bias [*out]: outputs may have axes, of parts and of heads, which are
  one axis of the file. Joining(path): our kernel is [*in, out].
* `to_{q,k,v}` stands for three foreign names, which are our fused weight: they are joined on the
  first output axis. `name*4` among them is four times as wide as the others.
* Swapped(name): the two halves of the output axis are stored in the other order.
* Pointwise(name): our linear layer is stored as a convolution of 1 x 1.

The first row that matches a path is its row, so special rows stand before general ones.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEAVES = {"kernel": ".weight", "bias": ".bias", "scale": ".weight"}  # and how a leaf is spelled


class Joining(str):
    """A path of ours whose kernel has all axes but the last for its inputs."""


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
    (diagnose.refuse_entries); of a model that is one half of another they may stand under `nested`.
    `written` makes, of the entries, those that only others read. One of `prefixes` stands before
    all its keys in a file that holds several models, as ComfyUI saves them.
    """

    name: str  # in messages
    folder: str
    stem: str  # of its safetensors files
    tables: tuple[Table, ...]  # one a naming; the first is the one that we write
    config: dict[str, str]
    fixed: dict
    harmless: str
    nested: str = ""
    prefixes: tuple[str, ...] = ()
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
    order: list[tuple[int, ...]]  # see `order_axes`
    swapped: bool

    @property
    def axes(self) -> tuple[int, ...]:
        """Our axes but that of the layers, as they lie in the file, the slowest first."""
        return sum(self.order, ())

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of a kernel of a linear layer, or of a stack, as [in, out]."""
        one = self.shape[-len(self.axes) :]
        flat = (math.prod(one[axis] for axis in group) for group in reversed(self.order))
        return (*self.shape[: -len(one)], *flat)

    def to_ours(self, tensor, shape):
        """A foreign tensor in our `shape`, a layer's; a view where nothing is swapped."""
        tensor = tensor.reshape([shape[axis] for axis in self.axes])
        tensor = tensor.transpose(np.argsort(self.axes))
        return np.roll(tensor, tensor.shape[-1] // 2, -1) if self.swapped else tensor

    def to_foreign(self, array, shape):
        """The inverse of `to_ours`, contiguous, in a foreign shape; of one layer, or of a leaf that
        is not stacked."""
        array = array.reshape(array.shape[-len(self.axes) :])
        array = np.roll(array, array.shape[-1] // 2, -1) if self.swapped else array
        return np.ascontiguousarray(array.transpose(self.axes)).reshape(shape)


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
    """-> parts [(foreign key or module, width)], leaf name ("" for a leaf row), the row's marks.

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
            return parts, "" if whole else leaf, {type(ours), type(foreign)}
    raise KeyError(f"no row of the table is for {path}")


def is_stacked(table: Table, path: str) -> bool:
    """Whether our array has a leading axis of layers."""
    return "{i}" in find_row(table, path)[0][0][0]


def order_axes(leaf: str, ndim: int, inputs: int = 1) -> list[tuple[int, ...]]:
    """Which of our axes, the slowest first, are each axis of a foreign tensor; the first of all is
    the first output axis. `inputs`: how many of a kernel are inputs, 0 of a convolution."""
    every = tuple(range(ndim))
    if leaf not in LEAVES:
        return [(axis,) for axis in every]
    if leaf != "kernel":
        return [every]
    if not inputs:
        return [(3,), (2,), (0,), (1,)]  # [h, w, in, out] is stored as [out, in, h, w]
    return [every[inputs:], every[:inputs]]


def lay_out(table: Table, path: str, shape: tuple[int, ...]) -> Leaf:
    """Where our array `path` of `shape` lies in the foreign naming; KeyError without a row."""
    parts, leaf, marks = find_row(table, path)
    stacked = "{i}" in parts[0][0]
    one = shape[1:] if stacked else shape
    inputs = len(one) - 1 if Joining in marks else int(stacked or len(one) != 4)
    order = order_axes(leaf, len(one), inputs)
    outputs = order[0][0]  # the axis that is divided
    unit = one[outputs] // sum(width for _, width in parts)
    pieces, start = [], 0
    for part, width in parts:
        span = slice(start, start + unit * width)
        start = span.stop
        sizes = (*one[:outputs], unit * width, *one[outputs + 1 :])
        there = tuple(math.prod(sizes[axis] for axis in group) for group in order)
        there += (1, 1) if Pointwise in marks and leaf == "kernel" else ()
        inside = [slice(0, n) for n in one]
        inside[outputs] = span
        for i in range(shape[0]) if stacked else [None]:
            place = (slice(i, i + 1), *inside) if stacked else (*inside,)
            key = part.replace("{i}", str(i)) + LEAVES.get(leaf, "")
            pieces.append(Piece(key, there, i, place))
    return Leaf(path, shape, pieces, order, Swapped in marks)
