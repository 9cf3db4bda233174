"""The filters of data/ against OpenCV, which the authors use."""

import numpy as np
import pytest
import skimage.data

from vcloze_jax.data import distortions, filters

cv2 = pytest.importorskip("cv2")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def photo():
    return np.float32(skimage.data.astronaut()[:256, :320]) / 255


def bend(photo, a, b):
    height, width = photo.shape[:2]
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    square = x**2 + y**2
    factor = 1 + a * square + b * square**2
    maps = (x * factor + 1) * (width - 1) / 2, (y * factor + 1) * (height - 1) / 2
    return cv2.remap(photo, *(m.astype(np.float32) for m in maps), cv2.INTER_LINEAR)


def test_neither_needs_opencv(photo):
    """Cubic resizing, the blurs, the sharpening and the radial warps are OpenCV's to rounding, so
    that nobody has to install it; it keeps places of a warp to 1/32 of a pixel."""
    height, width = photo.shape[:2]
    for factor in (2, 4):
        small = cv2.resize(
            photo, (width // factor, height // factor), interpolation=cv2.INTER_CUBIC
        )
        large = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        assert abs(distortions.lose_resolution(photo, factor, None) - large).max() < 1e-5
    blurred = cv2.GaussianBlur(photo, (15, 15), 3.0)
    assert abs(filters.blur_window(photo, 3.0, None) - blurred).max() < 1e-5
    soft = cv2.GaussianBlur(photo, (5, 5), 0)
    assert abs(filters.oversharpen(photo, 4, None) - (5 * photo - 4 * soft)).max() < 1e-4
    for level in ((0.1, 0.05), (-0.1, -0.05)):
        assert abs(distortions.bend_rays(photo, level, None) - bend(photo, *level)).max() < 0.02


def test_colours_are_opencvs(photo):
    """Value and saturation of HSV, and chroma of YCrCb, scaled there and back."""
    hsv = cv2.cvtColor(photo, cv2.COLOR_RGB2HSV)
    for channel, change, ours in (
        (1, lambda s: np.minimum(3 * s, 1), filters.scale_saturation(photo, 3, None)),
        (2, lambda v: v**0.5, filters.gamma_value(photo, 0.5, None)),
    ):
        other = hsv.copy()
        other[..., channel] = change(other[..., channel])
        assert abs(ours - cv2.cvtColor(other, cv2.COLOR_HSV2RGB)).max() < 1e-4
    luma = cv2.cvtColor(photo, cv2.COLOR_RGB2YCrCb)
    luma[..., 1:] = 0.5 + 0.4 * (luma[..., 1:] - 0.5)
    theirs = cv2.cvtColor(luma, cv2.COLOR_YCrCb2RGB)
    assert abs(filters.scale_chroma(photo, 0.4, None) - theirs).max() < 2e-3
