"""The 32 degradations of Graph200K: what a restoration task must undo.

A degradation is one or more filters; a cell draws one of them, and how much of it. Names and levels
are those of lzyhha/VisualCloze:data/degradation_utils.py. A new one is a filter and its row here,
and its phrases in data/graph200k_tasks.toml.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vcloze_jax.data import distortions as d
from vcloze_jax.data import filters as f

SEVERITIES = (1, 2, 3, 4, 5)


class Between(NamedTuple):
    """Levels drawn uniformly, from the mildest to the worst."""

    mildest: float
    worst: float


class Filter(NamedTuple):
    """`apply` at one of `levels`, by severity; where there are fewer than five, the last one is
    that of all higher severities."""

    apply: Callable[[np.ndarray, object, np.random.Generator], np.ndarray]
    levels: tuple | Between = (None,)

    def level(self, severity):
        """What severity 1 … 5 means to this filter; None draws nothing and is the worst."""
        if isinstance(self.levels, Between):
            mildest, worst = self.levels
            return mildest + (worst - mildest) * (severity - 1) / 4
        return self.levels[min(severity, len(self.levels)) - 1]


DEGRADATIONS: dict[str, tuple[Filter, ...]] = {
    "blur": (
        Filter(f.blur_gaussian, (1, 2, 3, 4, 5)),
        Filter(f.blur_motion, ((5, 3), (10, 5), (15, 7), (15, 9), (20, 12))),
        Filter(f.blur_glass, ((0.7, 1, 1), (0.9, 2, 1), (1.2, 2, 2), (1.4, 3, 2), (1.6, 4, 2))),
        Filter(f.blur_lens, (2, 3, 4, 6, 8)),
        Filter(f.blur_zoom, (1.03, 1.06, 1.10, 1.15, 1.21)),
        Filter(f.scatter_pixels, (1, 2, 3, 4, 5)),
    ),
    "compression": (
        Filter(d.compress_jpeg, (25, 18, 12)),
        Filter(d.compress_jpeg2000, (29, 27.5, 26)),
    ),
    "SRx2": (Filter(d.lose_resolution, (2,)),),
    "SRx4": (Filter(d.lose_resolution, (4,)),),
    "pixelate": (Filter(d.pixelate, (0.5, 0.4, 0.3, 0.25, 0.2)),),
    "Defocus": (Filter(f.blur_lens, (3,)),),
    "GaussianBlur": (Filter(f.blur_window, Between(2, 4)),),
    "oversharpen": (Filter(f.oversharpen, (2, 2.8, 4, 6, 8)),),
    "GaussianNoise": (Filter(f.add_gaussian_noise, Between(10, 50)),),
    "PoissonNoise": (Filter(f.add_poisson_noise, (100,)),),
    "SPNoise": (Filter(f.add_salt_and_pepper, (0.05,)),),
    "mosaic": (Filter(f.keep_bayer),),
    "contrast_strengthen": (
        Filter(f.scale_contrast, (1.4, 1.7, 2.1, 2.6, 4)),
        Filter(f.stretch_contrast, (2, 4, 6, 8, 10)),
    ),
    "contrast_weaken": (
        Filter(f.scale_contrast, (0.75, 0.6, 0.45, 0.3, 0.2)),
        Filter(f.stretch_contrast, (1, 0.9, 0.8, 0.6, 0.4)),
    ),
    "quantization": (
        Filter(d.quantize_otsu, (15, 11, 8)),
        Filter(d.quantize_median, (20, 15, 10)),
        Filter(d.quantize_histogram, (24, 16, 8)),
    ),
    "JPEG": (Filter(d.compress_jpeg, Between(40, 10)),),
    "brighten": (
        Filter(f.shift_value, (0.1, 0.2, 0.3, 0.4, 0.5)),
        Filter(f.shift_levels, (0.1, 0.15, 0.2, 0.27, 0.35)),
        Filter(f.gamma_value, (0.7, 0.58, 0.47, 0.36, 0.25)),
        Filter(f.gamma_levels, (0.8, 0.7, 0.6, 0.45, 0.3)),
    ),
    "darken": (
        Filter(f.shift_value, (-0.1, -0.2, -0.3, -0.4, -0.5)),
        Filter(f.shift_levels, (-0.1, -0.15, -0.2, -0.27, -0.35)),
        Filter(f.gamma_value, (1.5, 1.8, 2.2, 2.7, 3.5)),
        Filter(f.gamma_levels, (1.4, 1.7, 2.1, 2.6, 3.2)),
    ),
    "LowLight": (Filter(f.scale_levels, Between(0.4, 0.3)),),
    "saturate_strengthen": (
        Filter(f.scale_saturation, (3, 6, 12, 20, 64)),
        Filter(f.scale_chroma, (2, 3, 5, 8, 16)),
    ),
    "saturate_weaken": (
        Filter(f.scale_saturation, (0.7, 0.55, 0.4, 0.2, 0)),
        Filter(f.scale_chroma, (0.6, 0.4, 0.2, 0.1, 0)),
    ),
    "gray": (Filter(f.remove_color),),
    "ColorDistortion": (Filter(f.distort_color),),
    "Inpainting": (Filter(d.draw_lines),),
    "rotate90": (Filter(d.turn_quarters, (1,)),),
    "rotate180": (Filter(d.turn_quarters, (2,)),),
    "rotate270": (Filter(d.turn_quarters, (3,)),),
    "Barrel": (Filter(d.bend_rays, ((0.1, 0.05),)),),
    "Pincushion": (Filter(d.bend_rays, ((-0.1, -0.05),)),),
    "Elastic": (Filter(d.warp_elastic, (25,)),),
    "Rain": (Filter(d.add_rain, Between(40, 200)),),
    "Frost": (Filter(d.add_frost, ((0.65, 0.7),)),),
}


def degrade(picture, name, rng, severity=None):
    """Spoil uint8 [h, w, 3] by the degradation `name`: uint8 of that shape (a quarter turn
    exchanges the sides).

    One of its filters is drawn, and, unless `severity` (1 … 5) is given, how much of it: severities
    uniformly, or, where levels are a range, uniformly in it. A function of the picture and of the
    generator. Raises KeyError for a name not in `DEGRADATIONS`.
    """
    filters = DEGRADATIONS[name]
    chosen = filters[rng.integers(len(filters))]
    return apply_filter(picture, chosen, draw_severity(rng, chosen, severity), rng)


def draw_severity(rng, chosen, severity=None):
    """A severity from 1 to 5: a whole one, or, where levels are a range, any."""
    if severity is not None:
        return severity
    return rng.uniform(1, 5) if isinstance(chosen.levels, Between) else rng.choice(SEVERITIES)


def apply_filter(picture, chosen, severity, rng):
    """One filter at a severity: uint8 [h, w, 3] -> the same."""
    pixels = chosen.apply(picture.astype(np.float32) / 255, chosen.level(severity), rng)
    return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
