"""PyTorch's own files (.pth, .pt, .bin) read and written as data: no torch and no unpickler.

A pickle is a program for a stack machine, and an unpickler calls whatever it names. `contents`
reads its opcodes on a machine that can call nothing: it holds the opcodes of plain data, and of
names only those below, which stand for a tensor, a dict and a storage; any other is refused by
name. Tensors lie outside the pickle as raw bytes and are read when asked for.
Sources: pytorch/pytorch:torch/serialization.py (both layouts), torch/_utils.py (what a tensor is);
python/cpython:Lib/pickletools.py (opcodes).
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ports.read import DTYPES, PortError, finite

DICT, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
KINDS = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
STORAGES = {f"torch {name}": dtype for name, dtype in KINDS.items()}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
COUNTS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
COUNTS |= dict.fromkeys(("TUPLE", "APPENDS", "SETITEMS"))  # all down to the mark
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how a file of torch before 1.6 begins
LONGEST = 1 << 26  # of a pickle without its tensors; a number in it must not ask for more memory
BROKEN = (ValueError, LookupError, TypeError, AttributeError, EOFError, OSError)
BROKEN += (struct.error, zipfile.BadZipFile, NotImplementedError, OverflowError)
BROKEN += (RuntimeError,)  # of zipfile, for an entry with a password
FOREIGN = "was written on a big-endian machine; save it again on another"


class Name(str):
    """A name that a pickle would have called."""


class Storage(NamedTuple):
    dtype: str
    key: str
    size: int  # numbers


class Tensor(NamedTuple):
    storage: Storage
    offset: int  # numbers, as the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Source:
    """A state dict that torch.save wrote, as read.Source shows a safetensors file.

    PortError if it is cut or no state dict, or its pickle holds anything but tensors of DTYPES.
    """

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}
        try:
            entries, self.storages = (unzip if zipfile.is_zipfile(path) else unroll)(path)
            if not isinstance(entries, dict):
                raise PortError("is a file of torch.save, but no state dict")
            self.tensors = {key: check(key, one, self.storages) for key, one in entries.items()}
        except BROKEN as error:
            raise PortError(f"is no whole file of torch.save ({error})") from error
        self.header = {key: (one.shape, one.storage.dtype) for key, one in self.tensors.items()}

    def map(self, key: str) -> np.ndarray:
        """One tensor; PortError if the checksum of its bytes is wrong."""
        one = self.tensors[key]
        dtype = np.dtype(DTYPES[one.storage.dtype])
        try:
            data = np.frombuffer(self.storages[one.storage.key].read(), dtype)
        except BROKEN as error:
            raise PortError(f"{key} is damaged ({error}); fetch the file again") from error
        strides = [stride * dtype.itemsize for stride in one.strides]
        return np.lib.stride_tricks.as_strided(data[one.offset :], one.shape, strides)

    def read(self, key: str) -> np.ndarray:
        """One tensor; PortError if it holds NaN or infinity."""
        return finite(np.array(self.map(key), order="C"), key)


class Bytes(NamedTuple):
    """Where a storage lies: how many bytes it has, and how they are read."""

    size: int
    read: Callable[[], bytes]


def unzip(path):
    """-> the object of a zip of torch, {storage's key: Bytes}."""
    zipped = zipfile.ZipFile(path)
    entries = {entry.filename: entry for entry in zipped.infolist()}
    (name,) = (name for name in entries if name.endswith("/data.pkl"))
    folder = name.removesuffix("data.pkl")
    if any(entry.compress_type for entry in entries.values()):
        raise PortError("is packed; torch.save stores tensors as they are")
    if max(entry.file_size for entry in entries.values()) > path.stat().st_size:
        raise PortError("is cut; fetch it again")
    if f"{folder}byteorder" in entries and zipped.read(f"{folder}byteorder") != b"little":
        raise PortError(FOREIGN)
    with zipped.open(name) as stream:
        found = contents(io.BytesIO(stream.read(LONGEST)))
    return found, {
        entry.filename.removeprefix(f"{folder}data/"): Bytes(
            entry.file_size, partial(zipped.read, entry)
        )
        for entry in entries.values()
    }


def unroll(path):
    """The same of a file of torch before 1.6: five pickles, then storages with their lengths."""
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(LONGEST))
        if contents(stream) != MAGIC or contents(stream) != PROTOCOL:
            raise PortError("is a pickle, but none of torch.save")
        if not contents(stream)["little_endian"]:
            raise PortError(FOREIGN)
        found, keys = contents(stream), contents(stream)
        tensors = [one for one in found.values() if isinstance(one, Tensor)]
        dtypes = {one.storage.key: np.dtype(DTYPES[one.storage.dtype]) for one in tensors}
        storages, start = {}, stream.tell()
        for key in keys:
            file.seek(start)
            (count,) = struct.unpack("<q", file.read(8))
            size = count * dtypes[key].itemsize
            storages[key] = Bytes(size, partial(stretch, path, start + 8, size))
            start += 8 + size
        if start > path.stat().st_size:
            raise PortError("is cut; fetch it again")
    return found, storages


