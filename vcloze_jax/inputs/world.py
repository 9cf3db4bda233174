"""What mini was trained on, and what of a grid is unlike it."""

import numpy as np

from vcloze_jax.grid import Grid, Spec

SIDE = 64  # pixels of all that mini has seen
PLAIN = 8  # levels that a plain border may be from its median, at most
DARK, LIGHT = 40, 192  # levels of what is called dark, at most, or light, at least


def describe_unlike_mini(spec: Spec) -> str:
    """What of a grid shipped mini does not know, in one sentence; "" if it knows all of it.

    Photographs are told by their borders, which in an icon on white, or what is derived from one,
    are plain or light: more than half of the given cells have another. What is derived stands on
    white or on black: it is told of a column whose cells all stand on another colour.
    """
    found, grid = [], spec.grid
    sizes = {(width // grid.columns, height) for height, width in grid.shape}
    if sizes != {(SIDE, SIDE)}:
        found.append(f"cells of {' and '.join(f'{w}x{h}' for w, h in sorted(sizes))}")
    columns = list_given(grid)
    framed = [has_icon_border(cell) for column in columns for cell in column]
    if sum(framed) * 2 < len(framed):
        found.append("photographs")
    if any(column and all(map(has_coloured_ground, column)) for column in columns):
        found.append("grounds of other colours")
    if spec.upsampling:
        found.append("a second pass")
    if not found:
        return ""
    unlike = " or ".join(found)
    return f"mini was trained on icons on white of {SIDE}x{SIDE}, and does not do {unlike} well"


def list_given(grid: Grid) -> list[list[np.ndarray]]:
    """The cells of each column that are given whole, uint8 [h, w, 3] each."""
    columns = [[] for _ in range(grid.columns)]
    for row in grid.rows:
        cells, masks = grid.split(row.pixels), grid.split(row.mask)
        for column, cell, mask in zip(columns, cells, masks, strict=True):
            if not mask.any():
                column.append(cell)
    return columns


def has_icon_border(cell: np.ndarray) -> bool:
    """Whether half of the outermost pixels have nearly one colour, or are light."""
    return is_plain(cell) or (take_border(cell).min(-1) >= LIGHT).mean() >= 0.5


def has_coloured_ground(cell: np.ndarray) -> bool:
    """Whether half of the outermost pixels have nearly one colour, neither light nor dark."""
    colour = np.median(take_border(cell), 0)
    return is_plain(cell) and colour.min() < LIGHT and colour.max() > DARK


def is_plain(cell: np.ndarray) -> bool:
    """Whether half of the outermost pixels have nearly one colour."""
    border = take_border(cell)
    return (np.abs(border - np.median(border, 0)).max(-1) <= PLAIN).mean() >= 0.5


def take_border(cell: np.ndarray) -> np.ndarray:
    """The outermost pixels of a cell, int [N, 3]."""
    return np.concatenate([cell[0], cell[-1], cell[1:-1, 0], cell[1:-1, -1]]).astype(int)
