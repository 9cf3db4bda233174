"""Laws of a row's size, and of what is cut from a picture that fills a cell."""

import numpy as np
import pytest
from picturefiles import SHAPES, noise, picture
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.inputs.cells import build_grid, cover, row_size

# --- sizes ---


@pytest.mark.parametrize(
    "size, resolution, expected",
    [
        ((1024, 768), 384, (432, 320)),
        ((768, 1152), 384, (304, 464)),
        ((1920, 1080), 384, (512, 288)),
        ((3000, 200), 384, (1472, 96)),
        ((1920, 1080), 512, (672, 384)),
        ((1080, 1920), 512, (368, 672)),  # the floors make portrait no mirror of landscape
        ((384, 384), 384, (384, 384)),
        ((7, 7), 64, (64, 64)),
        ((5000, 1), 16, (16, 16)),  # both sides vanish, both are lifted to a token
    ],
)
def test_row_size_examples(size, resolution, expected):
    """Sizes computed by running the authors' code and diffusers 0.42.1."""
    assert row_size(*size, resolution) == expected


def test_row_size_is_whole_tokens_of_no_more_area():
    """Law: sides are multiples of 16, at least 16, and the area never exceeds resolution²."""
    draw = np.random.default_rng(0)
    for w, h in draw.integers(1, 4000, (500, 2)):
        width, height = row_size(int(w), int(h), 384)
        assert width % 16 == 0 == height % 16 and min(width, height) >= 16
        assert width * height <= 384**2 or min(width, height) == 16


def test_first_picture_sets_the_row():
    """Law: a row's size is that of its first real picture; a query without any is square."""
    grid = build_grid([[picture(200, 100), picture(100, 200)], [None, picture(100, 200)]], 64)
    assert (
        grid.shape
        == ((32, 2 * 80), (80, 2 * 32))
        == tuple((h, 2 * w) for w, h in (row_size(200, 100, 64), row_size(100, 200, 64)))
    )
    assert build_grid([[None]], 72).shape == ((64, 64),)


def test_partly_masked_picture_counts_for_the_size():
    """Law: a partly masked cell has a picture, and that picture may set the size of its row."""
    mask = np.ones((100, 200), bool)
    grid = build_grid([[(picture(200, 100), mask), picture(64, 64)]], 64)
    assert grid.shape == ((32, 2 * 80),)


def test_several_targets_share_the_query_width():
    """The authors' rule for several targets: query 960x640, context 1024x768, resolution 384."""
    context, query = picture(1024, 768), picture(960, 640)
    grid = build_grid([[context] * 3, [query, None, None]], 384)
    assert grid.shape == ((336, 3 * 464), (304, 3 * 464))
    single = build_grid([[context] * 3, [query, query, None]], 384)
    assert single.shape == ((320, 3 * 432), (304, 3 * 464))


# --- cover ---


def diffusers_cover(image, width, height):
    """VaeImageProcessor._resize_and_crop as a formula: resize, then paste on a black canvas."""
    ratio, source = width / height, image.width / image.height
    w = width if ratio > source else image.width * height // image.height
    h = height if ratio <= source else image.height * width // image.width
    canvas = Image.new("RGB", (width, height))
    resized = image.resize((w, h), Image.Resampling.LANCZOS)
    canvas.paste(resized, (width // 2 - w // 2, height // 2 - h // 2))
    return np.asarray(canvas)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("cell", [(64, 64), (48, 96), (112, 32), (16, 16)])
def test_cover_equals_diffusers(size, cell):
    """Law: cover is diffusers' resize and crop, bit for bit, and leaves no black bar."""
    ours = cover(picture(*size), *cell)
    assert ours.size == cell
    assert np.array_equal(np.asarray(ours), diffusers_cover(picture(*size), *cell))
    white = cover(Image.new("RGB", size, "white"), *cell)
    assert np.asarray(white).min() == 255


@pytest.mark.parity
def test_cover_equals_diffusers_itself():
    """Law: the same as above, against the installed diffusers."""
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    for size in SHAPES:
        theirs = processor._resize_and_crop(picture(*size), 112, 48)
        assert np.array_equal(np.asarray(cover(picture(*size), 112, 48)), np.asarray(theirs))


@pytest.mark.parity
def test_sizes_equal_diffusers_itself():
    """Law: with one target, sizes and pixels are diffusers' own."""
    utils = pytest.importorskip("diffusers.pipelines.visualcloze.visualcloze_utils")
    processor = utils.VisualClozeProcessor(resolution=96)
    cells = [[picture(100, 70), picture(64, 64)], [picture(48, 200), None]]
    tensors, _, target = processor.preprocess_image(cells, 8)
    grid = build_grid(cells, 96)
    assert grid.targets == [i for i, t in enumerate(target) if t]
    for row, theirs in zip(grid.rows, tensors, strict=True):
        pixels = np.concatenate([t[0].permute(1, 2, 0).numpy() for t in theirs], axis=1)
        assert np.array_equal(row.pixels, np.rint((pixels + 1) * 127.5).astype(np.uint8))


def test_cover_is_the_identity_at_the_same_size():
    """Law: a picture that has the right size already is untouched."""
    assert np.array_equal(np.asarray(cover(picture(64, 48), 64, 48)), noise(64, 48))


def test_absurd_shapes_are_refused_not_computed():
    """Law: neither a needle in a square cell nor a huge grid can exhaust the memory."""
    with pytest.raises(UserError, match=r"image\[0\]\[1\].*crop"):
        build_grid([[picture(2, 30000), picture(30000, 2), None]], 384)
    with pytest.raises(UserError, match="tokens"):
        build_grid([[None] * 200], 384)


@pytest.mark.parametrize("resolution", [16, 31, 32, 64])
def test_the_crop_that_is_named_does(resolution):
    """Law: a picture of any shape is taken, or its crop as the message has it."""
    for size in [(5000, 1), (9999, 2), (1, 5000), (300, 1), (16, 1), (1000, 999)]:
        try:
            grid = build_grid([[picture(*size), None]], resolution)
        except UserError as error:
            crop = str(error).split("crop it to ")[1].split()[0].split("x")
            grid = build_grid([[picture(*map(int, crop)), None]], resolution)
        assert np.prod(grid.query.size) / 2 >= resolution**2 / 4
