"""The engine behind the tables: NumPy and safetensors only, a part of one tensor at a time."""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import ml_dtypes  # which also makes bfloat16 a dtype of NumPy
import numpy as np

from vcloze_jax.ports.diagnose import (
    PortError,
    describe_header,
    describe_remedy,
    list_faults,
    misshapen,
    with_shape,
)
from vcloze_jax.ports.shards import find_shards, read_header
from vcloze_jax.ports.tables import Leaf, Table, lay_out

EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# types of a file -> as what they are read; bfloat16 holds all numbers of 8 bits, float32 the
# products with a scale
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= dict.fromkeys(EIGHT_BITS, "bfloat16")
NUMBERS = DTYPES | {  # what a scalar beside the matrices, an alpha, may be besides
    "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"
}  # fmt: skip
SPELLINGS = {  # of what is written, in the order in which the library lays types out
    "int64": "I64", "float64": "F64", "float32": "F32", "int32": "I32", "bfloat16": "BF16",
    "float16": "F16", "int16": "I16", "int8": "I8", "uint8": "U8"
}  # fmt: skip
SCALES = "scale_weight", "weight_scale"  # ComfyUI's and ModelOpt's: weight * scale is meant
EIGHT_BIT_NOTES = r"(.*\.)?(scaled_fp8|comfy_quant|scale_input|input_scale)"  # for 8-bit products
BLOCK = 2**19  # numbers copied at once: they stay in the cache while they are transposed

# What tools that wrap a model leave in its keys: PEFT (before modules, around a base layer, and the
# name of an adapter), torch.compile (whose dots kohya's naming makes "_"), DDP, DeepSpeed, FSDP.
WRAPPERS = re.compile(
    r"(?<![^.])(base_model\.model|base_layer|(_forward_)?module|_fsdp_wrapped_module|"
    r"_checkpoint_wrapped_module)\.|(?<![^._])_orig_mod[._]|"
    r"(?<=\.lora_[AB])\.[^.]+(?=\.(weight|bias)$)"
)


