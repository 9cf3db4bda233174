"""Conditions derived from a picture: what detectors and degradations are to a photograph.

Each is a pure function of one RGBA picture and a seed, so nothing of it is stored. A new one is a
function and its row in `CONDITIONS`; data/graph.py says in which tasks it stands.
"""

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.feature import canny

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
    """Derive the condition `name` from uint8 [h, w, 4] as uint8 [h, w, 3].

    Only "noise" and "hole" read the seed. Raises ValueError for a name not in `CONDITIONS`.
    """
    if name not in CONDITIONS:
        raise ValueError(f"unknown condition {name!r}; one of {', '.join(CONDITIONS)}")
    paint, *_ = CONDITIONS[name]
    rng = np.random.default_rng(seed)
    picture = paint(over_white(rgba), rgba[..., 3], rng).astype(np.uint8)
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)


def find_edges(rgb, alpha, rng):
    return 255 * canny(to_gray(rgb, alpha, rng).astype(np.float32), **EDGES)


def to_gray(rgb, alpha, rng):
    return np.asarray(Image.fromarray(rgb).convert("L"))


def show_alpha(rgb, alpha, rng):
    return alpha


def blur(rgb, alpha, rng):
    return ndimage.gaussian_filter(rgb, (BLUR, BLUR, 0), mode="nearest")


def average_blocks(rgb, alpha, rng):
    height, width, _ = rgb.shape
    blocks = rgb.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
    means = blocks.mean((1, 3), keepdims=True)  # h/8 1 w/8 1 3
    return np.broadcast_to(np.rint(means), blocks.shape).reshape(rgb.shape)


def add_noise(rgb, alpha, rng):
    return np.clip(rgb + rng.normal(0, NOISE, rgb.shape), 0, 255)


def cut_hole(rgb, alpha, rng):
    height, width = rng.integers(HOLE[0], HOLE[1] + 1, 2)
    y = rng.integers(0, rgb.shape[0] - height + 1)
    x = rng.integers(0, rgb.shape[1] - width + 1)
    holed = rgb.copy()
    holed[y : y + height, x : x + width] = 128
    return holed


def measure_distance(rgb, alpha, rng):
    """From the outside of the subject: it looks like a depth map."""
    depth = ndimage.distance_transform_edt(alpha >= 128)
    return 255 * depth / max(depth.max(), 1)


def reduce_colors(rgb, alpha, rng):
    palette = Image.fromarray(rgb).quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=2)
    return np.asarray(palette.convert("RGB"))


# name: (function, phrases of which a prompt says one). A function gets rgb, uint8 [h, w, 3] over
# white, alpha, uint8 [h, w], and a generator; it returns levels of 0 to 255, [h, w] or [h, w, 3].
CONDITIONS = {
    "edges": (find_edges, "white edge lines on black", "an edge map from canny detection"),
    "gray": (to_gray, "a gray picture", "a picture without colour"),
    "mask": (show_alpha, "a white mask on black", "the silhouette of the subject"),
    "blur": (blur, "a blurred picture", "a picture out of focus"),
    "low_resolution": (average_blocks, "a low resolution picture", "a picture of coarse pixels"),
    "noise": (add_noise, "a noisy picture", "a picture with heavy noise"),
    "hole": (cut_hole, "a picture with a hole", "a picture with a missing part"),
    "distance": (measure_distance, "a depth map", "a depth map in shades of gray"),
    "palette": (reduce_colors, "a picture of few colours", "a picture reduced to five colours"),
}
