"""What spoils a photograph as a whole: resolution, levels, codecs, places, what lies over it.

Filters as in data/filters.py: float32 [h, w, 3] in [0, 1], a level, a generator -> the same shape.
"""

import io

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, signal

ICE = np.array([0.88, 0.95, 1], np.float32)  # its colour

# --- resolution, levels, codecs ---


def pixelate(x, scale, rng):
    picture = to_picture(x)
    small = [max(int(side * scale), 1) for side in picture.size]
    blocks = picture.resize(small, Image.Resampling.BOX)
    return from_picture(blocks.resize(picture.size, Image.Resampling.NEAREST))


def lose_resolution(x, factor, rng):
    """Made smaller by `factor` and large again, both by cubic interpolation without a low pass."""
    height, width, _ = x.shape
    small = resize_cubic(x, max(height // factor, 1), max(width // factor, 1))
    return resize_cubic(small, height, width)


def resize_cubic(x, height, width):
    """OpenCV's INTER_CUBIC: the kernel of -0.75, four pixels wide also where it shrinks."""
    x = np.einsum("ij,jkc->ikc", cubic_weights(x.shape[0], height), x, optimize=True)
    return np.einsum("ij,kjc->kic", cubic_weights(x.shape[1], width), x, optimize=True)


def cubic_weights(old, new):
    """Rows of weights that take `old` samples to `new` ones: float32 [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(centres[:, None] - taps)
    near, far = (1.25 * d - 2.25) * d**2 + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3
    weights = np.zeros((new, old), np.float32)
    rows = np.arange(new)[:, None]
    np.add.at(weights, (rows, np.clip(taps, 0, old - 1)), np.where(d <= 1, near, far))
    return weights


def compress_jpeg(x, quality, rng):
    return recode(x, "JPEG", quality=round(quality))


def compress_jpeg2000(x, decibels, rng):
    return recode(x, "JPEG2000", quality_mode="dB", quality_layers=[decibels])


def recode(x, form, **options):
    file = io.BytesIO()
    to_picture(x).save(file, form, **options)
    return from_picture(Image.open(file))


def quantize_otsu(x, classes, rng):
    """Each channel cut at the thresholds that leave the least variance within `classes`."""
    levels = np.asarray(to_picture(x), np.float32)
    for channel in np.moveaxis(levels, -1, 0):
        low, high = channel.min(), channel.max()
        bins = np.digitize(channel, otsu_thresholds(channel, classes))
        channel[:] = bins * (high - low) / classes + low
    return levels / 255


def otsu_thresholds(channel, classes, bins=30):
    """The cuts of a histogram into `classes` that leave the least variance in them, by dynamic
    programming over its bins (to try all, as scikit-image does, takes minutes): [classes - 1]."""
    counts, edges = np.histogram(channel, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    mass, moment = (np.concatenate([[0], np.cumsum(v)]) for v in (counts, counts * centres))
    start, stop = np.triu_indices(bins + 1, 1)
    gain = np.full((bins + 1, bins + 1), -np.inf)  # what a class of the bins start … stop - 1 adds
    inside = mass[stop] - mass[start]
    gain[start, stop] = (moment[stop] - moment[start]) ** 2 / np.maximum(inside, 1)
    best, cuts = gain[0], []
    for _ in range(classes - 1):
        total = best[:, None] + gain
        cuts.append(total.argmax(0))
        best = total.max(0)
    stop, thresholds = bins, []
    for cut in reversed(cuts):
        stop = cut[stop]
        thresholds.append(centres[stop - 1])
    return np.array(thresholds[::-1])


def quantize_median(x, colors, rng):
    """Each channel reduced to `colors` levels by median cut."""
    method = Image.Quantize.MEDIANCUT
    channels = [c.quantize(colors, method).convert("L") for c in to_picture(x).split()]
    return from_picture(Image.merge("RGB", channels))


def quantize_histogram(x, levels, rng):
    """`levels` equal steps, each shown as bright as the share of pixels up to it."""
    counts, _ = np.histogram(x, levels, (0, 1))
    shares = np.cumsum(counts)
    first = shares[np.flatnonzero(counts)[0]]
    shares = np.clip((shares - first) / max(shares[-1] - first, 1), 0, 1)
    return np.float32(shares)[np.rint(x * (levels - 1)).astype(int)]


# --- geometry ---


def turn_quarters(x, quarters, rng):
    """Counter-clockwise (the authors' phrases say clockwise); an odd number exchanges the sides."""
    return np.rot90(x, quarters)


def bend_rays(x, level, rng):
    """Radial distortion: the pixel at r of the middle comes from r (1 + a r² + b r⁴)."""
    a, b = level
    size = np.array(x.shape[:2])[:, None, None] - 1
    centred = 2 * np.mgrid[: x.shape[0], : x.shape[1]] / np.maximum(size, 1) - 1
    square = (centred**2).sum(0)
    return sample_places(x, (centred * (1 + a * square + b * square**2) + 1) * size / 2)


def warp_elastic(x, strength, rng):
    """Every pixel from a place that a smooth random field says."""
    shape = x.shape[:2]
    reach = 0.005 * shape[0]
    field = rng.uniform(-reach, reach, (2, *shape))
    sigma = (0, 0.01 * shape[0], 0.01 * shape[1])
    smooth = ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
    return sample_places(x, np.mgrid[: shape[0], : shape[1]] + strength * smooth, "reflect")


def sample_places(x, places, mode="grid-constant"):
    """Bilinear samples at float [2, h, w]; what lies outside is black, or as `mode` says."""
    channels = [
        ndimage.map_coordinates(c, places, order=1, mode=mode) for c in np.moveaxis(x, -1, 0)
    ]
    return np.stack(channels, -1)


# --- what lies over the picture ---


def draw_lines(x, level, rng):
    """20 to 50 lines across, all white or all black, 10 to 20 pixels of 512 wide."""
    height, width, _ = x.shape
    sheet = Image.new("1", (width, height))
    thickness = max(round(rng.integers(10, 21) * min(height, width) / 512), 1)
    for _ in range(rng.integers(20, 51)):
        ends = rng.integers(0, [width + 1, height + 1] * 2).tolist()
        ImageDraw.Draw(sheet).line(ends, fill=1, width=thickness)
    return np.where(np.asarray(sheet)[..., None], np.float32(rng.integers(2)), x)


def add_rain(x, amount, rng):
    """Bright streaks of one direction; `amount` is 256 · 100 times the share of drops."""
    drops = rng.uniform(0, 256, x.shape[:2])
    drops = np.where(drops < 256 - amount / 100, 0, drops)
    length, width = rng.integers(30, 41), rng.choice([3, 5, 7, 9, 11])
    angle = np.deg2rad(rng.integers(-45, 45))
    reach = length * (1 - length / 100) * 2**0.5
    return x + stretch_to_unit(convolve_streaks(drops, reach, width / 6, angle))[..., None]


def add_frost(x, level, rng):
    """Ice on a darkened picture: needles in three directions, denser where clouds are. (The authors
    mean photographs of frost, but add them at 1/255 of their weight: theirs only darkens.)"""
    keep, cover = level
    size, unit = x.shape[:2], max(x.shape[:2]) / 512
    cloud = ndimage.gaussian_filter(rng.standard_normal(size), 20 * unit, truncate=3)
    cloud /= cloud.std()
    ice = 0.25 + 0.15 * cloud
    for length, density in ((60, 4e-4), (24, 2e-3)):
        turns = rng.uniform(0, np.pi) + np.arange(3) * np.pi / 3
        for angle in turns + rng.normal(0, 0.12, 3):
            seeds = rng.random(size) < density / unit**2 * np.exp(cloud)
            ice += 0.4 * convolve_streaks(np.float32(seeds), length * unit, 0.8 * unit, angle)
    ice = 1 - np.exp(-np.maximum(ice, 0))
    return keep * x + cover * ice[..., None] * ICE


def convolve_streaks(points, length, sigma, angle):
    """Each point drawn out to a line of that length and softness: float [h, w]."""
    reach = int(length / 2 + 3 * sigma) + 1
    y, z = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along, across = y * np.cos(angle) + z * np.sin(angle), y * np.sin(angle) - z * np.cos(angle)
    line = (np.abs(along) <= length / 2) * np.exp(-((across / sigma) ** 2) / 2)
    return signal.oaconvolve(points, line, mode="same")


def stretch_to_unit(x):
    """From 0 to 1."""
    return (x - x.min()) / max(np.ptp(x), 1e-9)


# --- to Pillow and back ---


def to_picture(x):
    return Image.fromarray(np.uint8(np.rint(255 * np.clip(x, 0, 1))))


def from_picture(picture):
    return np.asarray(picture, np.float32) / 255
