"""Laws of what a user names: adapters with their scale, and a preset by its weights."""

import json
from pathlib import Path

import pytest

from vcloze_jax.config import PRESETS, UserError
from vcloze_jax.storage import places


@pytest.mark.parametrize(
    "text, file, scale",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
        ("C:a:2", "C:a", 2.0),
        ("a.safetensors:", "a.safetensors:", 1.0),
        ("there:2", "there:2", 1.0),
    ],
)
def test_file_and_scale(tmp_path, monkeypatch, text, file, scale):
    """The last colon splits only if its tail is a number and the whole is not a file."""
    monkeypatch.chdir(tmp_path)
    Path("there:2").touch()
    assert places.file_and_scale(text) == (Path(file), scale)


def test_named_preset(tmp_path):
    """A folder is of the preset that it names, else of FLUX.1-Fill."""
    assert places.named_preset(tmp_path).name == "flux-fill"
    for name, preset in PRESETS.items():
        (tmp_path / "vcloze.json").write_text(json.dumps({"preset": name}))
        assert places.named_preset(tmp_path) is preset


def test_an_adapter_is_given_once(tmp_path):
    """The same file twice, however it is spelled, would silently be twice as strong."""
    file = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="a.safetensors: given twice; give it once, with the sum"):
        places.named_model(None, [(file, 1.0), (tmp_path / f"../{tmp_path.name}/{file.name}", 0.5)])


def test_scales_are_told_exactly():
    """A record's line gives the same picture again."""
    pairs = [(Path("a"), 0.123456789), (Path("b"), 2.0), (Path("c"), 1.0)]
    assert places.describe_pairs(pairs) == "a:0.123456789 + b:2 + c"


def test_adapters_by_name():
    """An adapter is a path, "FILE:SCALE" or a pair; several are a list; none is mini's own."""
    pairs, named = [(Path("a"), 0.5), (Path("b"), 1.0)], places.named_model
    for lora in (["a:0.5", Path("b")], pairs, [("a", 0.5), "b"]):
        assert places.split_bank(lora) == (pairs, {})
    for lora in (("a", 0.5), "a:0.5"):
        assert places.split_bank(lora) == (pairs[:1], {})
    for lora in [("a", "0.5")], [("a", None)], [("a",)], [("a", float("nan"))], [7]:
        with pytest.raises(UserError, match="neither a file, nor"):
            places.split_bank(lora)
    assert named(None, pairs) == (places.MINI_FOLDER, pairs)
    assert named("w", pairs[1:]) == (Path("w"), pairs[1:]) and named("w", None)[1] == []
    assert named(None, None) == (places.MINI_FOLDER, [(places.MINI_LORA, 1.0)])
