"""The second pass that a spec asks for (SDEdit), as more specs."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vcloze_jax.grid import PATCH, Grid, Row, Spec


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

    def grid(self, target: np.ndarray) -> Grid:
        """A target, uint8 [h, w, 3], as the picture to start from: one cell, all of it masked."""
        size = self.width, self.height
        picture = Image.fromarray(target).resize(size, Image.Resampling.LANCZOS)
        row = Row(np.asarray(picture), np.ones(size[::-1], bool))
        return Grid((row,), columns=1, first_row=0)

    def specs(self, spec: Spec, targets: list[np.ndarray]) -> list[Spec]:
        """The second pass over the painted targets of the spec that asks for it."""
        how = dict(seed=spec.seed, latents=self.latents, strength=self.strength)
        asked = spec.content_prompt, self.num_inference_steps, spec.guidance_scale
        return [Spec(self.grid(target), *asked, **how) for target in targets]