class SafetensorsFile:
    """A safetensors file, or a folder of one or of shards: headers now, tensors when asked for.

    `header` maps key, without WRAPPERS -> (shape, dtype as safetensors writes it). Raises PortError
    if the file is not whole, a key appears twice, or shards and their index disagree. Tensors of 8
    bits are read times their scale, which is not in the header.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header, self.metadata, self.home = {}, {}, {}
        files, listed = find_shards(path) if path.is_dir() else ([path], None)
        for file in files:
            header, start = read_header(file)
            self.metadata |= header.pop("__metadata__", None) or {}
            for key, name in unwrap_keys(header).items():
                entry = header[name]
                if key in self.header:
                    raise PortError(f"{key} is in {self.home[key][0].name} and in {file.name}")
                self.header[key] = tuple(entry["shape"]), entry["dtype"]
                self.home[key] = file, start + entry["data_offsets"][0]
        if listed is not None and (odd := sorted(set(unwrap_keys(listed)) ^ set(self.header))):
            raise PortError(f"the index and its shards disagree about {list_faults(odd)}")
        self.scales = {}
        if any(dtype in EIGHT_BITS for _, dtype in self.header.values()):
            self.take_scales()

    def take_scales(self):
        """Move the scales of tensors of 8 bits, a number each, from the header to `scales`, {key of
        a tensor: its scale}, and forget what concerns only products of 8 bits. A scale of another
        kind stays in the header, where it is unknown to every table."""
        for key, (shape, dtype) in list(self.header.items()):
            module, _, name = key.rpartition(".")
            _, scaled = self.header.get(weight := f"{module}.weight", (None, None))
            number = shape in ((), (1,)) and dtype in DTYPES
            if re.fullmatch(EIGHT_BIT_NOTES, key):
                del self.header[key]
            elif name in SCALES and scaled in EIGHT_BITS and number:
                self.scales[weight] = self.read(key).reshape(()).astype(np.float32)
                del self.header[key]

    def map(self, key: str) -> np.ndarray:
        """One tensor, mapped from the file: only what is used of it is read, and it is held only as
        long as it is referred to (safetensors would map the whole file, as long as it is open)."""
        (shape, dtype), (file, offset) = self.header[key], self.home[key]
        if 0 in shape:
            return np.empty(shape, self.type(key))
        if dtype in EIGHT_BITS:  # only 256 numbers: each is looked up
            numbers = np.arange(256, dtype=np.uint8).view(EIGHT_BITS[dtype]).astype(np.float32)
            numbers = (numbers * self.scales.get(key, np.float32(1))).astype(self.type(key))
            return numbers[np.memmap(file, np.uint8, "r", offset, shape)]
        return np.asarray(np.memmap(file, NUMBERS[dtype], "r", offset, shape))

    def type(self, key: str) -> str:
        """The name of the type that a tensor is read in, which holds its numbers: of scaled ones
        float32, where they are rounded for the first time."""
        return "float32" if key in self.scales else NUMBERS[self.header[key][1]]

    def read(self, key: str) -> np.ndarray:
        """One tensor; PortError if it holds NaN or infinity."""
        return check_finite(np.array(self.map(key)), key)


def unwrap_keys(names: Collection[str]) -> dict[str, str]:
    """{key without WRAPPERS: name in the file}; PortError where two names become one key, or where
    nothing says whether an adapter is already in the layers that it wraps."""
    if any("base_layer." in name for name in names) and any(".lora_A." in name for name in names):
        raise PortError(
            "holds base layers beside an adapter that may or may not be fused into them; save it "
            "again after unload_lora_weights(), fused or not"
        )
    keys = {}
    for name in names:
        key = WRAPPERS.sub("", name)
        if key in keys:
            raise PortError(f"{keys[key]} and {name} are both {key}; leave one in the file")
        keys[key] = name
    return keys


def check_finite(tensor, key: str):
    """The tensor, or PortError if it holds NaN or infinity."""
    if not np.isfinite(tensor).all():
        raise PortError(f"{key} holds NaN or infinity; fetch or train it again")
    return tensor


def plan_leaves(
    table: Table, wanted: dict[str, tuple[int, ...]], source: SafetensorsFile
) -> list[Leaf]:
    """Join the table to `wanted` (our path -> shape) and to the keys of a source; reads no tensor.

    Every key of the source is used once or ignored by a row, every leaf is filled once and every
    shape agrees, or PortError.
    """
    table = spell_table(table, source)
    leaves = [lay_out(table, path, shape) for path, shape in wanted.items()]
    pieces = {piece.key: piece.shape for leaf in leaves for piece in leaf.pieces}
    faults = [fault for key, shape in pieces.items() if (fault := find_fault(source, key, shape))]
    for key, (shape, _) in source.header.items():
        if key not in pieces and not any(re.fullmatch(sign, key) for sign in table.ignored):
            faults.append(f"{with_shape(key, shape)} is unknown")
    if faults:
        other = describe_header(source.header, table.sign)
        kind = f"seems to be {other}: " if other else ""
        raise PortError(kind + list_faults(faults) + describe_remedy(other))
    return leaves


def spell_table(table: Table, source: SafetensorsFile) -> Table:
    """The table with names as this source has them: with its prefix or without, and a key's second
    name where it has only that."""
    if not any(key.startswith(table.prefix) for key in source.header):
        table = table._replace(prefix="")
    only = {a: b for a, b in table.tied if b in source.header and a not in source.header}
    return table._replace(rows=tuple((ours, only.get(name, name)) for ours, name in table.rows))


def find_fault(source: SafetensorsFile, key: str, expected: tuple[int, ...], dtypes=DTYPES) -> str:
    """What is wrong with a tensor of a source of which another shape may be expected, or ""."""
    shape, dtype = source.header.get(key, (None, None))
    if shape is None:
        return f"{with_shape(key, expected)} is missing"
    if shape != expected:
        return misshapen(key, shape, expected)
    return "" if dtype in dtypes else f"{key} is of type {dtype}, not {' or '.join(dtypes)}"


def fetch(
    leaf: Leaf, source: SafetensorsFile, dtype=None, cut: tuple[slice, ...] = ()
) -> np.ndarray:
    """Our array of a planned leaf in `dtype`, or in one that holds those of what is read; with a
    `cut`, a slice for each axis, that part of it, and no more is read. PortError if it holds NaN or
    infinity."""
    wanted = to_ranges(leaf.shape, cut or [slice(None)] * len(leaf.shape))
    touched = []
    for piece in leaf.pieces:
        place = to_ranges(leaf.shape, piece.place)
        both = [
            range(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(place, wanted, strict=True)
        ]
        if all(both):
            touched.append((piece.key, place, both))
    keys = [key for key, *_ in touched] or [piece.key for piece in leaf.pieces]
    dtype = dtype or np.result_type(*(source.type(key) for key in keys))
    array = np.empty([len(span) for span in wanted], dtype)
    for key, place, both in touched:
        sizes = [len(span) for span in place]
        tensor = leaf.to_ours(source.map(key), sizes[-len(leaf.axes) :]).reshape(sizes)
        copy_blocks(tensor[shift(both, place)], array[shift(both, wanted)], key)
    return array


def to_ranges(shape, cut) -> list[range]:
    return [range(n)[span] for n, span in zip(shape, cut, strict=True)]


def shift(spans, origin) -> tuple[slice, ...]:
    """The index of some ranges in an array that covers the ranges `origin`."""
    pairs = zip(spans, origin, strict=True)
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in pairs)


def copy_blocks(tensor, array, key):
    """tensor -> array in its dtype, block by block along the axes that are slowest in the file."""
    if tensor.size <= BLOCK:
        array[...] = check_finite(tensor.astype(array.dtype), key)
        return
    axis = max(range(tensor.ndim), key=lambda i: (tensor.shape[i] > 1, tensor.strides[i]))
    step = max(1, BLOCK * tensor.shape[axis] // tensor.size)
    for start in range(0, tensor.shape[axis], step):
        block = (slice(None),) * axis + (slice(start, start + step),)
        copy_blocks(tensor[block], array[block], key)


def export_arrays(table: Table, arrays: Iterable) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, array) pairs -> foreign (key, array) pairs, by the rows that read them; lazy."""
    for path, array in arrays:
        leaf = lay_out(table, path, array.shape)
        for piece in leaf.pieces:
            yield piece.key, leaf.to_foreign(array[piece.place], piece.shape)


