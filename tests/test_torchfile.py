"""Pickles of torch: read as data, never run."""

import copyreg
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from torchpickles import STATE, equal, op, read, repacked

from vcloze_jax.ports import torchfile
from vcloze_jax.ports.adapters import open_adapter
from vcloze_jax.ports.diagnose import PortError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path):
    torchfile.save(tmp_path / "lora.pth", STATE)
    return tmp_path / "lora.pth"


def test_what_is_written_is_read(file):
    """A state dict comes back to the last bit."""
    equal(read(file), STATE)


class Call:
    """What pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts if self.parts[2] is not None else self.parts[:2]


EVIL = {
    "os.system": lambda c: Call(os.system, f"touch {c}"),
    "eval": lambda c: Call(eval, f"open({str(c)!r}, 'w')"),
    "exec": lambda c: Call(exec, f"open({str(c)!r}, 'w')"),
    "open": lambda c: Call(open, str(c), "w"),
    "getattr": lambda c: Call(getattr, Call(__import__, "os"), "system"),
    "inside a list": lambda c: {"a": [1, (2, Call(os.system, f"touch {c}"))]},
    "as a key": lambda c: {Call(os.system, f"touch {c}"): 1},
    "in a state": lambda c: Call(OrderedDict, state={"x": Call(os.system, f"touch {c}")}),
    "arguments of a dict": lambda c: Call(OrderedDict, [("a", Call(os.system, f"touch {c}"))]),
    "setstate": lambda c: Call(Path, str(c), state=(None, {"x": 1})),
    "numpy": lambda c: np.ones(3),
    "copyreg": lambda c: Call(copyreg._reconstructor, Path, object, None),
    "class": lambda c: Call,
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", EVIL)
def test_nothing_runs(file, tmp_path, kind, protocol):
    """A pickle that calls anything is refused in one line, in a zip of torch and bare, and whatever
    it wanted to do is not done."""
    canary = tmp_path / "canary"
    evil = pickle.dumps(EVIL[kind](canary), protocol)
    for spoiled in (repacked(file, evil), bare(tmp_path / "bare.pth", evil)):
        with pytest.raises(PortError) as error:
            open_adapter(spoiled)
        assert "\n" not in str(error.value)
        if protocol > 1 and "bare" not in spoiled.name:
            assert re.search(r"names '[\w.]+', which is no part|is no tensor", str(error.value))
    assert not canary.exists()


def bare(file, data):
    file.write_bytes(data)
    return file


RAW = {
    "INST": b"(S'touch canary'\nios\nsystem\n",
    "OBJ": b"(cos\nsystem\nS'touch canary'\no",
    "NEWOBJ of a dict": b"ccollections\nOrderedDict\n)\x81",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pkey\n",
    "call of a number": b"K\x01)R",
    "call of a text": b"X\x0b\x00\x00\x00collections)R",
    "a storage called": b"ctorch\nFloatStorage\n)R",
    "tensor of no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR",
    "text as a storage": b"(X\x07\x00\x00\x00storageX\x05\x00\x00\x00torchtQ",
    "empty stack": b"R",
    "no mark": b"t",
    "memo that is not": b"h\x07",
    "dict of itself": b"}q\x00h\x00h\x00s",
    "itself as a value": b"}q\x00X\x01\x00\x00\x00ah\x00s",
    "more than there is": b"X\xff\xff\xff\x7fa",
    "4 EiB": b"\x96" + b"\xff" * 7 + b"\x3f",
    "a tuple": b"K\x01\x85",
    "no tensor": b"}X\x01\x00\x00\x00aK\x01s",
    "number as key": b"}K\x01K\x01s",
    "twice": b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu",
    "a deep tuple as key": b"}K\x01"
    + b"\x85" * 300_000
    + b"Ns",  # its hash would exhaust the C stack
    "a deep tuple as storage": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x01"
    + b"\x85" * 300_000
    + b"X\x03\x00\x00\x00cpuK\x01tQ",
    "a memo of 32 GB": b"}r\xff\xff\xff\x7f",
    "state of a name": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb",
    "slots of a name": b"ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b",
}


@pytest.mark.parametrize("kind", RAW)
def test_other_programs_are_refused(file, kind):
    """Opcodes beyond those of data, calls of what is no name and programs that fail are errors."""
    with pytest.raises(PortError):
        torchfile.TorchFile(repacked(file, op(RAW[kind])))


def test_damaged_files(file):
    """Packed, big-endian, cut, without pickle, with a wrong checksum or from before zips: errors;
    NaN is named."""
    whole = file.read_bytes()
    for change in (
        dict(compression=zipfile.ZIP_DEFLATED),
        dict(byteorder=b"big"),
        dict(drop=("data.pkl",)),
        dict(drop=("data/1",)),
    ):
        file.write_bytes(whole)
        with pytest.raises(PortError):
            torchfile.TorchFile(repacked(file, **change))
    for length in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(PortError):
            torchfile.TorchFile(file)
    at = whole.index(STATE["img_in.lora_A.weight"].tobytes())
    file.write_bytes(whole[: at + 5] + b"\xff" + whole[at + 6 :])
    with pytest.raises(PortError, match="img_in.lora_A.weight is damaged"):
        read(file)
    torchfile.save(file, STATE | {"img_in.lora_B.bias": np.float32([np.nan, 0])})
    with pytest.raises(PortError, match="img_in.lora_B.bias holds NaN"):
        read(file)
    bare(file, b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001)))
    with pytest.raises(PortError, match="torch before 1.6 .* save it again with a newer torch"):
        open_adapter(file)


def test_fuzz(file, tmp_path):
    """A file with some bytes changed is refused, or it gives finite tensors: no other end."""
    rng, whole = np.random.default_rng(0), np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(300):
        data = whole.copy()
        data[rng.integers(len(data), size=rng.integers(1, 4))] = rng.integers(256)
        try:
            got = read(bare(tmp_path / "fuzzed.pth", data.tobytes()))
        except PortError as error:
            assert "\n" not in str(error)
        else:
            assert all(np.isfinite(x).all() for x in got.values())


def test_no_other_unpickler():
    """The one Unpickler of ours is the one above; nothing else unpickles or evaluates."""
    bad = re.compile(
        r"pickle\.(load|Unpickler\()|allow_pickle=True|(?<!\.)\b(eval|exec)\(|os\.system"
    )
    for file in (*ROOT.glob("ports/**/*.py"), *ROOT.glob("vcloze_jax/**/*.py"), *ROOT.glob("*.py")):
        assert not bad.search(text := file.read_text()), file
        assert "Unpickler" not in text or file.name == "torchfile.py", file


@pytest.mark.parity
def test_torch_reads_and_writes_them(file, tmp_path):
    """torch.load(weights_only=True) reads what we write, mapped too; we read what torch.save
    writes, with a module's versions, shared and transposed storages, but for its oldest layout."""
    torch = pytest.importorskip("torch")
    for options in ({}, {"mmap": True}):
        theirs = torch.load(file, weights_only=True, **options)
        for key, x in STATE.items():
            np.testing.assert_array_equal(theirs[key].float().numpy(), x.astype(np.float32))
            assert str(theirs[key].dtype) == f"torch.{x.dtype}"
    state = torch.nn.Linear(5, 3).state_dict()
    assert state._metadata
    state["t"] = torch.arange(12.0).reshape(3, 4).T[1:]
    state["half"] = state["weight"][1:].to(torch.bfloat16)
    state["shared"] = state["weight"][:, 2]
    torch.save(state, tmp_path / "a.pth")
    got = read(tmp_path / "a.pth")
    assert list(got) == list(state)
    for key, x in state.items():
        np.testing.assert_array_equal(got[key].astype(np.float32), x.float().numpy())
    beside = {"step": torch.tensor(5), "epoch": 5, "global_step": 0.5}
    torch.save(dict(torch.nn.Linear(5, 3).named_parameters()) | beside, tmp_path / "a.pth")
    assert list(read(tmp_path / "a.pth")) == ["weight", "bias"]
    model = torch.nn.Linear(5, 3)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(5)).sum().backward()
    adam.step()
    parts = {"model": model.state_dict(), "optimizer": adam.state_dict(), "epoch": 5}
    torch.save(parts, tmp_path / "a.pth")
    with pytest.raises(PortError, match="is a checkpoint; save its entry 'model' alone"):
        read(tmp_path / "a.pth")
    torch.save([state], tmp_path / "a.pth")
    with pytest.raises(PortError, match="no state dict"):
        read(tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(PortError, match="save it again with a newer torch"):
        read(tmp_path / "a.pth")
