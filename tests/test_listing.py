"""Laws of data/listing.py: it lists what training draws of the user's own data, no more."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_owndata import ROOT, write_pairs

from vcloze_jax.config import MINI
from vcloze_jax.data import listing
from vcloze_jax.data.owndata import open_own
from vcloze_jax.data.sources import draw_group, draw_validation

RECIPE = replace(MINI.recipe, resolution=16)
CHANGES = (
    {},
    dict(fixed_templates=True),
    dict(keep_order=True, reverse_masking=0.0),
    dict(task_sentence=1.0, content_sentence=0.0, caption_dropout=0.0),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of captioned pairs; a file of pairs of three columns; one of grids, with a mask."""
    folder = tmp_path_factory.mktemp("listed")
    write_pairs(folder / "pairs", 8, ((32, 32), (32, 48)))
    pictures = ROOT / "examples/pictures"
    views = "edges", "fluent_3d"
    names = [f"{pictures}/{x}_{view}.png" for x in ("magnet", "crab") for view in views]
    triples = [dict(cond1=names[i], cond2=names[i - 1], target=names[i - 2]) for i in range(4)]
    (folder / "triples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in triples))
    mask = {"image": names[3], "mask": f"{pictures}/crab_mask.png"}
    grids = [{"image": [names[:2], names[2:]], "task_prompt": "Draw [IMAGE2]."}]
    grids += [{"image": [names[:2], [names[2], mask]]}]
    (folder / "grids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in grids))
    return [folder / "pairs", folder / "triples.jsonl", folder / "grids.jsonl"]


def rows_of(grid):
    """Every row of a grid, as it is and blanked, by its content."""
    plain = [(row.pixels.tobytes(), np.zeros_like(row.mask).tobytes()) for row in grid.rows]
    return {*plain, *((row.pixels.tobytes(), row.mask.tobytes()) for row in grid.rows)}


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "paper's")
def test_what_is_drawn_is_listed(sources, changes):
    """Every prompt and every row, blanked or not, of grids that are drawn of a source is listed,
    and the prompts of its validation and its previews; there are as many rows as counted."""
    for path in sources:
        source = open_own(str(path), replace(RECIPE, data=str(path), **changes))
        prompts = set(listing.list_prompts(source))
        grids = [
            grid
            for member in listing.list_members(source)
            for grid in listing.list_grids(source, *member)
        ]
        rows = set().union(*map(rows_of, grids))
        count, tokens = listing.count_rows(source)
        assert len(rows) == count and tokens * 256 * 3 == sum(len(pixels) for pixels, _ in rows)
        groups = [draw_group(source, 0, number, 8) for number in range(12)]
        for example in (example for group in groups for example in group):
            assert rows_of(example.grid) <= rows
            assert example.prompt in prompts
        asked = [e for group in draw_validation(source.held_out(), 8, 3) for e in group]
        asked += source.held_out().previews()
        assert {example.prompt for example in asked} <= prompts


def test_what_is_listed_is_drawn(sources):
    """Of few wordings all are drawn sooner or later, but for those that a cache has for others: the
    empty text, and what held-out samples and previews say."""
    changes = dict(fixed_templates=True, held_out=0.0, caption_dropout=0.5)
    path = sources[0]
    source = open_own(str(path), replace(RECIPE, data=str(path), **changes))
    drawn = {e.prompt for n in range(150) for e in draw_group(source, 0, n, 8)}
    previews = {example.prompt for example in source.held_out().previews()}
    assert set(listing.list_prompts(source)) - previews <= drawn
