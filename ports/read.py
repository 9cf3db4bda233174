"""The engine behind the tables: NumPy and safetensors only, a part of one tensor at a time."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ports import pipeline
from ports.rows import Leaf, Table, leaf

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' and of transformers' folders
SHOWN = 10  # keys that an error names
BLOCK = 128  # outputs of a matrix copied at once: it stays in the cache while it is transposed


class PortError(Exception):
    """A file that does not fit: one line that names up to ten of its keys."""


class Source:
    """A safetensors file, or a folder of one or of shards: headers now, tensors when asked for.

    `header` maps key -> (shape, dtype as safetensors writes it). Raises PortError if the file is
    not whole, a key appears twice, or shards and their index disagree.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header, self.metadata, self.home = {}, {}, {}
        names, listed = shards(path) if path.is_dir() else ([path], None)
        for name in names:
            header, start = read_header(name)
            self.metadata |= header.pop("__metadata__", None) or {}
            for key, entry in header.items():
                if key in self.header:
                    raise PortError(f"{key} is in {self.home[key][0].name} and in {name.name}")
                self.header[key] = tuple(entry["shape"]), entry["dtype"]
                self.home[key] = name, start + entry["data_offsets"][0]
        if listed is not None and listed != set(self.header):
            odd = sorted(listed ^ set(self.header))
            raise PortError(f"the index and its shards disagree about {several(odd)}")

    def map(self, key: str) -> np.ndarray:
        """One tensor, mapped from the file: only what is used of it is read, and it is held only as
        long as it is referred to (safetensors would map the whole file, as long as it is open)."""
        (shape, dtype), (name, offset) = self.header[key], self.home[key]
        if 0 in shape:
            return np.empty(shape, DTYPES[dtype])
        return np.asarray(np.memmap(name, DTYPES[dtype], "r", offset, shape))

    def read(self, key: str) -> np.ndarray:
        """One tensor; PortError if it holds NaN or infinity."""
        return finite(np.array(self.map(key)), key)


def finite(tensor, key):
    if not np.isfinite(tensor).all():
        raise PortError(f"{key} holds NaN or infinity; fetch or train it again")
    return tensor


def shards(folder: Path):
    """-> the safetensors files of a model's folder, and the keys of its index, if it has one."""
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file() and index.is_file():
            raise PortError(f"holds {single.name} and {index.name}; remove the one that is old")
        if single.is_file():
            return [single], None
        if index.is_file():
            try:
                listed = json.loads(index.read_bytes())["weight_map"]
                names = sorted({folder / Path(name).name for name in listed.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PortError(f"{index.name} is no index of shards; fetch it again") from error
            for name in names:
                if not name.is_file():
                    raise PortError(f"{index.name} names {name.name}, which is not there")
            return names, set(listed)
    raise PortError(f"holds no {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")


def read_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file that is whole, and where its tensors begin."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            names = [key for key, _ in pairs]
            raise PortError(f"{path.name}: {max(names, key=names.count)} is there twice")
        return dict(pairs)

    try:
        if other := magic(path):
            raise PortError(f"{path.name} is {other}; take the model's safetensors")
        safe_open(path, "numpy")  # checks sizes, offsets and types
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size), object_pairs_hook=once), 8 + size
    except (OSError, SafetensorError, ValueError) as error:
        raise PortError(f"{path.name} is not a whole safetensors file ({error})") from error


def plan(table: Table, wanted: dict[str, tuple[int, ...]], source: Source) -> list[Leaf]:
    """Join the table to `wanted` (our path -> shape) and to the keys of a source; reads no tensor.

    Every key of the source is used once or ignored by a row, every leaf is filled once and every
    shape agrees, or PortError.
    """
    table = spelled(table, source)
    leaves = [leaf(table, path, shape) for path, shape in wanted.items()]
    pieces = {piece.key: piece for leaf in leaves for piece in leaf.pieces}
    faults = []
    for key, piece in pieces.items():
        shape, dtype = source.header.get(key, (None, None))
        if shape is None:
            faults.append(f"{key} {brackets(piece.shape)} is missing")
        elif shape != piece.shape:
            faults.append(misshapen(table, key, shape, brackets(piece.shape)))
        elif dtype not in DTYPES:
            faults.append(f"{key} is of type {dtype}, not {' or '.join(DTYPES)}")
    faults += unknown(table, source, pieces)
    if faults:
        other = seems(source.header, table.sign)
        raise PortError((f"seems to be {other}: " if other else "") + several(faults))
    return leaves


