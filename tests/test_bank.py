"""A bank of adapters: each spec picks one by name, and is painted as if it were alone."""

import gc
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import sample
from vcloze_jax import Pipeline
from vcloze_jax.config import UserError
from vcloze_jax.inputs.specfiles import parse_sampling
from vcloze_jax.storage import adapters, places, weights

NAMES = "maps", "relight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """weights/ and an adapter for each name."""
    folder = tmp_path_factory.mktemp("bank")
    tiny.weights_folder(folder / "weights")
    _, tree, _ = weights.abstract(weights.Flux, replace(tiny.TINY.flux, rank=2))
    for seed, name in enumerate(NAMES):
        adapters.save(folder / f"{name}.safetensors", tiny.filled(tree, seed))
    return folder


def spec(**changes):
    """One row, a reference and a target: AnyRefill's canvas."""
    picture = np.full((32, 32, 3), 90, np.uint8)
    return {"image": [[picture, None]], "resolution": 32, "num_inference_steps": 2} | changes


def test_each_is_painted_by_its_own(folder):
    """Specs of both adapters and of none, in one call, are what three pipelines paint, in their
    order (float32 of a batch of two); each record says by what."""
    files = {name: folder / f"{name}.safetensors" for name in NAMES}
    bank = Pipeline.load(folder / "weights", [f"{name}={file}" for name, file in files.items()])
    asked = [spec(adapter="relight"), spec(), spec(adapter="maps"), spec(adapter="relight", seed=1)]
    painted = bank.paint(asked)
    for name, i in (("relight", 0), (None, 1), ("maps", 2)):
        alone = Pipeline.load(folder / "weights", [files[name]] if name else None)
        expected = alone.paint([spec()])[0].latents
        np.testing.assert_allclose(painted[i].latents, expected, rtol=0, atol=1e-4)
        assert painted[i].record["adapters"] == f"adapter: {files[name] if name else 'none'}"
        assert painted[i].record["spec"].get("adapter") == name
    assert len({painting.latents.tobytes() for painting in painted}) == 4
    assert f"maps: {files['maps']}\n" in bank.summary()
    again = bank(spec()["image"], resolution=32, num_inference_steps=2, adapter="maps")
    np.testing.assert_array_equal(again.latents, painted[2].latents)


def test_one_base_at_a_time(folder):
    """None lies beside another while an adapter is folded in or another one is picked, whether or
    not Python has looked for what nobody holds."""
    files = [f"{name}={folder / name}.safetensors" for name in NAMES]
    models = Pipeline.load(folder / "weights", files).painter.models
    _, _, base = weights.abstract(weights.Flux, tiny.TINY.flux)
    layers, *kernel = base["single"]["linear1"]["kernel"].shape
    # In layers: stacked as they are read, apart as they stay.
    counted = {(layers, *kernel): layers, tuple(kernel): 1}
    count = lambda: sum(counted.get(x.shape, 0) for x in jax.live_arrays())  # noqa: E731
    gc.collect()
    before = count()
    gc.disable()
    try:
        for name in NAMES:
            models.select(name)
            assert count() == before
            assert models.flux and count() == before + layers
    finally:
        gc.enable()


def test_names_are_known_before_anything_is_loaded(folder, tmp_path):
    """A spec that picks what no flag names, and a name given twice, are the user's mistakes."""
    file = tmp_path / "a.json"
    file.write_text('{"image": [[null]], "adapter": "depth"}')
    argv = ["--grid", str(file), "--out", str(tmp_path / "out"), "--lora"]
    with pytest.raises(UserError, match="a: adapter: there is no 'depth'; one of maps"):
        sample.main([*argv, f"maps={folder}/maps.safetensors"])
    with pytest.raises(UserError, match="add --lora depth=FILE"):
        sample.main([*argv, f"{folder}/maps.safetensors"])
    with pytest.raises(UserError, match="maps is named twice"):
        places.split_bank(["maps=a", "maps=b"])
    with pytest.raises(UserError, match="maps=a: is folded in for every spec already"):
        places.split_bank(["a", "maps=a"])
    with pytest.raises(UserError, match="there is no such adapter"):
        Pipeline.load(folder / "weights", ["maps=a"])


def test_what_a_name_is(tmp_path, monkeypatch):
    """NAME=FILE has a scale, too, and stands beside adapters that paint everywhere; a file whose
    name looks like it is a file."""
    monkeypatch.chdir(tmp_path)
    Path("a=b").touch()
    args = parse_sampling("--grid s --lora a=b --lora c=d:0.5 --lora e:2".split())
    common, bank = places.split_bank(args.lora)
    assert common == [(Path("a=b"), 1.0), (Path("e"), 2.0)]
    assert bank == {"c": [*common, (Path("d"), 0.5)]}
    assert places.split_bank(None) == (None, {})
