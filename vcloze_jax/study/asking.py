"""Stations of the walk: what is asked, from cells to words."""

import numpy as np

from vcloze_jax import conditioning
from vcloze_jax.data.graphemoji import GraphEmojiGrids
from vcloze_jax.grid import PATCH, Grid, Row, bucket
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.sheet import MARK, compose
from vcloze_jax.model import ops
from vcloze_jax.model.text import CLIPTextEncoder, T5Encoder
from vcloze_jax.questions import pose_question
from vcloze_jax.study import draw
from vcloze_jax.study.journey import TASK, Station
from vcloze_jax.study.page import Figure


def visit_cells(j):
    rows = j.spec.grid.rows
    cell = j.spec.grid.split(rows[0].pixels)[0]
    what = f"{len(rows) - 1} examples of `{TASK.name}`, and the query, whose last cell is asked."
    return Station(
        "Cells",
        f"{what} Here they come from GraphEmoji's task graph; `sample.py` reads them from a spec.",
        (pose_question, GraphEmojiGrids.picture, compose),
        {"a cell": cell, "cells": f"{len(rows)} rows of {j.spec.grid.columns}"},
        [Figure(compose(j.spec.grid), "The grid. The marked cell is painted.", 2)],
    )


def visit_rows(j):
    grid = j.spec.grid
    masks = [np.where(row.mask[..., None], np.uint8(MARK), np.uint8(238)) for row in grid.rows]
    pairs = zip([row.pixels for row in grid.rows], masks, strict=True)
    picture = draw.tile([picture for pair in pairs for picture in pair], 2)
    return Station(
        "Rows and masks",
        "The cells of a row are joined: to the model a row is one picture, and is encoded as one. "
        "A mask says which pixels are generated; in sampling only the last row has any.",
        (Grid.from_cells, Row, Grid),
        {"row.pixels": grid.query.pixels, "row.mask": grid.query.mask},
        [Figure(picture, "Rows as pictures, and their masks.", 2)],
    )


def visit_tokens(j):
    grid, resolution = j.spec.grid, j.painter.preset.resolution
    return Station(
        "Tokens",
        f"A patch of {PATCH} x {PATCH} pixels is a token: 8 by the autoencoder, 2 by packing. "
        "Tokens run row by row, from left to right over the whole row, across the border of cells. "
        "So that few programs serve all grids, they are padded on the right, up to a bucket.",
        (Grid.tokens, bucket),
        {"grid.tokens": grid.tokens, "bucket": bucket(grid.tokens, resolution)},
        [Figure(draw.number_tokens(grid), "The tokens in their order.")],
    )


def visit_positions(j):
    config = j.painter.preset.flux
    ids = j.spec.grid.ids(config.placement)
    names = "row of the grid", "y in the row", "x in the row"
    maps = [draw.map_tokens(j.spec.grid, axis, 0, ids.max(), 8) for axis in ids.T]
    sheet = draw.label_columns({n: m[None] for n, m in zip(names, maps, strict=True)})
    cos, sin = (table[0, :, 0] for table in j.context.pe)  # L K/2
    first = len(j.canvas.txt)
    waves = draw.colour(cos[first : first + len(ids)].T, -1, 1, "RdBu")
    bands = ", ".join(str(dim // 2) for dim in config.axes_dim)
    return Station(
        "Positions",
        "A token knows which row it is in, and where in that row. Attention compares positions by "
        "rotating pairs of channels: each of the three axes turns some pairs, each at a speed of "
        "its own. Text stands at 0, 0, 0.",
        (Grid.ids, conditioning.position_table, ops.rope_table, ops.rope),
        {"ids": ids, "cos": j.context.pe[0], "sin": j.context.pe[1]},
        [
            Figure(sheet, "The three axes, from 0, dark, on one scale.", 2),
            Figure(
                draw.magnify(waves, 5),
                f"The cosines of the image tokens, a column each: {bands} speeds of the row, y, x "
                "from top to bottom, each axis from fast to slow; red is -1, blue 1.",
            ),
        ],
    )


def visit_words(j):
    return Station(
        "Words",
        f"The prompt says how many pictures there are, and what a row does: “{j.spec.prompt}” "
        "T5 gives a vector for each of its tokens, which stand before those of the image; CLIP one "
        "for all, which joins the time.",
        (prompts.layout_prompt, prompts.task_prompt, T5Encoder, CLIPTextEncoder),
        {"txt": j.canvas.txt, "pooled": j.canvas.pooled},
        [],
    )


STATIONS = (visit_cells, visit_rows, visit_tokens, visit_positions, visit_words)
