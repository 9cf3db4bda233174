"""The second pass that a spec asks for (SDEdit), as more specs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from vcloze_jax.grid import PATCH, Grid, Spec

Targets = Callable[[], list[np.ndarray]]  # -> uint8 [h, w, 3] each


class LaterRow:
    """A Row that is decoded and enlarged when its pixels are first asked for, so by the hosts alone
    that encode it."""

    def __init__(self, make: Callable[[], np.ndarray], mask: np.ndarray):
        self.make, self.mask = make, mask
        self.size = mask.shape

    @cached_property
    def pixels(self) -> np.ndarray:
        return self.make()


@dataclass(frozen=True, eq=False)
class Upsampling:
    """Each target, enlarged and made noisy, is painted again as stock FLUX.1-Fill does it with one
    picture, all of it masked.

    Source: huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_fill.py.
    """

    width: int
    height: int
    strength: float  # (0, 1]: share of the steps that are taken; 1 forgets the first pass
    num_inference_steps: int  # N, of which the last strength * N are taken
    latents: np.ndarray | None = None  # float32 [S, 64] at t = 1, the same for every target

    @property
    def tokens(self) -> int:
        """S of one target."""
        return self.width // PATCH * (self.height // PATCH)

    def grid(self, targets: Targets, i: int = 0) -> Grid:
        """The i-th target as the picture to start from: one cell, all of it masked."""
        size = self.width, self.height

        def enlarge():
            return np.asarray(Image.fromarray(targets()[i]).resize(size, Image.Resampling.LANCZOS))

        row = LaterRow(enlarge, np.ones(size[::-1], bool))
        return Grid((row,), columns=1, first_row=0)

    def specs(self, spec: Spec, targets: Targets) -> list[Spec]:
        """The second pass over the painted targets of the spec that asks for it."""
        how = dict(seed=spec.seed, latents=self.latents, strength=self.strength)
        asked = spec.content_prompt, self.num_inference_steps, spec.guidance_scale
        grids = (self.grid(targets, i) for i in range(len(spec.grid.targets)))
        return [Spec(grid, *asked, **how) for grid in grids]
