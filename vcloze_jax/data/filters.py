"""What spoils a photograph's pixels: blur, noise, light and colour.

Every filter takes float32 [h, w, 3] in [0, 1], a level (how much, in its own unit) and a generator,
and returns pixels of that shape; data/degradations.py knows the levels, clips and rounds. The rules
are those of lzyhha/VisualCloze:data/degradation_toolkit, told again in NumPy and SciPy; what is not
the same says so. Lengths are pixels of the picture as it is stored.
"""

import numpy as np
from scipy import ndimage, signal

from vcloze_jax.data.distortions import sample_places

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)
ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))  # of channels, but their own

# --- blur and sharpness ---


def blur_gaussian(x, sigma, rng):
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def blur_window(x, sigma, rng):
    """A Gaussian within 15 x 15 pixels."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="mirror", radius=(7, 7, 0))


def blur_motion(x, level, rng):
    """Half a Gaussian of `sigma` along a line of any direction, 2 · radius pixels long."""
    radius, sigma = level
    angle = rng.uniform(-np.pi / 2, np.pi / 2)
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-((steps / sigma) ** 2) / 2)
    offsets = np.ceil(np.outer(steps, (np.sin(angle), np.cos(angle))) - 0.5).astype(int)
    margin, (height, width, _) = 2 * radius, x.shape
    padded = np.pad(x, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    blurred = np.zeros_like(x)
    for weight, (down, right) in zip(weights / weights.sum(), offsets + margin, strict=True):
        blurred += np.float32(weight) * padded[down : down + height, right : right + width]
    return blurred


def blur_glass(x, level, rng):
    """Blurred, scattered, blurred again."""
    sigma, reach, times = level
    x = blur_gaussian(x, sigma, rng)
    for _ in range(times):
        x = scatter_pixels(x, reach, rng)
    return blur_gaussian(x, sigma, rng)


def blur_lens(x, radius, rng):
    """The mean over a disk, as an aperture makes it."""
    y, z = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = np.float32(y**2 + z**2 <= radius**2)
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    return signal.oaconvolve(padded, disk[..., None] / disk.sum(), mode="valid", axes=(0, 1))


def blur_zoom(x, largest, rng):
    """The mean of the picture and of itself enlarged by 1, 1.02, … below `largest`."""
    middle = np.array(x.shape[:2])[:, None, None] // 2
    grid = np.mgrid[: x.shape[0], : x.shape[1]] - middle
    factors = np.arange(1, largest, 0.02)
    layers = [sample_places(x, grid / factor + middle) for factor in factors]
    return (x + sum(layers)) / (len(layers) + 1)


def scatter_pixels(x, reach, rng):
    """Every pixel from a random place at most `reach` away. (The authors do this one pixel after
    another in place, so that some wander further.)"""
    height, width, _ = x.shape
    rows, columns = np.mgrid[:height, :width] + rng.integers(-reach, reach, (2, height, width))
    return x[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]


def oversharpen(x, amount, rng):
    """What binomial weights of 5 x 5 pixels blur away, added `amount` times."""
    soft = x
    for axis in (0, 1):
        soft = ndimage.correlate1d(soft, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
    return x + amount * (x - soft)


# --- noise ---


def add_gaussian_noise(x, level, rng):
    return x + level / 255 * rng.standard_normal(x.shape, np.float32)


def add_poisson_noise(x, photons, rng):
    """Each value is a count of which white has `photons` on average."""
    return rng.poisson(x * photons) / photons


def add_salt_and_pepper(x, share, rng):
    draws = rng.random((2, *x.shape[:2], 1))
    return np.where(draws[0] < share, draws[1] < 0.5, x)


def keep_bayer(x, level, rng):
    """One colour a pixel, as a sensor of the pattern RGGB sees it."""
    raw = np.zeros_like(x)
    for top, left, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        raw[top::2, left::2, channel] = x[top::2, left::2, channel]
    return raw


# --- light and colour ---


def shift_levels(x, amount, rng):
    return x + amount


def gamma_levels(x, power, rng):
    return x**power


def scale_levels(x, factor, rng):
    return x * factor


def shift_value(x, amount, rng):
    """V of HSV moved; hue and saturation stay."""
    value = x.max(-1, keepdims=True)
    return set_value(x, value, value + amount)


def gamma_value(x, power, rng):
    value = x.max(-1, keepdims=True)
    return set_value(x, value, value**power)


def set_value(x, old, new):
    return np.where(old > 0, x * new / np.maximum(old, 1e-6), new)


def scale_saturation(x, factor, rng):
    """S of HSV times a factor, at most 1."""
    value, least = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    saturation = np.maximum(1 - least / np.maximum(value, 1e-6), 1e-6)
    return value - (value - x) * np.minimum(factor, 1 / saturation)


def scale_chroma(x, factor, rng):
    """Cr and Cb of YCrCb times a factor, each within its range."""
    luma = x @ LUMA
    red, blue = (np.clip(factor * (x[..., c] - luma), -m, m) for c, m in ((0, 0.7), (2, 0.886)))
    green = -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1]
    return luma[..., None] + np.stack([red, green, blue], -1)


def scale_contrast(x, factor, rng):
    middle = np.rint(255 * (x @ LUMA).mean()) / 255
    return middle + factor * (x - middle)


def stretch_contrast(x, power, rng):
    """A sigmoid of each channel about its mean."""
    ratio = np.maximum(x, 1e-3) / np.maximum(x.mean((0, 1)), 1e-3)
    return 1 / (1 + ratio**-power)


def remove_color(x, level, rng):
    """(The authors weigh red as blue and blue as red.)"""
    return np.broadcast_to((x @ LUMA)[..., None], x.shape)


def distort_color(x, level, rng):
    """Channels in another order, or one channel nowhere or everywhere. (The authors' orders
    include the one that changes nothing.)"""
    if rng.random() < 0.5:
        return x[..., ORDERS[rng.integers(len(ORDERS))]]
    x = x.copy()
    x[..., rng.integers(3)] = rng.integers(2)
    return x
