"""A grid of cells: its sizes, masks, tokens, their positions and segments, and its targets cut out
again; and what is asked of it, the Spec.

Every row is one picture of C equal cells side by side, and is encoded as one. A cell has an area of
about resolution², sides of whole tokens and the shape of its row's first picture: pictures are
scaled until they cover it, their centre is kept (inputs/cells.py), and so rows may differ in size.
The last row is the query: its masked pixels are generated, all other pixels are given. (What
mini's infilling base learns from may mask pixels of any row.)
"""

from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path

import numpy as np

from vcloze_jax.placement import EXAMPLE, EXAMPLE_TARGET, FILL, QUERY, SEGMENTS, TARGET, Placement

PATCH = 16  # pixels of a token's side: 8 by the VAE, 2 by packing


@dataclass(frozen=True, eq=False)
class Row:
    """Cells side by side. `mask` is True where pixels are generated: there a spec's blank cell is
    black, and a grid to learn from holds the truth."""

    pixels: np.ndarray  # uint8 [h, C*w, 3]
    mask: np.ndarray  # bool [h, C*w]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.mask.shape


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows from top to bottom, the query last, each of `columns` equal cells.

    Tokens of 16 x 16 pixels run row by row, and row-major over a row's full width.
    """

    rows: tuple[Row, ...]
    columns: int
    first_row: int = 1  # its number in the positions; stock Fill's single picture has 0

    @classmethod
    def from_cells(cls, cells: np.ndarray, mask: np.ndarray) -> "Grid":
        """Join uint8 cells [R, C, h, w, 3]; `mask` is bool and broadcasts to [R, C, h, w]."""
        r, c, h, w, _ = cells.shape
        pixels = cells.swapaxes(1, 2).reshape(r, h, c * w, 3)
        masks = np.broadcast_to(mask, (r, c, h, w)).swapaxes(1, 2).reshape(r, h, c * w)
        return cls(tuple(map(Row, pixels, masks)), c)

    @property
    def query(self) -> Row:
        """The last row, the only one of which sampling masks anything."""
        return self.rows[-1]

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every row: grids of equal shape share one compiled program."""
        return tuple(row.size for row in self.rows)

    @property
    def tokens(self) -> int:
        """S, the number of image tokens of all rows."""
        return sum(h // PATCH * (w // PATCH) for h, w in self.shape)

    @property
    def targets(self) -> list[int]:
        """Columns of the query's cells that have a masked pixel."""
        return [i for i, mask in enumerate(self.split(self.query.mask)) if mask.any()]

    def pictures(self, placement: Placement = FILL) -> list[Row]:
        """What is encoded, each in one piece: the rows or, where they are apart, the cells."""
        if not placement.apart or self.columns == 1:
            return list(self.rows)
        cut = [map(Row, self.split(row.pixels), self.split(row.mask)) for row in self.rows]
        return [cell for cells in cut for cell in cells]

    def ids(self, placement: Placement = FILL) -> np.ndarray:
        """Positions of the tokens, float32 [S, 3]: number of their picture, then y, x in it. The
        paper's pictures are the rows, from 1 on, so that x runs through all cells of one."""
        pictures, ids, top = self.pictures(placement), [], 0
        targets, references = count(0, -1), count(1)
        of_role = [next(targets if p.mask.any() else references) for p in pictures]
        rules = dict(row=count(self.first_row), frame=count(), reference=of_role, page=repeat(0))
        for number, picture in zip(rules[placement.axis0], pictures, strict=False):
            y, x = np.indices([side // PATCH for side in picture.size])
            ids.append(np.stack([np.full_like(y, number), y + top, x], -1).reshape(-1, 3))
            top += len(y) * (placement.axis0 == "page")
        return np.concatenate(ids).astype(np.float32)

    def segments(self, placement: Placement = FILL) -> np.ndarray:
        """Of which segment each token is, int32 [S]: its row times five, and placement.SEGMENTS."""
        found = []
        for number, row in enumerate(self.rows):
            h, w = (side // PATCH for side in row.size)
            masked = row.mask.reshape(h, PATCH, w, PATCH).any((1, 3))  # h w
            shown = np.isin(np.arange(w) * self.columns // w, self.targets)  # w, as the query's
            given = QUERY if row is self.query else np.where(shown, EXAMPLE_TARGET, EXAMPLE)
            numbers = len(SEGMENTS) * number + np.where(masked, TARGET, given)
            found += self.split(numbers) if placement.apart else [numbers]
        return np.concatenate([numbers.ravel() for numbers in found]).astype(np.int32)

    def keep(self, painted: np.ndarray) -> np.ndarray:
        """Put the given pixels back into a painted query row, exactly: uint8 [h, C*w, 3]."""
        return np.where(self.query.mask[..., None], painted, self.query.pixels)

    def cut(self, painted: np.ndarray) -> list[np.ndarray]:
        """Cut the targets out of a painted query row, in column order: uint8 [h, w, 3] each."""
        cells = self.split(self.keep(painted))
        return [cells[i] for i in self.targets]

    def split(self, row: np.ndarray) -> list[np.ndarray]:
        """The cells of a row of pixels or masks."""
        return np.split(row, self.columns, axis=1)


@dataclass(frozen=True, eq=False)
class Spec:
    """One grid to paint, and how; with a `strength` a second pass, from the pixels it masks."""

    grid: Grid
    prompt: str  # what the grid is, what a row does, what the last cell shows
    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    latents: np.ndarray | None = None  # float32 [S, 64], the noise at t = 1; None: by the seed
    upsampling: object | None = None  # of inputs/upsampling.py: it has specs(spec, targets)
    content_prompt: str = ""  # bare; all that the second pass is told
    strength: float | None = None
    name: str = "grid"
    source: Path = Path()  # the file that it stood in
    resolved: dict = field(default_factory=dict)  # as JSON, every default filled in


def bucket(tokens: int, resolution: int) -> int:
    """What a grid of S `tokens` is padded to, so that few programs serve all grids: n pairs of
    cells of the preset's resolution (mini's have 32 tokens), n = 1 … 6, 8, 10, 13, 17, …"""
    unit = 2 * (resolution // PATCH) ** 2
    size = 1
    while size * unit < tokens:
        size += max(1, size // 3)
    return size * unit