def stretch(path, start, size):
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def check(key, one, storages):
    """The tensor, or PortError where it is none or reaches beyond its storage."""
    if not isinstance(key, str) or not key.isprintable() or not isinstance(one, Tensor):
        raise PortError(f"{key!r} is no tensor; save a state dict and nothing else")
    numbers = (one.offset, one.storage.size, *one.shape, *one.strides)
    if len(one.shape) != len(one.strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise PortError(f"{key} has no shape that a tensor can have")
    size = int(np.prod([n or 1 for n in one.shape], dtype=object))
    reach = sum((n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True))
    itemsize = np.dtype(DTYPES[one.storage.dtype]).itemsize
    whole = storages[one.storage.key].size == one.storage.size * itemsize
    if not whole or max(one.offset + reach + 1, size) > one.storage.size and 0 not in one.shape:
        raise PortError(f"{key} reaches beyond its storage; the file is damaged")
    return one


def contents(stream):
    """What one pickle holds, as dicts, lists, tuples, numbers, text and Tensors."""
    stack, marks, memo = [], [], {}

    def popped(count=None):
        start = marks.pop() if count is None else len(stack) - count
        top = stack[start:]
        del stack[start:]
        return top

    for opcode, value, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if opcode.name == "EMPTY_DICT" else [])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(COUNTS[opcode.name])))
            case "APPEND" | "APPENDS":
                items = popped(COUNTS[opcode.name])
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = popped(COUNTS[opcode.name])
                put(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if value is None else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(known(value or " ".join(popped(2))))
            case "BINPERSID":
                stack.append(storage(*stack.pop()))
            case "REDUCE":
                stack.append(made(*popped(2)))
            case "BUILD":  # attributes of the dict: versions of modules, nothing of tensors
                popped(1)
            case other:
                raise PortError(f"its pickle says {other} ({value!r}), which no tensor needs")
    raise EOFError("its pickle does not end")


def put(found, items):
    """Keys and values in turn into a dict; the same key twice is an error."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key in found:
            raise PortError(f"{key!r} is there twice")
        found[key] = value


def known(name):
    """A name that may stand in a pickle of tensors, or PortError."""
    if name not in (DICT, TENSOR, *STORAGES):
        name = name.replace(" ", ".")
        raise PortError(
            f"its pickle names {name!r}, which is no part of a file of weights; nothing of it was "
            "run. Do not load it elsewhere: take the safetensors file"
        )
    return Name(name)


def storage(kind, name, key, _location, size, view=None):
    if kind != "storage" or type(name) is not Name or view is not None:
        raise PortError("its pickle holds a storage of a kind that is not known")
    return Storage(STORAGES[name], key, size)


def made(name, arguments):
    """The value of the two calls that a state dict is made of."""
    if type(name) is Name and name == DICT and arguments == ():
        return {}
    if type(name) is Name and name == TENSOR and isinstance(arguments[0], Storage):
        return Tensor(*arguments[:4])
    raise PortError("its pickle calls something with arguments that are not known")


def save(path: Path, tensors: dict[str, np.ndarray]):
    """Write a state dict that torch.load(path, weights_only=True) reads; arrays of DTYPES."""
    kinds = {np.dtype(DTYPES[code]): name for name, code in KINDS.items()}
    program = [b"\x80\x02", b"ccollections\nOrderedDict\n)R("]
    tensors = {key: np.asarray(x, order="C") for key, x in tensors.items()}
    for i, (key, x) in enumerate(tensors.items()):
        strides = tuple(stride // x.itemsize for stride in x.strides)
        program += [opcodes(key), b"ctorch._utils\n_rebuild_tensor_v2\n((", opcodes("storage")]
        program += [f"ctorch\n{kinds[x.dtype]}\n".encode(), opcodes(str(i)), opcodes("cpu")]
        program += [opcodes(x.size), b"tQ", opcodes(0), opcodes(x.shape), opcodes(strides)]
        program += [b"\x89ccollections\nOrderedDict\n)RtR"]
    program += [b"u."]
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("adapter/data.pkl"), b"".join(program))
        zipped.writestr(zipfile.ZipInfo("adapter/byteorder"), "little")
        for i, x in enumerate(tensors.values()):
            entry = zipfile.ZipInfo(f"adapter/data/{i}")
            gap = -(zipped.fp.tell() + 30 + len(entry.filename) + 4) % 64
            entry.extra = b"FB" + struct.pack("<H", gap) + bytes(gap)  # so that it can be mapped
            zipped.writestr(entry, x.tobytes())
        zipped.writestr(zipfile.ZipInfo("adapter/version"), "3\n")


def opcodes(value) -> bytes:
    """The opcodes that push a number, text or tuple of numbers."""
    return pickle.dumps(value, 2)[2:-1]
