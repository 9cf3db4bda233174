"""Specs, and what stands in a folder beside them."""

import json
import os

import numpy as np
from PIL import Image

from vcloze_jax.config import MINI
from vcloze_jax.inputs.specfiles import read_specs

ROW = [["a.png", "b.png"]]
GRID = [["a.png", "b.png"], ["b.png", None]]
LAYOUT = "A grid layout with 2 rows and 2 columns, displaying 4 images arranged side by side."
TOKENS = 64  # of GRID at resolution 64: four cells of 4 x 4


def make_folder(folder):
    """A folder of pictures a, b (64 x 64), wide (100 x 50), masks white, half, black, and noise."""
    draw = np.random.default_rng(0)
    for name, (h, w) in {"a": (64, 64), "b": (64, 64), "wide": (50, 100)}.items():
        Image.fromarray(draw.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{name}.png")
    half = np.repeat([[0, 255]], 64, axis=0).repeat(32, axis=1).astype(np.uint8)
    for name, mask in {"half": half, "white": half | 255, "black": half & 0}.items():
        Image.fromarray(mask).save(folder / f"{name}.png")
    Image.new("L", (64, 64), 99).save(folder / "dim.png")
    Image.new("LA", (64, 64), (255, 0)).save(folder / "clear.png")
    strokes = np.stack([half | 255, half], axis=-1)  # white, and clear where `half` is black
    Image.fromarray(strokes, "LA").save(folder / "strokes.png")
    noise = draw.standard_normal((TOKENS, 64)).astype(np.float32)
    np.save(folder / "noise.npy", noise)
    np.save(folder / "short.npy", noise[1:])
    np.save(folder / "empty.npy", noise[:0])
    np.save(folder / "double.npy", noise.astype(np.float64))
    np.save(folder / "nan.npy", np.where(noise > 3, np.nan, noise))
    np.save(folder / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(folder / "archive.npz", noise)
    (folder / "cut.npy").write_bytes((folder / "noise.npy").read_bytes()[:-4])
    (folder / "text.png").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    return folder


def read(folder, spec, preset=MINI, name="fox.json"):
    """Write `spec` (an object, or the text of a file) and read it back as one Spec."""
    text = spec if isinstance(spec, str | bytes) else json.dumps(spec)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_specs([folder / name], preset)[0]
