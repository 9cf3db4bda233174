"""Laws of grid.py: sizes, positions, masks, and cutting out exactly what was put in."""

import numpy as np
import pytest
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.cells import build_grid, cover, cover_mask, row_size
from vcloze_jax.inputs.sheet import GUTTER, MARK, cell_boxes, compose

SHAPES = [(64, 64), (100, 70), (70, 100), (333, 41), (48, 200)]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(width, height, seed=0):
    return Image.fromarray(noise(width, height, seed))


def random_grid(seed):
    """Up to three rows of up to four cells, of mixed shapes, one or more targets in the query."""
    draw = np.random.default_rng(seed)
    rows, columns = draw.integers(1, 4), draw.integers(1, 5)
    cells = [[picture(*draw.choice(SHAPES), seed) for _ in range(columns)] for _ in range(rows)]
    for i in draw.choice(columns, draw.integers(1, columns + 1), replace=False):
        w, h = cells[-1][i].size
        partly = draw.random((h, w)) < 0.5
        cells[-1][i] = (cells[-1][i], partly) if draw.random() < 0.5 else None
    return cells, build_grid(cells, 64)


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


# --- tokens and positions ---


@pytest.mark.parametrize("seed", range(12))
def test_ids_number_every_token_once(seed):
    """Law: ids are float32 [S, 3], no two alike, and sorted as the tokens run: row, y, x."""
    _, grid = random_grid(seed)
    ids = grid.ids()
    assert ids.dtype == np.float32 and ids.shape == (grid.tokens, 3)
    assert len({tuple(i) for i in ids}) == grid.tokens
    assert np.array_equal(np.lexsort(ids.T[::-1]), np.arange(grid.tokens))
    for number, (h, w) in enumerate(grid.shape, start=1):  # x runs over the whole row
        of_row = ids[ids[:, 0] == number]
        assert of_row[:, 1:].min() == 0 and of_row[:, 1:].max(0).tolist() == [
            h // 16 - 1,
            w // 16 - 1,
        ]
    assert set(ids[:, 0]) == set(range(1, len(grid.rows) + 1))


def test_tokens_example():
    """Three cells of 384 x 384 in two rows: 2 · 24 · 72 tokens."""
    grid = Grid.from_cells(np.zeros((2, 3, 384, 384, 3), np.uint8), np.zeros((1, 1, 1, 1), bool))
    assert grid.tokens == 3456
    assert grid.shape == ((384, 1152), (384, 1152))


# --- masks ---


@pytest.mark.parametrize("seed", range(12))
def test_masks_follow_the_cells(seed):
    """Law: rows above the query are given; a cell is a target if and only if it was asked for."""
    cells, grid = random_grid(seed)
    assert not any(row.mask.any() for row in grid.rows[:-1])
    assert grid.targets == [i for i, c in enumerate(cells[-1]) if not isinstance(c, Image.Image)]
    for i, mask in enumerate(np.split(grid.query.mask, grid.columns, axis=1)):
        if cells[-1][i] is None:
            assert mask.all() and not np.split(grid.query.pixels, grid.columns, axis=1)[i].any()


def test_masks_stay_per_pixel():
    """Law: a mask is never snapped to tokens: at the same size it is the given one, bit for bit."""
    mask = np.random.default_rng(0).random((64, 64)) < 0.5
    grid = build_grid([[(picture(64, 64), mask)]], 64)
    assert np.array_equal(grid.query.mask, mask)
    assert grid.query.mask.view(np.uint8).max() == 1  # XLA reads the bytes, NumPy only zero or not


