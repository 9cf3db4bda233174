"""Subjects turned, scaled, shifted, mirrored and tinted: few pictures, shown as if they were many.

A model that sees every picture a thousand times learns it by heart, and what it learns of a task
then serves no other subject.
"""

from dataclasses import replace
from itertools import permutations

import numpy as np
from PIL import Image

from vcloze_jax.data.graph import SIZE
from vcloze_jax.data.graphemoji import Subjects, derive_nodes

TINTS = tuple(permutations(range(3)))  # the old channels that become red, green and blue
ANGLE = 25  # degrees to either side
ZOOM = (0.7, 1.05)
FULL = 0.95  # as large it goes no further than ...
SHIFT = 2  # ... pixels to either side; a smaller one goes as far as its cell is free


def vary_nodes(subjects: Subjects, number: int) -> np.ndarray:
    """All nodes of subjects: number 0 has them as they are; in any other each is moved as that and
    its codepoint say, and all have one tint. Conditions are derived from what has moved: uint8
    [N, 17, 64, 64, 3]."""
    if not number:
        return derive_nodes(subjects)
    channels, moved = [*TINTS[number % len(TINTS)], 3], np.empty_like(subjects.rgba)
    for codepoint, views, out in zip(subjects.codepoints, subjects.rgba, moved, strict=True):
        seed = [number, *(int(c, 16) for c in codepoint.split("-"))]
        affine = draw_affine(np.random.default_rng(seed))
        for view, picture in zip(views, out, strict=True):
            image = Image.fromarray(np.ascontiguousarray(view[..., channels]))
            how = Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
            picture[:] = image.transform(image.size, *how)
    return derive_nodes(replace(subjects, rgba=moved))


def draw_affine(rng: np.random.Generator) -> tuple[float, ...]:
    """Pillow's a, b, c, d, e, f: from (x, y) to what is shown there; mirrored with p 0.5."""
    angle = np.radians(rng.uniform(-ANGLE, ANGLE))
    zoom = np.exp(rng.uniform(*np.log(ZOOM)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = turn / zoom * (rng.choice((-1, 1)), 1)
    reach = SHIFT + SIZE / 2 * max(0, FULL - zoom)
    middle = np.full(2, SIZE / 2)
    (a, b), (d, e) = back
    c, f = middle - back @ (middle + rng.uniform(-reach, reach, 2))
    return a, b, c, d, e, f


def draw_numbers(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Which of `count` variations of its subject each row of a grid shows: int [rows], half of the
    grids none. All rows have the same tint: what it is, the others tell."""
    if count == 0 or rng.random() < 0.5:
        return np.zeros(rows, int)
    tint = 1 + rng.integers(min(count, len(TINTS)))
    return tint + len(TINTS) * rng.integers((count - tint) // len(TINTS) + 1, size=rows)
