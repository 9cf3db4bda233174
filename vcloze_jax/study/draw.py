"""Arrays as pictures: colour maps, patches over a grid, sheets with labels, curves. Knows no JAX.

All give uint8 [height, width, 3].
"""

import numpy as np
from PIL import Image, ImageDraw

from vcloze_jax.grid import PATCH
from vcloze_jax.inputs.sheet import MARK, label_cells, stack_sheets

GAP = 2  # pixels between pictures of a sheet


def magnify(pixels, times):
    """Every pixel as a square of so many."""
    return pixels.repeat(times, 0).repeat(times, 1)


def colour(values, low=None, high=None, name="viridis"):
    """A map [h, w] in colours, the darkest `low`, the brightest `high`; by default its extremes."""
    from matplotlib import colormaps  # slow to import

    low, high = (values.min() if low is None else low), (values.max() if high is None else high)
    shares = (values - low) / max(high - low, 1e-9)
    return (colormaps[name](np.clip(shares, 0, 1))[..., :3] * 255).round().astype(np.uint8)


def tile(pictures, across):
    """Pictures of one size, so many beside each other, on white."""
    around = ((0, GAP), (0, GAP), (0, 0))
    padded = [np.pad(picture, around, constant_values=255) for picture in pictures]
    rows = [np.hstack(padded[i : i + across]) for i in range(0, len(padded), across)]
    return stack_sheets(rows)


def number_tokens(grid, times=3):
    """A grid's rows with the border of every token and, at its corner, its number."""
    pictures, first, side = [], 0, PATCH * times
    for row in grid.rows:
        picture = Image.fromarray(magnify(row.pixels, times))
        draw, across = ImageDraw.Draw(picture), row.size[1] // PATCH
        for number in range(across * (row.size[0] // PATCH)):
            y, x = (side * k for k in divmod(number, across))
            draw.rectangle((x, y, x + side, y + side), outline=MARK)
            box = draw.textbbox((x + 3, y + 1), str(first + number))
            draw.rectangle(box, fill="white")
            draw.text((x + 3, y + 1), str(first + number), fill="black")
        first += across * (row.size[0] // PATCH)
        pictures.append(np.asarray(picture))
    return stack_sheets(pictures)


def spread_tokens(grid, values):
    """A number for every token, [S], as a map of the grid's rows: float [h/16, W/16] each."""
    maps, first = [], 0
    for h, w in grid.shape:
        rows, columns = h // PATCH, w // PATCH
        maps.append(values[first : first + rows * columns].reshape(rows, columns))
        first += rows * columns
    return maps


def map_tokens(grid, values, low=None, high=None, side=PATCH, name="viridis"):
    """`spread_tokens` in colours, one scale for all rows, a token a square."""
    low, high = (values.min() if low is None else low), (values.max() if high is None else high)
    maps = spread_tokens(grid, values)
    return stack_sheets([magnify(colour(m, low, high, name), side) for m in maps])


def label_columns(columns):
    """{label: pictures uint8 [N, h, w, 3]} of one size as a sheet: a column each, in rows."""
    below = ((0, 0), (0, GAP), (0, 0), (0, 0))
    padded = {name: np.pad(x, below, constant_values=255) for name, x in columns.items()}
    return label_cells([(name, np.concatenate(x)) for name, x in padded.items()])


def new_figure(panels=1, width=8.0, height=3.6):
    """A figure of matplotlib that belongs to no window, and its panels, in a list."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def render_figure(figure):
    """A figure of matplotlib as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
