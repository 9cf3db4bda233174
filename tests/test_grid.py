"""Laws of grid.py: tokens, positions, masks, and cutting out exactly what was put in."""

import numpy as np
import pytest
from picturefiles import SHAPES, noise, picture
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.cells import build_grid, cover, cover_mask
from vcloze_jax.inputs.sheet import GUTTER, MARK, cell_boxes, compose


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
    painted = noise(*query.size[::-1], seed)
    kept = grid.keep(painted)
    assert kept.dtype == np.uint8
    assert np.array_equal(kept[~query.mask], query.pixels[~query.mask])
    assert np.array_equal(kept[query.mask], painted[query.mask])
    assert np.array_equal(grid.keep(kept), kept)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_find_every_cell_in_the_sheet(seed):
    """Law: cropping the sheet by the boxes gives all cells back; cut gives the targets alike."""
    _, grid = random_grid(seed)
    painted = noise(*grid.query.size[::-1], seed)
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
