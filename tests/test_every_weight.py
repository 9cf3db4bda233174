"""Laws of runs that train more than an adapter: the MMDiT, or all but the autoencoder."""

import pytest
import tiny
from runs import flags, make_home, paint

import train
from vcloze_jax.config import PRESETS
from vcloze_jax.ports import __main__ as ports
from vcloze_jax.storage import weights


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The weights and the grids of the run."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rank_0(home, tmp_path, capsys, cached):
    """With rank 0 the MMDiT itself is trained, and RUN/weights is a folder that sample.py takes,
    with the text encoders as they were, also where a cache stood for them; there is no adapter to
    export."""
    change = dict(rank=0, mesh=1, batch=2, steps=1)
    change |= dict(cache=tmp_path / "cache") if cached else {}
    assert train.main(flags(home, tmp_path / "run", **change)) == 0
    argv = [tmp_path / "run/checkpoints/1", "--to", "kohya", "--out", tmp_path / "a.safetensors"]
    assert ports.main(["lora", *map(str, argv)]) == 2
    assert "trains every weight; it has no adapter" in capsys.readouterr().err
    before, after = home / "weights", tmp_path / "run/weights"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert changed(before / part, after / part) == (part == "transformer"), part
    assert paint(home, tmp_path / "a", folder=before) != paint(home, tmp_path / "b", folder=after)


@pytest.mark.slow
def test_from_scratch(home, tmp_path, monkeypatch):
    """From scratch the MMDiT and both text encoders are random and trained; the VAE is given."""
    monkeypatch.setitem(PRESETS, "mini", tiny.TINY)
    change = dict(rank=0, mesh=1, batch=2, steps=1)
    assert train.main(flags(home, tmp_path / "run", **change) + ["--from-scratch"]) == 0
    after = tmp_path / "run/weights"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert changed(home / "weights" / part, after / part) == (part != "vae"), part
    paint(home, tmp_path / "a", folder=after)


def changed(before, after):
    """Whether two folders of a model hold other arrays; bfloat16, as which they are written."""
    (old,), (new,) = (list(folder.glob("*.safetensors")) for folder in (before, after))
    old, new = weights.engine.SafetensorsFile(old), weights.engine.SafetensorsFile(new)
    assert old.header.keys() == new.header.keys()
    return any((old.read(key).astype("bfloat16") != new.read(key)).any() for key in old.header)
