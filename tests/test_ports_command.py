"""Laws of python -m ports: the same folder of any layout, with every bit, or one line."""

import re

import folders
import ml_dtypes
import numpy as np
from folders import FLUX, PRESET, same, tensors
from safetensors.numpy import load_file

from vcloze_jax.ports import __main__ as command
from vcloze_jax.storage import weights


def files(folder):
    return {file.relative_to(folder) for file in folder.rglob("*.*") if file.is_file()}


def test_command(saved, bfl, tmp_path, capsys):
    """`python -m ports` makes the same folder of ours, in the type of the source, of any layout,
    with all that lay beside the tensors and the JSON files that lacked; doing it twice changes no
    byte."""
    (loose := folders.copy(bfl, tmp_path / "loose")).joinpath("old.pth").write_bytes(b"x")
    kinds = {"first": saved, "second": tmp_path / "first", "third": loose}
    for name, source in kinds.items():
        assert command.main([str(source), "--out", str(tmp_path / name)]) == 0
        assert files(tmp_path / name) == files(saved)
        assert "weights: " in capsys.readouterr().out
        assert weights.checked_preset(tmp_path / name).flux == FLUX
    for file in files(saved):
        if file.suffix == ".safetensors":
            first, *others = ((tmp_path / name / file).read_bytes() for name in kinds)
            assert all(first == other for other in others), file
    same(tensors(tmp_path / "third", PRESET), tensors(saved, PRESET))


def test_nothing_of_the_users_is_replaced(saved, tmp_path, capsys):
    """Not even what has the name of an unfinished folder."""
    (there := tmp_path / "new.part").mkdir()
    (there / "notes.txt").write_text("mine")
    assert command.main([str(saved), "--out", str(tmp_path / "new")]) == 2
    assert "new.part: is in the way" in capsys.readouterr().err
    assert (there / "notes.txt").read_text() == "mine"


def test_command_keeps_types(saved, tmp_path, capsys):
    """Every tensor keeps its own type and bits, also among those that we hold as one; --dtype
    changes it and says how many were rounded, and an overflow is an error."""
    source, kinds = folders.copy(saved, tmp_path / "source"), ("float32", "float16", "bfloat16")
    for file in source.rglob("*.safetensors"):
        mixed = {n: kinds[n % 3] for n in range(len(load_file(file)))}
        change_types = lambda d, mixed=mixed: {  # noqa: E731
            key: x.astype(mixed[n]) for n, (key, x) in enumerate(d.items())
        }
        folders.change(file, change_types)
    count, rounded = 0, 0
    assert command.main([str(source), "--out", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out.endswith("kept: a complete weights folder\n")
    argv = [str(source), "--out", str(tmp_path / "changed"), "--dtype", "bfloat16"]
    assert command.main(argv) == 0
    for file in source.rglob("*.safetensors"):
        before, name = load_file(file), file.relative_to(source)
        kept, changed = (load_file(tmp_path / out / name) for out in ("kept", "changed"))
        assert before.keys() == kept.keys() == changed.keys()
        for key, x in before.items():
            assert kept[key].dtype == x.dtype and kept[key].tobytes() == x.tobytes(), key
            assert changed[key].dtype == ml_dtypes.bfloat16
            rounded += bool((changed[key].astype(x.dtype) != x).any())
            count += 1
    assert 0 < rounded < count
    line = f"folder, {rounded} tensors were rounded to bfloat16\n"
    assert capsys.readouterr().out.endswith(line)
    argv[2:] = [str(tmp_path / "again"), "--dtype", "float32"]
    assert command.main(argv) == 0
    assert capsys.readouterr().out.endswith("folder, no tensors were rounded to float32\n")
    key = "encoder.conv_in.bias"
    file = source / "vae/diffusion_pytorch_model.safetensors"
    folders.change(file, lambda d: d | {key: np.full(4, 1e5, np.float32)})
    argv[2:] = [str(tmp_path / "more"), "--dtype", "float16"]
    assert command.main(argv) == 2
    assert f"{key} holds numbers too large for float16" in capsys.readouterr().err


def test_command_refuses(saved, tmp_path, capsys):
    """Errors of the command are one line and exit code 2, and leave nothing behind."""
    source = folders.copy(saved, tmp_path / "source")
    for file in source.rglob("vae/*.safetensors"):
        folders.change(file, lambda d: d | {"encoder.conv_in.bias": np.full(4, np.nan, np.float32)})
    for path, out, words in (
        (saved, source, "exists already"),
        (tmp_path / "nowhere", tmp_path / "new", "no such folder"),
        (source, source / "new", "is inside of"),
        (source, tmp_path / "new", "source/vae: encoder.conv_in.bias holds NaN"),
    ):
        assert command.main([str(path), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error) and words in error, error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_command_tells_what_lacks(saved, tmp_path, capsys):
    """Tokenizers are copied; that there are none, without which nothing is painted, is said."""
    source = folders.copy(saved, tmp_path / "source")
    for name in ("tokenizer", ""):
        for folder in {"tokenizer", "tokenizer_2"} - {name}:
            (source / folder).mkdir(exist_ok=True)
        assert command.main([str(source), "--out", str(tmp_path / f"out{name}")]) == 0
        told = f"{tmp_path}/outtokenizer: no tokenizer; copy the folder of the model"
        assert (told in capsys.readouterr().out) == bool(name)
