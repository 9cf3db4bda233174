"""Views derived from a picture: what Graph200K's detectors and degradations are to a photograph.

Each is a pure function of one RGBA picture and a seed, so nothing of it is stored; `nodes` puts
them beside the drawn views, and an edge of the task graph is a pair of columns of its result.
"""

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.feature import canny

from vcloze_jax.data.graphemoji import SIZE, VIEWS, Subjects

NAMES = (
    "edges",
    "gray",
    "mask",
    "blur",
    "low_resolution",
    "noise",
    "hole",
    "distance",
    "palette",
)
NODES = VIEWS + NAMES

# Of the gray levels' gradient: the weaker edges are steps of shading that the pack rounds to.
EDGES = dict(low_threshold=12, high_threshold=30)
BLUR = 3.0  # pixels, the standard deviation
NOISE = 40.0  # of 255, the standard deviation
BLOCK = 8  # pixels to a side of a low-resolution block
HOLE = (20, 36)  # pixels, the least and greatest side
COLORS = 5


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Composite uint8 [..., 4], alpha not premultiplied, over white: uint8 [..., 3]."""
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)  # at most 255 * 255, fits 16 bits
    return ((mixed.astype(np.uint32) + 127) // 255).astype(np.uint8)


def derive(rgba: np.ndarray, name: str, seed: int | list[int]) -> np.ndarray:
    """Derive the view `name` from uint8 [64, 64, 4] as uint8 [64, 64, 3].

    Only "noise" and "hole" read the seed. Raises ValueError for a name not in `NAMES`.
    """
    rgb, alpha = over_white(rgba), rgba[..., 3]
    match name:
        case "edges":
            return _to_rgb(255 * canny(_to_gray(rgb).astype(np.float32), **EDGES))
        case "gray":
            return _to_rgb(_to_gray(rgb))
        case "mask":
            return _to_rgb(alpha)
        case "blur":
            return ndimage.gaussian_filter(rgb, (BLUR, BLUR, 0), mode="nearest")
        case "low_resolution":
            return _low_resolution(rgb)
        case "noise":
            noise = np.random.default_rng(seed).normal(0, NOISE, rgb.shape)
            return np.clip(rgb + noise, 0, 255).astype(np.uint8)
        case "hole":
            return _hole(rgb, np.random.default_rng(seed))
        case "distance":
            depth = ndimage.distance_transform_edt(alpha >= 128)
            return _to_rgb(255 * depth / max(depth.max(), 1))
        case "palette":
            palette = Image.fromarray(rgb).quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=2)
            return np.asarray(palette.convert("RGB"))
    raise ValueError(f"unknown view {name!r}; one of {', '.join(NAMES)}")


def nodes(subjects: Subjects, view: str = "fluent_3d") -> np.ndarray:
    """All `NODES` of all subjects, the derived ones from `view`: uint8 [N, 17, 64, 64, 3].

    The seed of a subject is its codepoint, so a picture does not depend on who stands beside it.
    """
    pictures = np.empty((len(subjects.codepoints), len(NODES), SIZE, SIZE, 3), np.uint8)
    source = VIEWS.index(view)
    for codepoint, rgba, row in zip(subjects.codepoints, subjects.rgba, pictures, strict=True):
        seed = [int(c, 16) for c in codepoint.split("-")]
        row[: len(VIEWS)] = over_white(rgba)
        for name, picture in zip(NAMES, row[len(VIEWS) :], strict=True):
            picture[:] = derive(rgba[source], name, seed)
    return pictures


def _to_gray(rgb):
    return np.asarray(Image.fromarray(rgb).convert("L"))  # [64, 64]


def _to_rgb(gray):
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)


def _low_resolution(rgb):
    height, width, _ = rgb.shape
    blocks = rgb.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
    means = blocks.mean((1, 3), keepdims=True)  # [8, 1, 8, 1, 3]
    return np.broadcast_to(np.rint(means), blocks.shape).astype(np.uint8).reshape(rgb.shape)


def _hole(rgb, rng):
    height, width = rng.integers(HOLE[0], HOLE[1] + 1, 2)
    y, x = rng.integers(0, SIZE - height + 1), rng.integers(0, SIZE - width + 1)
    holed = rgb.copy()
    holed[y : y + height, x : x + width] = 128
    return holed
