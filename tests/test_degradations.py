"""Laws of the 32 degradations, on photographs that scikit-image ships."""

from itertools import combinations, permutations

import numpy as np
import pytest
import skimage.data
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.data.__main__ import draw_degradations, main
from vcloze_jax.data.degradations import (
    DEGRADATIONS,
    SEVERITIES,
    Between,
    apply_filter,
    degrade,
    draw_severity,
)
from vcloze_jax.data.distortions import otsu_thresholds, resize_cubic

FILTERS = [(name, i) for name, filters in DEGRADATIONS.items() for i in range(len(filters))]


def shrink(picture, *size):
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def photos():
    return [shrink(picture(), 96, 80) for picture in (skimage.data.astronaut, skimage.data.coffee)]


def generator(*seed):
    return np.random.default_rng(seed)


def error(one, other):
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


def test_there_are_32():
    """The list is the authors'; none is named twice."""
    assert len(DEGRADATIONS) == 32 and len(FILTERS) == 50


@pytest.mark.parametrize(("name", "i"), FILTERS)
def test_more_severe_is_further_away(photos, name, i):
    """Range, type and shape are kept, the same seed gives the same pixels and leaves the picture
    alone; and of one seed, a higher severity is further from the photograph (quantization, which
    may equalize, has fewer levels), or, where there is one level only, the same."""
    chosen = DEGRADATIONS[name][i]
    for number, photo in enumerate(photos):
        if name == "Rain":  # whose streaks have pixels of a picture of full size
            photo = shrink(photo, 512, 512)
        before = photo.copy()
        spoilt = [apply_filter(photo, chosen, s, generator(number)) for s in (1, 3, 5)]
        again = apply_filter(photo, chosen, 3, generator(number))
        assert np.array_equal(again, spoilt[1]) and np.array_equal(photo, before)
        turned = name in ("rotate90", "rotate270")
        shape = photo.transpose(1, 0, 2).shape if turned else photo.shape
        assert all(x.shape == shape and x.dtype == np.uint8 for x in spoilt)
        if turned:
            continue
        fewer = name == "quantization"
        errors = [-len(np.unique(x[..., 0])) if fewer else error(x, photo) for x in spoilt]
        levels = [chosen.level(s) for s in (1, 3, 5)]
        grows = [a < b if p != q else a == b for a, b, p, q in follow(errors, levels)]
        assert all(grows) and error(spoilt[0], photo) > 2, (name, errors)


def follow(errors, levels):
    return zip(errors, errors[1:], levels, levels[1:], strict=False)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_any_picture_is_spoilt_without_a_word(name):
    """Black, white, one colour, narrow: no warning, which tests turn into errors."""
    for color in ((0, 0, 0), (255, 255, 255), (200, 30, 90)):
        flat = np.full((16, 24, 3), color, np.uint8)
        for seed in range(4):
            assert degrade(flat, name, generator(seed)).dtype == np.uint8


def test_what_is_drawn_follows_the_authors(photos):
    """A cell draws its filter uniformly; a severity of five, of which codecs and quantization take
    those above 3 as 3; and where levels are a range, any in it. To 5 deviations."""
    rng, number = generator(0), 3000
    (jpeg, _), (noise,) = DEGRADATIONS["compression"], DEGRADATIONS["GaussianNoise"]
    drawn = [jpeg.level(draw_severity(rng, jpeg)) for _ in range(number)]
    for level, share in zip(jpeg.levels, (0.2, 0.2, 0.6), strict=True):
        deviation = (share * (1 - share) / number) ** 0.5
        assert abs(drawn.count(level) / number - share) < 5 * deviation
    drawn = np.array([noise.level(draw_severity(rng, noise)) for _ in range(number)])
    assert drawn.min() >= 10 and drawn.max() <= 50
    assert abs(drawn.mean() - 30) < 5 * 40 / 12**0.5 / number**0.5
    small = photos[0][:24, :24]
    looks = {degrade(small, "brighten", generator(i), 3).tobytes() for i in range(40)}
    assert len(looks) == len(DEGRADATIONS["brighten"])


def test_levels_are_as_many_as_severities():
    """Five, or three of codecs and quantization, or a range, or one for all severities."""
    for name, filters in DEGRADATIONS.items():
        for chosen in filters:
            if not isinstance(chosen.levels, Between):
                short = name in ("compression", "quantization")
                assert len(chosen.levels) in ((3,) if short else (1, len(SEVERITIES)))


# --- those that can be undone, or checked by hand ---


