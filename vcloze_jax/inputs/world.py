"""What mini was trained on, and what of a grid is unlike it."""

import numpy as np

from vcloze_jax.grid import Grid, Spec

SIDE = 64  # pixels of all that mini has seen
PLAIN, LIGHT = 8, 192  # levels: how far from the median a plain border may be, and what is light


def describe_unlike_mini(spec: Spec) -> str:
    """What of a grid shipped mini does not know, in one sentence; "" if it knows all of it.

    Photographs are told by their borders, which in an icon on white, or what is derived from one,
    are plain or light: more than half of the given cells have another.
    """
    found, grid = [], spec.grid
    sizes = {(width // grid.columns, height) for height, width in grid.shape}
    if sizes != {(SIDE, SIDE)}:
        found.append(f"cells of {' and '.join(f'{w}x{h}' for w, h in sorted(sizes))}")
    framed = [has_icon_border(cell) for cell in list_given(grid)]
    if sum(framed) * 2 < len(framed):
        found.append("photographs")
    if spec.upsampling:
        found.append("a second pass")
    if not found:
        return ""
    unlike = " or ".join(found)
    return f"mini was trained on icons on white of {SIDE}x{SIDE}, and does not do {unlike} well"


def list_given(grid: Grid) -> list[np.ndarray]:
    """The cells that are given whole, uint8 [h, w, 3] each."""
    pairs = ((grid.split(row.pixels), grid.split(row.mask)) for row in grid.rows)
    return [
        cell
        for cells, masks in pairs
        for cell, mask in zip(cells, masks, strict=True)
        if not mask.any()
    ]


def has_icon_border(cell: np.ndarray) -> bool:
    """Whether half of the outermost pixels have nearly one colour, or are light."""
    border = np.concatenate([cell[0], cell[-1], cell[1:-1, 0], cell[1:-1, -1]]).astype(int)
    plain = np.abs(border - np.median(border, 0)).max(-1) <= PLAIN
    return max(plain.mean(), (border.min(-1) >= LIGHT).mean()) >= 0.5
