"""A tiny Graph200K of its shape (scripts/make_graph200k.py), and how it is opened."""

from functools import cache

from scripts import make_graph200k as maker
from vcloze_jax.config import Recipe
from vcloze_jax.data.sources import open_source

SIDE = 32
draw_item = cache(maker.draw_item)
ITEMS = {split: range(start, stop) for split, start, stop in (("train", 0, 8), ("test", 8, 12))}


def write_both(root):
    """{"arrow", "json"}: the two forms of the tiny dataset."""
    for split, numbers in ITEMS.items():
        drawn = [draw_item(number, SIDE) for number in numbers]
        maker.write_arrow(root / "arrow" / split, drawn)
        maker.write_json(root / "json" / split, drawn)
    return {name: root / name for name in ("arrow", "json")}


def open_graph(folder, tasks="", **settings):
    given = dict(resolution=SIDE, data=f"graph200k:{tasks}", data_dir=str(folder)) | settings
    return open_source(Recipe(**given))