def test_turns_and_colours_can_be_undone(photos):
    """Two turns of a quarter are one of a half, four are none; channels in another order are the
    same channels, and else one channel is lost and the others are not touched."""
    photo, rng = photos[0], generator(0)
    half = degrade(photo, "rotate180", rng)
    quarter = degrade(photo, "rotate90", rng)
    assert np.array_equal(degrade(quarter, "rotate90", rng), half)
    assert np.array_equal(degrade(quarter, "rotate270", rng), photo)
    assert np.array_equal(degrade(half, "rotate180", rng), photo)
    kinds = set()
    for seed in range(30):
        other = degrade(photo, "ColorDistortion", generator(seed))
        same = [c for c in range(3) if np.array_equal(other[..., c], photo[..., c])]
        orders = [o for o in permutations(range(3)) if np.array_equal(other[..., o], photo)]
        assert orders or (len(same) == 2 and np.ptp(other[..., 3 - sum(same)]) == 0)
        assert not np.array_equal(other, photo)
        kinds.add(bool(orders))
    assert kinds == {True, False}


def test_a_bayer_mosaic_keeps_one_colour_a_pixel(photos):
    """RGGB: the kept values are the picture's, at the places of their colour."""
    raw = degrade(photos[0], "mosaic", generator(0))
    places = {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}
    for (top, left), channel in places.items():
        kept = raw[top::2, left::2]
        assert np.array_equal(kept[..., channel], photos[0][top::2, left::2, channel])
        assert not np.delete(kept, channel, axis=-1).any()


def test_gray_has_equal_channels_and_less_saturation_is_between(photos):
    """Gray is what no saturation at all would be in YCrCb."""
    gray = degrade(photos[0], "gray", generator(0))
    assert (gray == gray[..., :1]).all()
    chroma = DEGRADATIONS["saturate_weaken"][1]
    assert abs(apply_filter(photos[0], chosen := chroma, 5, None).astype(int) - gray).max() <= 1
    assert error(apply_filter(photos[0], chosen, 3, None), gray) > 2


def test_noise_is_as_strong_as_it_says():
    """Of a middle gray: the deviation of Gaussian noise, of counts, and the share of salt."""
    flat = np.full((200, 200, 3), 128, np.uint8)
    for severity, deviation in ((1, 10), (3, 30)):
        noisy = apply_filter(flat, DEGRADATIONS["GaussianNoise"][0], severity, generator(0))
        assert abs(noisy.std() - deviation) < 0.03 * deviation
    counts = degrade(flat, "PoissonNoise", generator(0))
    assert abs(counts.std() - 255 * (128 / 255 / 100) ** 0.5) < 0.3
    specks = degrade(flat, "SPNoise", generator(0))
    assert abs((specks == 0).mean() - 0.025) < 0.005 and abs((specks == 255).mean() - 0.025) < 0.005


def test_otsu_thresholds_are_the_best_there_are(photos):
    """No other cuts of the histogram leave less variance within the classes: all are tried."""
    channel = np.float32(photos[0][..., 0])
    counts, edges = np.histogram(channel, 12)
    centres = (edges[1:] + edges[:-1]) / 2

    def variance(cuts):
        parts = np.split(np.arange(12), np.array(cuts) + 1)
        means = [np.average(centres[p], weights=counts[p] + 1e-9) for p in parts]
        return sum((counts[p] * (centres[p] - m) ** 2).sum() for p, m in zip(parts, means))  # noqa: B905

    for classes in (2, 3, 4):
        found = [
            int(np.flatnonzero(centres == t)[0]) for t in otsu_thresholds(channel, classes, 12)
        ]
        best = min(variance(cuts) for cuts in combinations(range(11), classes - 1))
        assert np.isclose(variance(found), best, rtol=1e-9)


def test_cubic_resizing_keeps_what_is_flat_or_straight():
    """Weights add up to one, and a ramp stays a ramp away from its ends."""
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (1, 8, 3))
    assert np.allclose(resize_cubic(np.ones((9, 7, 3), np.float32), 5, 11), 1, atol=1e-6)
    assert np.allclose(np.diff(resize_cubic(ramp, 32, 8)[2:-2, 0, 0], 2), 0, atol=1e-6)


def test_one_command_draws_them_all(tmp_path, photos, capsys):
    """A sheet of 8 x 4 degradations, each at three severities, of a photograph."""
    Image.fromarray(photos[0]).save(tmp_path / "photo.png")
    out = tmp_path / "new" / "sheet.png"
    main(["--degrade", f"{tmp_path}/photo.png", "--out", str(out), "--side", "24"])
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (8 * (14 + 24 + 8), 4 * (3 * 24 + 8), 3)
    assert np.array_equal(sheet, draw_degradations(photos[0], 24, 0))
    assert capsys.readouterr().out == f"{out}: severities 1, 3, 5 of each\n"


def test_the_command_says_what_it_wants(tmp_path):
    """Nothing to do, and a picture that is none, are one line."""
    with pytest.raises(UserError, match="^nothing to do; --list, or --degrade PHOTO$"):
        main([])
    with pytest.raises(UserError, match="test_degradations.py' is none of PNG"):
        main(["--degrade", __file__, "--out", f"{tmp_path}/sheet.png"])
    assert not [*tmp_path.iterdir()]
