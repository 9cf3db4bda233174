"""Laws of the tensors in a pickle of torch: none reaches out of its storage."""

import numpy as np
import pytest
from torchpickles import STATE, equal, nested, read, repacked, table, tensor

from vcloze_jax.ports import torchfile
from vcloze_jax.ports.diagnose import PortError


@pytest.fixture
def file(tmp_path):
    torchfile.save(tmp_path / "lora.pth", STATE)
    return tmp_path / "lora.pth"


def one_tensor(offset=0, shape=(3, 4), strides=(4, 1), size=12, key="0", kind="Float"):
    """The pickle of {"a": a tensor of storage `key`}."""
    return table(a=tensor(offset, shape, strides, size, key, kind))


def parameter(data):
    """The opcodes of a torch.nn.Parameter of a tensor."""
    end = b"\x88ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_parameter\n(" + data + end


def test_parameters_and_counters(file):
    """Parameters are tensors; a number called as a counter of steps, be it in a tensor of integers,
    is left away."""
    counter = tensor(shape=(), strides=(), size=6, kind="Long")
    entries = dict(step=counter, epoch=b"K\x05", global_step=b"G" + bytes(8))
    got = read(repacked(file, table(a=parameter(tensor()), **entries)))
    equal(got, {"a": STATE["img_in.lora_A.weight"]})


BESIDE = {
    "a text": (dict(base=b"X\x04\x00\x00\x00flux"), "'base' is no tensor but a text; save a state"),
    "a number": (dict(alpha=b"G" + bytes(8)), "'alpha' is no tensor but a number"),
    "a boolean": (dict(ema=b"\x88"), "'ema' is no tensor but a number"),
    "a list": (dict(names=b"]"), "'names' is no tensor but a list"),
    "a table": (dict(config=b"}"), "'config' is no tensor but a table"),
    "nothing": (dict(config=b"N"), "'config' is no tensor; save a state dict"),
    "many steps": (dict(step=tensor(shape=(6,), strides=(1,), size=3, kind="Long")), "step"),
    "Lightning": (
        dict(state_dict=nested(a=tensor()), epoch=b"K\x05"),
        "is a checkpoint; save its entry 'state_dict' alone, as torch.save.torch.load",
    ),
    "an optimizer's": (
        dict(
            model=nested(a=parameter(tensor())),
            optimizer=nested(state=b"}K\x00" + nested(exp_avg=tensor()) + b"s", lr=b"G" + bytes(8)),
        ),
        "save its entry 'model' alone",
    ),
    "a parameter of none": (dict(a=parameter(b"K\x05")), "arguments that are not known"),
    "a parameter beyond": (dict(a=parameter(tensor(offset=1))), "a reaches beyond its storage"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_tensors(file, kind):
    """Anything else beside tensors says what it is, and a checkpoint which entry to save alone."""
    entries, words = BESIDE[kind]
    with pytest.raises(PortError, match=words) as error:
        torchfile.TorchFile(repacked(file, table(**entries)))
    assert "\n" not in str(error.value)


def test_views(file):
    """Transposed tensors and parts of a storage are read as torch shows them."""
    data = np.arange(12, dtype=np.float32)
    got = read(repacked(file, one_tensor(1, (2, 3), (1, 4))))
    np.testing.assert_array_equal(got["a"], data[:12].reshape(3, 4).T[1:3])
    assert read(repacked(file, one_tensor(0, (), ())))["a"].shape == ()
    assert read(repacked(file, one_tensor(0, (0, 4), (4, 1))))["a"].shape == (0, 4)


VIEWS = {
    "beyond": dict(shape=(4, 4)),
    "offset": dict(offset=1),
    "strides": dict(strides=(5, 1)),
    "negative stride": dict(strides=(-4, 1)),
    "negative offset": dict(offset=-1),
    "negative size": dict(shape=(-3, 4)),
    "4 TiB": dict(shape=(1 << 20, 1 << 20), strides=(0, 0)),
    "huge": dict(shape=(1 << 60, 1 << 60), strides=(0, 0)),
    "ranks differ": dict(strides=(1,)),
    "boolean": dict(shape=(True, 4)),
    "text": dict(shape="ab"),
    "storage too long": dict(size=13),
    "storage too short": dict(size=11),
    "no storage": dict(key="9"),
    "doubles": dict(kind="Double"),
    "other type": dict(kind="Half"),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_tensors_stay_inside_their_storage(file, kind):
    """No shape, stride or offset reaches beyond the bytes that are there, and none makes memory out
    of nothing."""
    with pytest.raises(PortError):
        torchfile.TorchFile(repacked(file, one_tensor(**VIEWS[kind])))
