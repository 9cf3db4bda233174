"""A grid laid out for people: all its cells on a white sheet, those that are painted marked."""

import numpy as np
from PIL import Image, ImageDraw

from vcloze_jax.grid import Grid, Row

GUTTER = 8  # white pixels around every cell
LABEL = 14  # pixels of a line of text above a sheet
TILES = 4  # sheets beside each other
LARGEST = 400  # pixels to a side of a sheet among many
MARK = (226, 88, 34)  # colour of the corners that mark a painted cell


def cell_boxes(grid: Grid) -> list[list[list[int]]]:
    """[x, y, w, h] of every cell of every row in the sheet of `compose`, in pixels."""
    boxes, y = [], GUTTER
    for h, width in grid.shape:
        w = width // grid.columns
        boxes.append([[GUTTER + i * (w + GUTTER), y, w, h] for i in range(grid.columns)])
        y += h + GUTTER
    return boxes


def compose(grid: Grid, painted: np.ndarray | None = None) -> np.ndarray:
    """Lay all cells on a white sheet, rows left-aligned: uint8 [height, width, 3].

    `painted` is the query row as decoded; without it the sheet shows the inputs. Gutters of
    8 pixels surround every cell, and only they carry the corners that mark the targets.
    """
    query = grid.query.pixels if painted is None else grid.keep(painted)
    boxes = cell_boxes(grid)
    width = max(x + w for x, _, w, _ in (row[-1] for row in boxes)) + GUTTER
    height = boxes[-1][0][1] + boxes[-1][0][3] + GUTTER
    sheet = np.full((height, width, 3), 255, np.uint8)
    for row, pixels in zip(boxes, [*(r.pixels for r in grid.rows[:-1]), query], strict=True):
        for (x, y, w, h), cell in zip(row, grid.split(pixels), strict=True):
            sheet[y : y + h, x : x + w] = cell
    for i in grid.targets:
        _mark(sheet, boxes[-1][i])
    return sheet


def compose_columns(title: str, grid: Grid, columns: dict[str, np.ndarray | None]) -> np.ndarray:
    """One grid several times side by side, labelled: {label: its query row as painted, or None for
    the truth}. uint8 [height, width, 3]."""
    above = ((LABEL, 0), (0, 0), (0, 0))
    sheets = [compose(grid, q) for q in columns.values()]
    sheet = Image.fromarray(np.hstack([np.pad(s, above, constant_values=255) for s in sheets]))
    draw, width = ImageDraw.Draw(sheet), sheet.width // len(columns)
    for i, label in enumerate(columns):
        draw.text((i * width + GUTTER, 2), label if i else f"{title}: {label}", fill=(0, 0, 0))
    return np.asarray(sheet)


def label_cells(cells: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Cells uint8 [h, w, 3] of one size side by side on white, each below its label."""
    (h, w), left = cells[0][1].shape[:2], GUTTER
    draw = ImageDraw.Draw(Image.new("1", (1, 1)))
    widths = [max(w, int(draw.textlength(label)) + 1) + GUTTER for label, _ in cells]
    strip = Image.new("RGB", (sum(widths) + GUTTER, LABEL + h + GUTTER), "white")
    draw = ImageDraw.Draw(strip)
    for (label, cell), width in zip(cells, widths, strict=True):
        draw.text((left, 2), label, fill=(0, 0, 0))
        strip.paste(Image.fromarray(cell), (left, LABEL))
        left += width
    return np.asarray(strip)


def tile_grids(grids: list[Grid]) -> np.ndarray:
    """Grids to learn from, numbered, their truth shown and hatched where it is masked, `TILES`
    beside each other and none larger than `LARGEST`: uint8 [height, width, 3]."""
    sheets = [Image.fromarray(compose(_hatch(grid))) for grid in grids]
    for sheet in sheets:
        sheet.thumbnail((LARGEST, LARGEST))
    width = max(sheet.width for sheet in sheets) + GUTTER
    height = max(sheet.height for sheet in sheets) + LABEL
    tiled = Image.new("RGB", (width * TILES, height * -(-len(sheets) // TILES)), "white")
    draw = ImageDraw.Draw(tiled)
    for i, sheet in enumerate(sheets):
        x, y = i % TILES * width, i // TILES * height
        draw.text((x + GUTTER, y + 2), str(i + 1), fill=(0, 0, 0))
        tiled.paste(sheet, (x, y + LABEL))
    return np.asarray(tiled)


def stack_sheets(sheets: list[np.ndarray]) -> np.ndarray:
    """Sheets one below the other, left-aligned on white."""
    width = max(sheet.shape[1] for sheet in sheets)
    beside = [((0, 0), (0, width - sheet.shape[1]), (0, 0)) for sheet in sheets]
    pairs = zip(sheets, beside, strict=True)
    return np.concatenate([np.pad(sheet, pad, constant_values=255) for sheet, pad in pairs])


def _hatch(grid: Grid) -> Grid:
    """The same grid with stripes over its masked pixels."""
    rows = []
    for row in grid.rows:
        y, x = np.indices(row.mask.shape)
        stripes = row.mask & ((x + y) % max(row.size[0] // 6, 4) < max(row.size[0] // 32, 1))
        rows.append(Row(np.where(stripes[..., None], np.uint8(MARK), row.pixels), row.mask))
    return Grid(tuple(rows), grid.columns)


def _mark(sheet: np.ndarray, box: list[int]) -> None:
    """Draw the four corners of a frame that lies 2 pixels outside `box` and is 2 pixels thick."""
    x, y, w, h = box[0] - 4, box[1] - 4, box[2] + 8, box[3] + 8
    frame = np.ones((h, w), bool)
    frame[2:-2, 2:-2] = False
    frame[10:-10] = frame[:, 10:-10] = False
    sheet[y : y + h, x : x + w][frame] = MARK
