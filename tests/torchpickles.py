"""Pickles of torch, made opcode by opcode, and what is read of them."""

import zipfile

import ml_dtypes
import numpy as np

from vcloze_jax.ports import torchfile

STATE = {
    "img_in.lora_A.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "img_in.lora_B.weight": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "img_in.lora_B.bias": np.arange(2, dtype=np.float16),
}


def read(file):
    source = torchfile.TorchFile(file)
    return {key: source.read(key) for key in source.header}


def equal(left, right):
    assert list(left) == list(right)
    for key, x in left.items():
        assert x.dtype == right[key].dtype and x.shape == right[key].shape, key
        assert x.tobytes() == right[key].tobytes(), key


def repacked(file, program=None, drop=(), compression=zipfile.ZIP_STORED, **entries):
    """A zip of torch with another pickle, or with other entries."""
    with zipfile.ZipFile(file) as zipped:
        old = {name: zipped.read(name) for name in zipped.namelist()}
    old |= {"adapter/data.pkl": program} if program is not None else {}
    old |= {f"adapter/{name}": data for name, data in entries.items()}
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, data in old.items():
            if name.removeprefix("adapter/") not in drop:
                zipped.writestr(name, data)
    return file


def op(text):
    return b"\x80\x02" + text + b"."


def table(**entries):
    """The pickle of a dict of texts to opcodes."""
    return op(nested(**entries))


def nested(**entries):
    pairs = (torchfile.opcodes(key) + value for key, value in entries.items())
    return b"}(" + b"".join(pairs) + b"u"


def tensor(offset=0, shape=(3, 4), strides=(4, 1), size=12, key="0", kind="Float"):
    """The opcodes of a tensor of storage `key`."""
    numbers = b"".join(torchfile.opcodes(x) for x in (offset, shape, strides))
    name = b"ctorch\n" + kind.encode() + b"Storage\n"
    place = torchfile.opcodes("storage") + name + torchfile.opcodes(key) + torchfile.opcodes("cpu")
    place = b"(" + place + torchfile.opcodes(size) + b"tQ"
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + numbers + b"\x89"
    return start + b"ccollections\nOrderedDict\n)RtR"
