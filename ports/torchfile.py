"""PyTorch's own files (.pth, .pt, .bin) read and written without torch; nothing of them is run.

A pickle is a program for a stack machine, and an unpickler calls whatever it names. So its opcodes
are read first, and only those of plain data may be among them; then an Unpickler runs it which
knows a few names and gives for each what is inert. Tensors lie outside the pickle as raw bytes and
are read when asked for.
Sources: pytorch/pytorch:torch/serialization.py (the layout), torch/_utils.py (what a tensor is);
python/cpython:Lib/pickletools.py (opcodes) and Modules/_pickle.c (what they do).
"""

import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vcloze_jax.ports.diagnose import PortError
from vcloze_jax.ports.engine import DTYPES, NUMBERS, check_finite, unwrap_keys

OPCODES = (  # of plain data, of calls of a name, and of what lies outside
    "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE SHORT_BINBYTES EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS MARK BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET "
    "GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"
).split()
DICT, TENSOR = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
KINDS = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
COUNTS = {"DoubleStorage": "F64", "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16"}
COUNTS |= {"CharStorage": "I8", "ByteStorage": "U8"}  # read, so that what they hold can be named
STORAGES = {f"torch.{name}": dtype for name, dtype in (KINDS | COUNTS).items()}
BOOKKEEPING = "step", "epoch", "global_step"  # numbers that lie beside tensors and may be left
WORDS = ((dict, "a table"), (list | tuple, "a list"), (str, "a text"), (int | float, "a number"))
NEW_DICT = b"ccollections\nOrderedDict\n)R"
LONGEST = 1 << 24  # of a pickle without its tensors; a number in it must not ask for more memory
BROKEN = (ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, OverflowError)
BROKEN += (pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError)
BROKEN += (RuntimeError,)  # of zipfile, for an entry with a password


class Storage(NamedTuple):
    dtype: str
    key: str
    size: int  # numbers


class Tensor(NamedTuple):
    storage: Storage
    offset: int  # numbers, as the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StateDict(dict):
    """A dict whose keys are text, or an optimizer's numbers, each there once. What else it is told
    of itself (the versions of modules) is not kept."""

    __slots__ = ()

    def __setitem__(self, key, value):
        if type(key) not in (str, int):  # and is not hashed: a deep tuple would exhaust the C stack
            raise PortError("its pickle has a key that is no text; save a state dict")
        if key in self:
            raise PortError(f"{key!r} is there twice")
        super().__setitem__(key, value)

    def __setstate__(self, state):
        pass


class Name(str):
    """A name that a pickle may call. It has no attribute that a pickle could set."""

    __slots__ = ()

    def __call__(self, *arguments):
        if self == DICT and not arguments:
            return StateDict()
        if self == TENSOR and isinstance(arguments[0], Storage):
            return Tensor(*arguments[:4])
        if self == PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        raise PortError("its pickle calls something with arguments that are not known")


class Unpickler(pickle.Unpickler):
    """Knows the names that a state dict is made of, and that its storages lie elsewhere."""

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name in (DICT, TENSOR, PARAMETER, *STORAGES):
            return Name(name)
        raise PortError(
            f"its pickle names {name!r}, which is no part of a file of weights; nothing of it was "
            "run. Do not load it elsewhere: take the safetensors file"
        )

    def persistent_load(self, pid):
        kind, name, key, _location, size = pid
        if kind != "storage" or type(name) is not Name or type(key) is not str:
            raise PortError("its pickle holds a storage of a kind that is not known")
        return Storage(STORAGES[name], key, size)


def check_opcodes(program: bytes) -> bytes:
    """A pickle with nothing but opcodes of plain data, each dict of it a StateDict; PortError if
    there are others, or numbers that would take memory."""
    stream, checked = io.BytesIO(program), bytearray()
    for count, (opcode, value, start) in enumerate(pickletools.genops(stream)):
        if opcode.name == "EMPTY_DICT":
            checked += NEW_DICT
        elif opcode.name not in OPCODES or ("BINPUT" in opcode.name and value > count):
            raise PortError(f"its pickle says {opcode.name} ({value!r}), which no tensor needs")
        elif opcode.name != "FRAME":  # whose length would no longer be right
            checked += program[start : stream.tell()]
    return bytes(checked)


