"""Laws of what --data names, and of what is refused there."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.graph import SIZE
from vcloze_jax.data.sources import open_source

EMOJI = ["graphemoji", "graphemoji:gray->fluent_flat", "graphemoji-fill"]


def open_named(name, **changes):
    """What --data names, by mini's recipe."""
    return open_source(replace(MINI.recipe, data=str(name), **changes))


UNKNOWN = "no such data; use graphemoji, graphemoji:TASK, graphemoji-fill, graph200k, graph200k:"


@pytest.mark.parametrize("name", ["nowhere.jsonl", "", "graphemoji-fill:x", "graphemojis"])
def test_unknown_data_is_refused(name):
    """What --data does not name is one line that says what it could."""
    with pytest.raises(UserError, match=f"^--data {name}: {UNKNOWN}"):
        open_named(name)


def test_unknown_tasks_and_folders():
    """A task's name is checked at once, and so is where the data lie."""
    with pytest.raises(UserError, match="^--data gray->x: not CONDITION.* nodes of fluent_3d"):
        open_named("graphemoji:gray->x")
    with pytest.raises(
        UserError, match="^--data graph200k: --data-dir is missing; name the folder"
    ):
        open_named("graph200k")
    with pytest.raises(UserError, match="^--data-dir x: only graph200k lies in one; leave it out$"):
        open_named("graphemoji", data_dir="x")


@pytest.mark.parametrize("name", EMOJI)
def test_a_resolution_is_obeyed_or_refused(name):
    """GraphEmoji's cells have the size of its pictures; another is an error, not ignored."""
    assert {shape[2:] for shape in open_named(name).shapes()} == {(SIZE, SIZE)}
    with pytest.raises(UserError, match="^--resolution 128: .* 64 x 64 pixels; leave it at 64$"):
        open_named(name, resolution=128)


@pytest.mark.parametrize(
    "data, change",
    [
        ("graphemoji", {"held_out": 0.5}),
        ("graphemoji:gray->fluent_flat", {"held_out": 0.5}),
        ("graphemoji-fill", {"keep_order": True}),
        ("graphemoji-fill", {"task_sentence": 0.1}),
        ("examples/pairs", {"reverse_held_out": True}),
    ],
)
def test_settings_that_mean_nothing_are_refused(data, change):
    """Law: a data setting of the recipe is obeyed or refused by name, never silently left."""
    (name,) = change
    told = f"^--{name.replace('_', '-')}: means nothing to --data {data}; leave it away"
    with pytest.raises(UserError, match=told):
        open_source(replace(MINI.recipe, data=data, **change))


def test_opening_is_cheap():
    """No source imports JAX when it is opened, nor reads GraphEmoji's pictures; a file needs none
    of the others' libraries."""
    code = f"""
import sys
from dataclasses import replace
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.sources import open_source
open_named = lambda name: open_source(replace(MINI.recipe, data=name))
try: open_named({__file__!r})
except UserError as error: assert "line 1" in str(error)
assert {{"tensorflow_datasets", "scipy", "jax"}}.isdisjoint(sys.modules), "file"
for name in {EMOJI}: open_named(name).held_out()
from vcloze_jax.data.graphemoji import read_nodes
assert read_nodes.cache_info().misses == 0
assert {{"jax", "flax", "tensorflow"}}.isdisjoint(sys.modules), "ours"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_task_is_the_only_one_that_is_drawn():
    """graphemoji:TASK has that task's columns; graphemoji alone has all that are trained."""
    widths = {}
    for name in ("graphemoji", "graphemoji:", "graphemoji:edges+blur->fluent_3d"):
        grids = open_named(name)
        widths[name] = {grids.shape(np.random.default_rng(i))[1] for i in range(100)}
    assert list(widths.values()) == [{2, 3, 4}, {2, 3, 4}, {3}]
