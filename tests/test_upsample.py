"""Laws of the second pass: what a spec may ask for, where it starts, and what comes of it."""

import json
import re
import time
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vcloze_jax import flow
from vcloze_jax.config import MINI, UserError
from vcloze_jax.inputs.spec import upsampled_size
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.inputs.upsampling import Upsampling
from vcloze_jax.pipeline import describe, load_painter
from vcloze_jax.storage.textreader import Text

SIZES = {"a": (48, 32), "big": (2000, 1000), "small": (40, 20)}


@pytest.fixture
def read(tmp_path):
    """Write a spec of one row, a picture and a target, and read it: `read(upsampling, ...)`."""
    draw = np.random.default_rng(0)
    for name, (w, h) in SIZES.items():
        pixels = draw.integers(0, 256, (h, w, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(draw.choice(np.uint8([0, 255]), (20, 40))).save(tmp_path / "mask.png")
    np.save(tmp_path / "noise.npy", draw.standard_normal((8, 64)).astype(np.float32))

    def read(upsampling, row=("a.png", None), **spec):
        spec = {"image": [row], "resolution": 32, "upsampling": upsampling, **spec}
        (tmp_path / "fox.json").write_text(json.dumps(spec))
        return read_specs([tmp_path / "fox.json"], MINI)[0]

    return read


# --- what may be asked for ---


@pytest.mark.parametrize(
    "sides, own, size",
    [
        ((100, 70), (48, 32), (96, 64)),  # floored to 16
        ((8, 9), None, (16, 16)),  # at least 16
        ((1024, None), (1024, 768), (1024, 768)),  # one side sets the other
        ((None, 96), (48, 32), (144, 96)),
        ((None, None), (1000, 500), (992, 496)),  # the picture's own
        ((None, None), (1024, 1024), (1024, 1024)),
        ((None, None), (2000, 1000), (1440, 720)),  # at most 1024², as the authors compute it
        ((None, None), None, (1024, 1024)),
    ],
)
def test_size(sides, own, size):
    """Both sides, one and the picture's aspect, or none and the picture's own size."""
    assert upsampled_size(*sides, own) == size


def test_defaults(read):
    """An empty object asks for all defaults: strength 0.4, the spec's steps, the first query
    picture's own size; the record's spec is the same spec again."""
    spec = read({}, num_inference_steps=7)
    assert spec.resolved["upsampling"] == {
        "width": 48,
        "height": 32,
        "strength": 0.4,
        "num_inference_steps": 7,
        "latents": None,
    }
    up = spec.upsampling
    assert (up.width, up.height, up.strength, up.num_inference_steps) == (48, 32, 0.4, 7)
    given = dict(width=64, height=32, strength=1, num_inference_steps=3, latents="noise.npy")
    spec = read(given)
    assert spec.upsampling.latents.shape == (8, 64) and spec.upsampling.tokens == 8
    assert read(spec.resolved["upsampling"]).resolved == spec.resolved
    assert read(None).upsampling is None and read(None).resolved["upsampling"] is None


def test_partly_masked_picture_counts(read):
    """Its picture is the first query picture, by whose size the targets are upsampled."""
    spec = read({}, row=({"image": "small.png", "mask": "mask.png"}, "big.png"))
    assert (spec.upsampling.width, spec.upsampling.height) == (32, 16)


BAD = [
    (True, "must be an object, not true"),
    ([], "must be an object, not a list"),
    ({"widht": 64}, "'widht': unknown key (did you mean 'width'?)"),
    ({"width": 15}, "width: must be an integer in 16 ... 4096"),
    ({"width": 64.0}, "width: must be an integer"),
    ({"height": True}, "height: must be an integer"),
    ({"height": 5000}, "height: must be an integer"),
    ({"height": 4000}, "6000x4000 has a side above 4096; give width and height"),
    *(({"strength": s}, "strength: must be a number above 0") for s in (0, -1, 1.1, True, "0.4")),
    ({"num_inference_steps": 0}, "num_inference_steps: must be an integer in 1 ... 1000"),
    ({"latents": "missing.npy"}, "latents: "),
    ({"latents": "noise.npy"}, "must be float32 [6, 64]: an upsampled target has S = 6 tokens"),
    ({"latents": 3}, "latents: must be a string"),
]


@pytest.mark.parametrize("upsampling, message", BAD, ids=range(len(BAD)))
def test_refused(read, upsampling, message):
    """What cannot be done is named: file, key, reason."""
    with pytest.raises(UserError, match=f"fox.json: upsampling: .*{re.escape(message)}"):
        read(upsampling)


# --- what is done ---


@pytest.mark.parametrize("steps, strength, calls", [(30, 0.4, 12), (10, 0.25, 3), (5, 1e-9, 1)])
def test_times(steps, strength, calls):
    """The last int(N - N strength) to N of the shifted times, at least one call; a strength of 1 is
    all of them (diffusers' get_timesteps)."""
    whole = flow.schedule(steps, 4096, MINI.flow)
    times = flow.schedule(steps, 4096, MINI.flow, strength)
    assert len(times) == calls + 1 and np.array_equal(times, whole[-calls - 1 :])
    assert np.array_equal(flow.schedule(steps, 4096, MINI.flow, 1.0), whole)


def test_grid():
    """A target is stretched to its size, all of it masked, in a row of number 0."""
    target = np.zeros((32, 48, 3), np.uint8)
    grid = Upsampling(32, 64, 0.4, 8).grid(lambda: [target])
    assert grid.shape == ((64, 32),) and grid.query.mask.all() and grid.targets == [0]
    assert set(grid.ids()[:, 0]) == {0} and grid.ids()[:, 1].max() == 3


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    folder = tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")
    return load_painter(folder, None, "1")


def test_second_pass(painter, read):
    """The pixels are the first pass's; each target is of the size asked for, and is what the second
    pass makes of the first one's 8-bit target and the bare content prompt; the record tells."""
    small = dict(row=(None, "a.png", None), num_inference_steps=2)
    prompt = "The bottom-right corner image presents: a fox"
    spec = read({"width": 64, "num_inference_steps": 5}, **small, content_prompt=prompt)
    (first,) = painter([replace(spec, upsampling=None)])
    (both,) = painter([spec])
    assert np.array_equal(both.pixels, first.pixels)
    assert [t.shape for t in both.targets] == [(32, 64, 3)] * 2  # 64 * 32 / 48 = 42, floored
    passes = describe(both)["upsampling"]
    assert [again["tokens"]["image"] for again in passes] == [8, 8]
    again = spec.upsampling.specs(spec, first.cut)
    assert {second.prompt for second in again} == {"a fox"}
    for painted, target in zip(painter(again), both.targets, strict=True):
        assert len(painted.times) == 3  # of 5 steps the last 2
        assert np.array_equal(painted.pixels, target)


def test_seconds_are_told_once(painter, read, monkeypatch):
    """To decode what a second pass begins with is the first one's: the second's record leaves those
    seconds out."""
    spec, decode = read({"width": 64}, num_inference_steps=2), painter.decode
    painter([spec])  # compiled

    def decode_slowly(*args):
        time.sleep(0.5)
        return decode(*args)

    monkeypatch.setattr(painter, "decode", decode_slowly)
    (canvas,) = painter([spec])
    assert canvas.seconds["decode"] > 0.5 > canvas.second_passes[0].seconds["vae"]


def test_start(painter, read):
    """At strength 1 the start is the noise alone, whatever the first pass painted; below 1 the
    first pass is in it; noise is that of the seed, or what is given."""
    noise = np.asarray(jax.random.normal(jax.random.key(0), (8, 64)))

    def start(strength, value, noise=None):
        target = np.full((32, 48, 3), value, np.uint8)
        up = Upsampling(64, 32, strength, 4, noise)
        (second,) = up.specs(replace(read({}), upsampling=up), lambda: [target])
        canvas = painter.start(second, {"": Text(None, None, {}, Counter())})
        painter.encode(canvas)
        return canvas.latents

    assert np.array_equal(start(1, 0), noise) and np.array_equal(start(1, 255), noise)
    assert not np.allclose(start(0.5, 0), start(0.5, 255))
    assert np.array_equal(start(1, 0, -noise), -noise)