def test_mask_and_picture_stay_registered():
    """Law: resizing moves mask and picture alike (half a pixel: nearest has no blur)."""
    half = np.zeros((90, 150), bool)
    half[:, 75:] = True
    shown = Image.fromarray(np.where(half[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2))
    grid = build_grid([[picture(64, 64), (shown, half)]], 64)
    assert np.array_equal(grid.query.pixels[:, 64:, 0] >= 128, grid.query.mask[:, 64:])


@pytest.mark.parametrize("size", [*SHAPES, (640, 480), (65, 63)])
@pytest.mark.parametrize("cell", [(64, 64), (48, 96), (112, 32), (16, 16)])
def test_masks_scaled_down_lose_no_stroke(size, cell):
    """Law: scaled down, a pixel is marked where any that it covers is, with its picture's geometry;
    enlarged or of equal size, it is Pillow's nearest one."""
    w, h = cover(picture(*size), *cell).size
    assert (w, h) == cell
    mask = np.random.default_rng(size).random(size[::-1]) < 0.02
    wide = size[0] / size[1] >= w / h
    full = (size[0] * h // size[1], h) if wide else (w, size[1] * w // size[0])
    if full[0] <= size[0] and full[1] <= size[1]:
        expected = np.zeros(full[::-1], bool)
        for y, x in np.argwhere(mask):
            rows, columns = (
                [i for i in range(n) if i * own < (at + 1) * n and (i + 1) * own > at * n]
                for at, n, own in ((y, full[1], size[1]), (x, full[0], size[0]))
            )
            expected[np.ix_(rows, columns)] = True
    else:
        levels = Image.fromarray(np.uint8(255) * mask).resize(full, Image.Resampling.NEAREST)
        expected = np.asarray(levels) >= 128
    left, top = full[0] // 2 - w // 2, full[1] // 2 - h // 2
    assert np.array_equal(cover_mask(mask, *cell), expected[top : top + h, left : left + w])


def test_a_hair_stays_in_the_mask():
    """A stroke of one pixel in a picture of 1000 x 1000 is still one in a cell of 64 x 64."""
    hair = np.zeros((1000, 1000), bool)
    hair[:, 501] = True
    grid = build_grid([[(picture(1000, 1000), hair)]], 64)
    assert grid.query.mask.all(0).nonzero()[0].tolist() == [32]


# --- cut, keep, compose ---


@pytest.mark.parametrize("seed", range(12))
def test_keep_restores_every_given_pixel(seed):
    """Law: given pixels are the input's, painted ones the painter's; twice is once."""
    _, grid = random_grid(seed)
    query = grid.query
    painted = noise(query.width, query.height, seed)
    kept = grid.keep(painted)
    assert kept.dtype == np.uint8
    assert np.array_equal(kept[~query.mask], query.pixels[~query.mask])
    assert np.array_equal(kept[query.mask], painted[query.mask])
    assert np.array_equal(grid.keep(kept), kept)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_find_every_cell_in_the_sheet(seed):
    """Law: cropping the sheet by the boxes gives all cells back; cut gives the targets alike."""
    _, grid = random_grid(seed)
    painted = noise(grid.query.width, grid.query.height, seed)
    sheet = compose(grid, painted)
    for number, boxes in enumerate(cell_boxes(grid)):
        cells = [sheet[y : y + h, x : x + w] for x, y, w, h in boxes]
        if number < len(grid.rows) - 1:
            assert np.array_equal(np.concatenate(cells, axis=1), grid.rows[number].pixels)
    assert np.array_equal(np.concatenate(cells, axis=1), grid.keep(painted))
    targets = grid.cut(painted)
    assert len(targets) == len(grid.targets)
    for i, target in zip(grid.targets, targets, strict=True):
        assert np.array_equal(target, cells[i])


@pytest.mark.parametrize("seed", range(12))
def test_gutters_are_white_but_for_marks(seed):
    """Law: outside the boxes the sheet is white, and every target has its four corners marked."""
    _, grid = random_grid(seed)
    outside = np.ones(compose(grid).shape[:2], bool)
    near = np.zeros_like(outside)
    for boxes in cell_boxes(grid):
        for x, y, w, h in boxes:
            assert x >= GUTTER and y >= GUTTER
            outside[y : y + h, x : x + w] = False
    for x, y, w, h in (cell_boxes(grid)[-1][i] for i in grid.targets):
        near[y - GUTTER : y + h + GUTTER, x - GUTTER : x + w + GUTTER] = True
    sheet = compose(grid)
    marked = outside & (sheet == MARK).all(-1)
    assert (sheet[outside & ~marked] == 255).all()
    assert not (marked & ~near).any()
    corner = 2 * 10 * 2 - 2 * 2  # two bars of 10 x 2 that share 2 x 2
    assert marked.sum() == 4 * corner * len(grid.targets)


def test_from_cells_equals_build_grid():
    """Law: square cells of the right size give the same grid by either way; training takes this."""
    cells = np.stack([noise(64, 64, i) for i in range(6)]).reshape(2, 3, 64, 64, 3)
    mask = np.zeros((2, 3, 1, 1), bool)
    mask[1, 2] = True
    fast = Grid.from_cells(cells, mask)
    pictures = [[Image.fromarray(cell) for cell in row] for row in cells]
    pictures[1][2] = (pictures[1][2], np.ones((64, 64), bool))
    slow = build_grid(pictures, 64)
    for ours, theirs in zip(fast.rows, slow.rows, strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert np.array_equal(ours.mask, theirs.mask)
    assert fast.targets == slow.targets == [2]


# --- mistakes ---

A, MASK = picture(32, 32), np.ones((32, 32), bool)
WIDE, EDGE = picture(90, 30), np.arange(90) < 5 + np.zeros((30, 1))


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "image: no cell"),
        ([[]], "image: no cell"),
        ([[A, A], [None]], r"image\[1\]: 1 cells, but row 0 has 2"),
        ([[A], [A]], r"image\[1\]: no target"),
        ([[None], [None]], r"image\[0\]\[0\]: only the last row"),
        ([[(A, MASK)], [None]], r"image\[0\]\[0\]: only the last row"),
        ([[(A, ~MASK)]], r"image\[0\]\[0\]: the mask is all black"),
        ([[A, (WIDE, EDGE)]], r"image\[0\]\[1\]: what the mask marks is cut off"),
        ([[picture(5000, 1), None]], r"image\[0\]: a picture of 5000x1 .* crop it to 16x1 or less"),
        ([[A, A], [picture(9000, 2), None]], r"image\[1\]: a picture of 9000x2 .* crop it to 32x2"),
        ([[picture(640, 160)] * 3, [picture(160, 640), None, None]], r"image\[0\]: .* of 32x16"),
        ([[A, (A, MASK[:16])]], r"image\[0\]\[1\]: the mask is 32x16, its picture 32x32"),
    ],
)
def test_mistakes_name_the_cell(images, message):
    """Law: a grid that cannot be painted is a UserError that names the row or cell."""
    with pytest.raises(UserError, match=message):
        build_grid(images, 64)


@pytest.mark.parametrize("resolution", [16, 31, 32, 64])
def test_the_crop_that_is_named_does(resolution):
    """Law: a picture of any shape is taken, or its crop as the message has it."""
    for size in [(5000, 1), (9999, 2), (1, 5000), (300, 1), (16, 1), (1000, 999)]:
        try:
            grid = build_grid([[picture(*size), None]], resolution)
        except UserError as error:
            crop = str(error).split("crop it to ")[1].split()[0].split("x")
            grid = build_grid([[picture(*map(int, crop)), None]], resolution)
        assert grid.query.height * grid.query.width / 2 >= resolution**2 / 4