def magic(path: Path) -> str:
    """What a file is by its first bytes, or nothing where that is not known."""
    with open(path, "rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # safetensors, whatever the eight bytes of its header's length look like
        return ""
    return next((kind for sign, kind in pipeline.MAGIC if re.match(sign, start)), "")


def seems(header, expected: str = "") -> str:
    """What a file is by its keys and types; nothing where that is not known, or its sign is the
    one expected."""
    names = [f"{key} {dtype}" for key, (_, dtype) in header.items()]
    kinds = (row for row in pipeline.KINDS if any(re.match(row[0], key) for key in names))
    sign, kind = next(kinds, ("", ""))
    return "" if sign == expected else kind


def spelled(table: Table, source: Source) -> Table:
    """The table as this source spells it: with its prefix or without."""
    with_prefix = any(key.startswith(table.prefix) for key in source.header)
    return table if with_prefix else table._replace(prefix="")


def unknown(table, source, used):
    """Faults of the keys that are neither used nor ignored."""
    rest = [key for key in source.header if key not in used]
    rest = [key for key in rest if not any(re.fullmatch(row, key) for row, _ in table.ignored)]
    return [f"{key} {brackets(source.header[key][0])} is unknown" for key in rest]


def misshapen(table, key, shape, expected):
    hint = next((f" ({hint})" for word, hint in table.hints if word in key), "")
    return f"{key} is {brackets(shape)}, expected {expected}{hint}"


def refuse(faults):
    if faults:
        raise PortError(several(faults))


def several(faults):
    """The first ten, joined, and how many more there are."""
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more


def brackets(shape):
    return f"[{', '.join(map(str, shape))}]"


def fetch(leaf: Leaf, source: Source, dtype=None, cut: tuple[slice, ...] = ()) -> np.ndarray:
    """Our array of a planned leaf in `dtype` or that of the source; with a `cut`, a slice for each
    axis, that part of it, and no more is read. PortError if it holds NaN or infinity."""
    dtype = np.dtype(dtype or DTYPES[source.header[leaf.pieces[0].key][1]])
    wanted = [range(n)[span] for n, span in zip(leaf.shape, cut or leaf.whole, strict=True)]
    array = np.empty([len(span) for span in wanted], dtype)
    for piece in leaf.pieces:
        place = [range(n)[span] for n, span in zip(leaf.shape, leaf.span(piece), strict=True)]
        both = [
            range(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(place, wanted, strict=True)
        ]
        if all(both):
            tensor = leaf.to_ours(source.map(piece.key)).reshape([len(span) for span in place])
            copy(tensor[within(both, place)], array[within(both, wanted)], piece.key)
    return array


def within(spans, whole):
    """The index of some ranges in an array that covers other ranges."""
    pairs = zip(spans, whole, strict=True)
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in pairs)


def copy(tensor, array, key):
    """tensor -> array in its dtype, block by block along the axis that is slowest in the file."""
    axis = max(range(tensor.ndim), key=lambda i: (tensor.shape[i] > 1, tensor.strides[i]))
    for start in range(0, tensor.shape[axis], BLOCK):
        block = (slice(None),) * axis + (slice(start, start + BLOCK),)
        array[block] = finite(tensor[block].astype(array.dtype), key)


def export(table: Table, arrays) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, array) pairs -> foreign (key, array) pairs, by the rows that read them; lazy."""
    for path, array in arrays:
        place = leaf(table, path, array.shape)
        for piece in place.pieces:
            yield piece.key, place.to_foreign(array[piece.index]).reshape(piece.shape)


def convert(table: Table, leaves: list[Leaf], source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Planned leaves of a source -> foreign (key, array) pairs of another table; lazy, and no more
    in memory than one tensor."""
    for ours in leaves:
        place = leaf(table, ours.path, ours.shape)
        for piece in place.pieces:
            array = fetch(ours, source, cut=place.span(piece))
            yield piece.key, place.to_foreign(array).reshape(piece.shape)


def write(folder: Path, stem: str, tensors, dtype: str, max_bytes: int = 10**10):
    """Write (key, array) pairs as STEM.safetensors, or as shards of at most `max_bytes` each (but
    for a tensor that is larger alone) with the index that diffusers and transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    shard, size, total, parts = {}, 0, 0, []

    def flush():
        part = folder / f"{stem}.{len(parts)}.part"
        save_file(shard, part, metadata={"format": "pt"})
        parts.append((part, list(shard)))

    for key, tensor in tensors:
        tensor = tensor.astype(dtype)
        if shard and size + tensor.nbytes > max_bytes:
            flush()
            shard, size = {}, 0
        shard[key] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    for old in folder.glob(f"{stem}*.safetensors*"):
        old.unlink()
    if len(parts) == 1:
        os.replace(parts[0][0], folder / f"{stem}.safetensors")
        return
    where = {}
    for n, (part, keys) in enumerate(parts, 1):
        name = f"{stem}-{n:05}-of-{len(parts):05}.safetensors"
        os.replace(part, folder / name)
        where |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
