"""A grid of cells: its sizes, masks, tokens and 3-D positions, and its targets cut out again; and
what is asked of it, the Spec.

Every row is one picture of C equal cells side by side, and is encoded as one; rows may differ in
size. The last row is the query: its masked pixels are generated, all other pixels are given. (What
mini's infilling base learns from may mask pixels of any row.)
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

PATCH = 16  # pixels of a token's side: 8 by the VAE, 2 by packing


@dataclass(frozen=True, eq=False)
class Row:
    """Cells side by side. `mask` is True where pixels are generated: there a spec's blank cell is
    black, and a grid to learn from holds the truth."""

    pixels: np.ndarray  # uint8 [h, C*w, 3]
    mask: np.ndarray  # bool [h, C*w]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]


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
        return tuple((row.height, row.width) for row in self.rows)

    @property
    def tokens(self) -> int:
        """S, the number of image tokens of all rows."""
        return sum(h // PATCH * (w // PATCH) for h, w in self.shape)

    @property
    def targets(self) -> list[int]:
        """Columns of the query's cells that have a masked pixel."""
        return [i for i, mask in enumerate(self.split(self.query.mask)) if mask.any()]

    def ids(self) -> np.ndarray:
        """Positions of the tokens, float32 [S, 3]: row number, then y, x in that row."""
        ids = []
        for number, (h, w) in enumerate(self.shape, start=self.first_row):
            y, x = np.mgrid[: h // PATCH, : w // PATCH]
            ids.append(np.stack([np.full_like(y, number), y, x], axis=-1).reshape(-1, 3))
        return np.concatenate(ids).astype(np.float32)

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
class Upsampling:
    """The second pass that a spec asks for (SDEdit): each target, enlarged and made noisy, is
    painted again as stock FLUX.1-Fill does it with one picture, all of it masked.

    Source: huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_fill.py.
    """

    width: int
    height: int
    strength: float  # (0, 1]: share of the steps that are taken; 1 forgets the first pass
    num_inference_steps: int  # N, of which the last strength * N are taken
    latents: np.ndarray | None = None  # float32 [S, 64] at t = 1, the same for every target

    @property
    def tokens(self) -> int:
        """S of one target."""
        return self.width // PATCH * (self.height // PATCH)

    def grid(self, target: np.ndarray) -> Grid:
        """A target, uint8 [h, w, 3], as the picture to start from: one cell, all of it masked."""
        size = self.width, self.height
        picture = Image.fromarray(target).resize(size, Image.Resampling.LANCZOS)
        row = Row(np.asarray(picture), np.ones(size[::-1], bool))
        return Grid((row,), columns=1, first_row=0)


@dataclass(frozen=True, eq=False)
class Spec:
    """One grid to paint, and how. With a `strength` it is a second pass: the masked pixels of its
    grid are what to start from."""

    grid: Grid
    prompt: str
    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    latents: np.ndarray | None = None  # float32 [S, 64], the noise at t = 1; None: by the seed
    upsampling: Upsampling | None = None
    content_prompt: str = ""  # bare; all that the second pass is told
    strength: float | None = None
    name: str = "grid"
    source: Path = Path()  # the file that it stood in
    resolved: dict = field(default_factory=dict)  # as JSON, every default filled in


def bucket(tokens: int, resolution: int) -> int:
    """Tokens that a grid of S `tokens` is padded to, so that few programs serve all grids: pairs of
    cells of the preset's resolution: 1 to 6, and from there on by a third, rounded down."""
    unit = 2 * (resolution // PATCH) ** 2
    size = 1
    while size * unit < tokens:
        size += max(1, size // 3)
    return size * unit
