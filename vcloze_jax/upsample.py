"""The second pass (SDEdit): a target, enlarged, half drowned in noise, and painted again.

It is what stock FLUX.1-Fill does with one picture, all of it masked
(huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_fill.py with a `strength`): the
picture is stretched to its new size, its condition is mid-grey, its row has the number 0.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vcloze_jax.grid import PATCH, Grid, Row, floor, row_size

SIDE = 1024  # a size that nobody asked for has an area of at most SIDE²


@dataclass(frozen=True, eq=False)
class Upsampling:
    """The second pass that a spec asks for, over each of its targets."""

    width: int
    height: int
    strength: float  # share of noise in the start: (0, 1], 1 forgets the first pass
    num_inference_steps: int  # N, of which the last strength * N are taken
    noise: np.ndarray | None = None  # float32 [S, 64] at t = 1, the same for every target

    @property
    def tokens(self) -> int:
        """S of one target."""
        return self.width // PATCH * (self.height // PATCH)

    def grid(self, target: np.ndarray) -> Grid:
        """A target, uint8 [h, w, 3], as the picture to start from: one cell, all of it masked."""
        size = self.width, self.height
        picture = Image.fromarray(target).resize(size, Image.Resampling.LANCZOS)
        row = Row(np.asarray(picture), np.ones(size[::-1], bool))
        return Grid((row,), columns=1, first_row=0)


def upsampled_size(
    width: int | None, height: int | None, own: tuple[int, int] | None
) -> tuple[int, int]:
    """Size (w, h) of an upsampled target, floored to 16.

    One side sets the other by the aspect of `own`, the size (w, h) of the query's first picture
    (None: it has none, and counts as 1024 x 1024). Without a side it is that size itself, scaled
    down to the area 1024² if that is less (lzyhha/VisualCloze:visualcloze.py).
    """
    w, h = own or (SIDE, SIDE)
    if width is None and height is None:
        return row_size(w, h, SIDE) if w * h > SIDE * SIDE else (floor(w), floor(h))
    return floor(width or height * w // h), floor(height or width * h // w)