def convert_leaves(table: Table, leaves: list[Leaf], source: SafetensorsFile) -> Iterator:
    """Planned leaves of a source -> foreign (key, array) pairs of another table; lazy, and no more
    in memory than one tensor."""
    for ours in leaves:
        leaf = lay_out(table, ours.path, ours.shape)
        for piece in leaf.pieces:
            array = fetch(ours, source, cut=piece.place)
            yield piece.key, leaf.to_foreign(array, piece.shape)


def save_tensors(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]):
    """Write a safetensors file whose bytes depend on nothing else: the library leaves the order of
    the metadata to chance."""
    layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    stream_tensors(file, layout, tensors.items(), metadata)


def stream_tensors(file: Path, layout: dict[str, tuple], tensors: Iterable, metadata: dict):
    """Write (key, array) pairs in any order as a safetensors file, each to its place at once, which
    follows from `layout`, {key: (dtype, shape)} of them all."""
    order = list(SPELLINGS)
    header = {"__metadata__": metadata}
    starts = {}
    end = 0
    for key in sorted(layout, key=lambda key: (order.index(layout[key][0].name), key)):
        dtype, shape = layout[key]
        starts[key], end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": SPELLINGS[dtype.name], "shape": shape}
        header[key] = entry | {"data_offsets": (starts[key], end)}
    compact = dict(ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    text = json.dumps(header, **compact).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors:
            stream.seek(8 + len(text) + starts[key])
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def write_shards(folder: Path, stem: str, tensors: Iterable, dtype=None, max_bytes=10**10) -> int:
    """Write (key, array) pairs as STEM.safetensors, or as shards of at most `max_bytes` each (but
    for a tensor that is larger alone) with the index that diffusers and transformers read; in
    `dtype`, or each in its own. Returns how many were rounded; PortError if one overflows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, total, all_rounded = [], 0, 0
    try:
        for shard, rounded in group_tensors(tensors, dtype, max_bytes):
            part, all_rounded = folder / f"{stem}.{len(parts)}.part", all_rounded + rounded
            save_tensors(part, shard, {"format": "pt"})
            parts.append((part, list(shard)))
            total += sum(tensor.nbytes for tensor in shard.values())
    except BaseException:  # a disk that is full is not left so
        for part in folder.glob(f"{stem}.*.part"):
            part.unlink()
        raise
    for old in folder.glob(f"{stem}*.safetensors*"):
        old.unlink()
    if len(parts) == 1:
        os.replace(parts[0][0], folder / f"{stem}.safetensors")
        return all_rounded
    where = {}
    for n, (part, keys) in enumerate(parts, 1):
        name = f"{stem}-{n:05}-of-{len(parts):05}.safetensors"
        os.replace(part, folder / name)
        where |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return all_rounded


def group_tensors(tensors, dtype, max_bytes) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(key, array) pairs in `dtype` as dicts of at most `max_bytes`, at least one, and how many in
    each were rounded."""
    shard, size, rounded = {}, 0, 0
    for key, exact in tensors:
        with np.errstate(over="ignore"):
            tensor = exact.astype(dtype or exact.dtype)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard, rounded
            shard, size, rounded = {}, 0, 0
        if tensor.dtype != exact.dtype and not np.array_equal(tensor.astype(exact.dtype), exact):
            if not np.isfinite(tensor).all():
                raise PortError(f"{key} holds numbers too large for {dtype}; take another type")
            rounded += 1
        shard[key] = tensor
        size += tensor.nbytes
    yield shard, rounded
