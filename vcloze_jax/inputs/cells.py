"""Pictures of any size -> a Grid: the sizes of its rows, and one resize for every cell.

Sizes follow VisualCloze (lzyhha/VisualCloze:visualcloze.py), resizing follows diffusers
(huggingface/diffusers:src/diffusers/pipelines/visualcloze/visualcloze_utils.py).
"""

import numpy as np
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.grid import PATCH, Grid, Row

MAX_TOKENS = 2**16  # 64 cells of 512 x 512; beyond it only a mistake is plausible
MAX_RESIZED = 2**26  # pixels before the crop, 256 MiB as Pillow holds them
LEAST_SHARE = 1 / 4  # of the area that is asked for, that a cell may have

Cell = Image.Image | tuple[Image.Image, np.ndarray] | None


def build_grid(images: list[list[Cell]], resolution: int) -> Grid:
    """Bring pictures to the sizes of their rows and join them; sizes first, then one resize each.

    A cell is an RGB picture, None (all of it is generated) or a pair of a picture and a bool mask
    [h, w] of the same size (True is generated). Raises UserError naming the cell.
    """
    cells = [[c if isinstance(c, tuple) else (c, None) for c in row] for row in images]
    check_layout(cells)
    sizes = _row_sizes(cells, resolution)
    tokens = sum(len(cells[0]) * (w // PATCH) * (h // PATCH) for w, h in sizes)
    if tokens > MAX_TOKENS:
        raise UserError(
            f"image: the grid has {tokens} tokens of at most {MAX_TOKENS}; "
            "lower the resolution or use fewer cells"
        )
    rows = []
    for r, (row, size) in enumerate(zip(cells, sizes, strict=True)):
        pairs = [fit_cell(*cell, *size, f"image[{r}][{i}]") for i, cell in enumerate(row)]
        pixels, masks = zip(*pairs, strict=True)
        rows.append(Row(np.concatenate(pixels, axis=1), np.concatenate(masks, axis=1)))
    return Grid(tuple(rows), len(cells[0]))


def row_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Size (w, h) of a cell of area resolution² and the picture's aspect, floored to 16.

    The order of roundings is the authors' and makes landscape and portrait differ.
    """
    aspect = width / height
    h = int((resolution * resolution / aspect) ** 0.5)
    return floor(int(h * aspect)), floor(h)


def find_resolution(grid: Grid, resolution: int) -> int:
    """The resolution, this one or the nearest below, by which a grid's cells, as pictures that are
    given, are read as large as they are: of a size that it has made, `row_size` may make another.
    This one where there is none."""
    cells, sizes = [], []
    for row in grid.rows:
        pairs = zip(grid.split(row.pixels), grid.split(row.mask), strict=True)
        cells.append(
            [(None if m.all() else Image.fromarray(x), m if m.any() else None) for x, m in pairs]
        )
        height, width, _ = row.pixels.shape
        sizes.append((width // grid.columns, height))
    fits = (r for r in range(resolution, PATCH, -1) if _row_sizes(cells, r) == sizes)
    return next(fits, resolution)


def cover(
    picture: Image.Image, width: int, height: int, resample=Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize to cover width x height and crop the centre, in diffusers' integer arithmetic.

    Raises UserError if the two shapes differ so much that the resized picture would be absurd.
    """
    w, h = _covering_size(picture.size, width, height)
    left, top = w // 2 - width // 2, h // 2 - height // 2
    return picture.resize((w, h), resample).crop((left, top, left + width, top + height))


def cover_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask, bool [h, w], resized and cropped as `cover` does it with its picture.

    Scaled down, a pixel is True where any that it covers is, so that no stroke is lost; enlarged,
    it is the nearest one.
    """
    w, h = _covering_size(mask.shape[::-1], width, height)
    levels = Image.fromarray(np.uint8(255) * _shrink(_shrink(mask, h).T, w).T)
    # Not as a picture of mode "1": its True is the byte 255, which XLA reads as -1.
    return np.asarray(cover(levels, width, height, Image.Resampling.NEAREST)) >= 128


def _covering_size(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Size (w, h) of a picture of `size` where it covers width x height, of its own aspect."""
    own_w, own_h = size
    wide = own_w / own_h >= width / height
    w, h = (own_w * height // own_h, height) if wide else (width, own_h * width // own_w)
    if w * h > MAX_RESIZED:
        raise UserError(
            f"a picture of {own_w}x{own_h} cannot fill a cell of {width}x{height}; "
            "crop it to a similar shape"
        )
    return w, h


def _shrink(mask: np.ndarray, size: int) -> np.ndarray:
    """The mask with `size` rows: each is True where any row that it covers is, if only in part."""
    rows = len(mask)
    if rows <= size:
        return mask
    starts = np.arange(size) * rows // size
    stops = -(-np.arange(1, size + 1) * rows // size)
    edges = np.stack([starts, stops], axis=1).ravel()[:-1]  # the last one stops by itself
    return np.logical_or.reduceat(mask, edges)[::2]


def check_layout(cells: list[list[tuple]]) -> None:
    if not cells or not cells[0]:
        raise UserError("image: no cell; give rows of cells, the query last")
    for r, row in enumerate(cells):
        if len(row) != len(cells[0]):
            raise UserError(
                f"image[{r}]: {len(row)} cells, but row 0 has {len(cells[0])}; "
                "all rows have the same number"
            )
        for i, (picture, mask) in enumerate(row):
            if r < len(cells) - 1 and (picture is None or mask is not None):
                raise UserError(f"image[{r}][{i}]: only the last row may hold targets")
            if mask is not None and mask.shape != (picture.height, picture.width):
                raise UserError(
                    f"image[{r}][{i}]: the mask is {mask.shape[1]}x{mask.shape[0]}, its picture "
                    f"{picture.width}x{picture.height}; make them equal"
                )
    if not any(picture is None or mask is not None for picture, mask in cells[-1]):
        raise UserError(f"image[{len(cells) - 1}]: no target; make a cell of the last row null")


def _row_sizes(cells: list[list[tuple]], resolution: int) -> list[tuple[int, int]]:
    """Cell size (w, h) of every row."""
    own = []
    for row in cells:
        pictures = (picture.size for picture, _ in row if picture)
        own.append(next(pictures, (resolution, resolution)))
    sizes = [row_size(*size, resolution) for size in own]
    _refuse_small(sizes, own, resolution)
    if sum(picture is None or mask is not None for picture, mask in cells[-1]) > 1:
        width = sizes[-1][0]  # several targets: one width for all rows
        sizes = [(width, floor(h * width // w)) for w, h in sizes]
        remedy = "several targets make all rows as wide as the last; crop it to a shape like that"
        _refuse_small(sizes, own, resolution, remedy)
    return sizes


def _refuse_small(
    sizes: list[tuple[int, int]], own: list[tuple[int, int]], resolution: int, remedy: str = ""
) -> None:
    """Raise UserError for the first row whose cells are much smaller than what is asked for."""
    for r, ((w, h), (own_w, own_h)) in enumerate(zip(sizes, own, strict=True)):
        if w * h < LEAST_SHARE * resolution**2:
            longest = own_h * (resolution // PATCH) ** 2
            raise UserError(
                f"image[{r}]: a picture of {own_w}x{own_h} makes a cell of {w}x{h}, not of about "
                f"{resolution}x{resolution}; {remedy or f'crop it to {longest}x{own_h} or less'}"
            )


def fit_cell(
    picture: Image.Image | None, mask: np.ndarray | None, width: int, height: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """One cell at its final size: uint8 [h, w, 3] and bool [h, w]."""
    if picture is None:
        return np.zeros((height, width, 3), np.uint8), np.ones((height, width), bool)
    try:
        pixels = np.asarray(cover(picture, width, height))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if mask is None:
        return pixels, np.zeros((height, width), bool)
    if not mask.any():
        raise UserError(
            f"{where}: the mask is all black or clear; paint white what is to be generated"
        )
    mask = cover_mask(mask, width, height)
    if not mask.any():
        raise UserError(
            f"{where}: what the mask marks is cut off: the cell of {width}x{height} shows the "
            "centre of its picture; mark something there, or crop both to a similar shape"
        )
    return pixels, mask


def floor(side: int) -> int:
    """A side in whole tokens: a multiple of 16, at least 16."""
    return max(side // PATCH, 1) * PATCH