class TorchFile:
    """A state dict that torch.save wrote, as engine.SafetensorsFile shows a safetensors file.

    PortError if it is cut or no state dict, if its pickle holds anything but tensors and numbers of
    BOOKKEEPING, or if it is of torch before 1.6, which wrote no zip.
    """

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":
                raise PortError(
                    "is a bare pickle, as torch before 1.6 wrote them; nothing of it was run. If "
                    "you trust it, save it again with a newer torch"
                )
        try:
            self.zipped = zipfile.ZipFile(path)
            entries, self.storages = read_zip(self.zipped, path.stat().st_size)
            entries = drop_numbers(entries)
            entries = {key: entries[name] for key, name in unwrap_keys(entries).items()}
            self.tensors = {k: check_tensor(k, one, self.storages) for k, one in entries.items()}
        except BROKEN as error:
            raise PortError(f"is no whole file of torch.save ({error}); fetch it again") from error
        self.header = {key: (one.shape, one.storage.dtype) for key, one in self.tensors.items()}

    def map(self, key: str) -> np.ndarray:
        """One tensor; PortError if the checksum of its bytes is wrong."""
        one = self.tensors[key]
        dtype = np.dtype(NUMBERS[one.storage.dtype])
        try:
            data = np.frombuffer(self.zipped.read(self.storages[one.storage.key]), dtype)
        except BROKEN as error:
            raise PortError(f"{key} is damaged ({error}); fetch the file again") from error
        strides = [stride * dtype.itemsize for stride in one.strides]
        return np.lib.stride_tricks.as_strided(data[one.offset :], one.shape, strides)

    def type(self, key: str) -> str:
        """The name of a tensor's type in NumPy."""
        return NUMBERS[self.header[key][1]]

    def read(self, key: str) -> np.ndarray:
        """One tensor; PortError if it holds NaN or infinity."""
        return check_finite(np.array(self.map(key), order="C"), key)


def read_zip(zipped: zipfile.ZipFile, size: int):
    """-> the object of a zip of torch, of `size` bytes, and {storage's key: its entry}."""
    entries = {entry.filename: entry for entry in zipped.infolist()}
    name = next((name for name in entries if name.endswith("/data.pkl")), None)
    if name is None:
        raise PortError("is a zip file, but none of torch.save; unpack it, and give the file in it")
    folder = name.removesuffix("data.pkl")
    if any(entry.compress_type for entry in entries.values()):
        raise PortError("is packed; torch.save stores tensors as they are")
    if max(entry.file_size for entry in entries.values()) > size:
        raise PortError("is cut; fetch it again")
    if f"{folder}byteorder" in entries and zipped.read(f"{folder}byteorder") != b"little":
        raise PortError("was written on a big-endian machine; save it again on another")
    with zipped.open(name) as stream:
        program = check_opcodes(stream.read(LONGEST))
    storages = {name.removeprefix(f"{folder}data/"): entry for name, entry in entries.items()}
    return Unpickler(io.BytesIO(program)).load(), storages


def drop_numbers(entries) -> dict:
    """The entries of a state dict without numbers of BOOKKEEPING. PortError if it is none: if it is
    a checkpoint of several, or holds what is neither a tensor nor such a number."""
    if not isinstance(entries, dict):
        raise PortError("is a file of torch.save, but no state dict")
    if any(type(key) is int for key in entries):
        raise PortError("its pickle has a key that is no text; save a state dict")
    tables = [key for key, one in entries.items() if isinstance(one, dict)]
    states = [key for key in tables if any(isinstance(x, Tensor) for x in entries[key].values())]
    if states:
        names = " or ".join(map(repr, states[:3]))
        how = f"torch.save(torch.load(FILE)[{states[0]!r}], NEW)"
        raise PortError(f"is a checkpoint; save its entry {names} alone, as {how}")
    kept = {}
    for key, one in entries.items():
        number = type(one) in (int, float, bool)
        number |= isinstance(one, Tensor) and one.shape in ((), (1,))
        if key in BOOKKEEPING and number:
            continue
        if not key.isprintable() or not isinstance(one, Tensor):
            kind = next((f" but {word}" for kind, word in WORDS if isinstance(one, kind)), "")
            raise PortError(f"{key!r} is no tensor{kind}; save a state dict and nothing else")
        kept[key] = one
    return kept


def check_tensor(key: str, one: Tensor, storages) -> Tensor:
    """The tensor, or PortError where it reaches beyond its storage."""
    numbers = (one.offset, one.storage.size, *one.shape, *one.strides)
    if len(one.shape) != len(one.strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise PortError(f"{key} has no shape that a tensor can have")
    size = int(np.prod([n or 1 for n in one.shape], dtype=object))
    reach = sum((n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True))
    itemsize = np.dtype(NUMBERS[one.storage.dtype]).itemsize
    whole = storages[one.storage.key].file_size == one.storage.size * itemsize
    if not whole or max(one.offset + reach + 1, size) > one.storage.size and 0 not in one.shape:
        raise PortError(f"{key} reaches beyond its storage; the file is damaged")
    return one


def save(path: Path, tensors: dict[str, np.ndarray]):
    """Write a state dict that torch.load(path, weights_only=True) reads; arrays of DTYPES."""
    kinds = {np.dtype(DTYPES[code]): name for name, code in KINDS.items()}
    program = [b"\x80\x02", NEW_DICT, b"("]
    tensors = {key: np.asarray(x, order="C") for key, x in tensors.items()}
    for i, (key, x) in enumerate(tensors.items()):
        strides = tuple(stride // x.itemsize for stride in x.strides)
        program += [opcodes(key), b"ctorch._utils\n_rebuild_tensor_v2\n((", opcodes("storage")]
        program += [f"ctorch\n{kinds[x.dtype]}\n".encode(), opcodes(str(i)), opcodes("cpu")]
        program += [opcodes(x.size), b"tQ", opcodes(0), opcodes(x.shape), opcodes(strides)]
        program += [b"\x89", NEW_DICT, b"tR"]
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
