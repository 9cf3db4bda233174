"""Grids as numbers, and subjects that are moved (scripts/train_mini.py, scripts/variations.py)."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vcloze_jax.config import MINI
from vcloze_jax.data import graphemoji
from vcloze_jax.data.conditions import derive
from vcloze_jax.data.graph import NODES, VIEWS
from vcloze_jax.data.sources import draw_group, open_source
from vcloze_jax.storage.places import MINI_FOLDER
from vcloze_jax.storage.textreader import Tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import train_mini  # noqa: E402
import variations  # noqa: E402

VIEWED = len(VIEWS)


@pytest.mark.parametrize("data", ["graphemoji", "graphemoji-fill"])
def test_what_is_looked_up_is_what_train_py_draws(data, monkeypatch):
    """Without variations a group that was drawn as numbers is train.py's group of that number:
    pixels, masks, tokens and kinds of every grid."""
    recipe = replace(MINI.recipe, data=data, group=3, seed=5)
    tokenizers, source = Tokenizers(MINI_FOLDER, MINI.t5, MINI.clip), open_source(recipe)
    names, pictures = graphemoji.read_nodes("train")
    table = pictures.reshape(1, len(names), len(NODES), -1).view(np.uint32)
    monkeypatch.setattr(graphemoji, "read_subjects", lambda split: source)
    train_mini.begin(recipe, tokenizers, 0)
    for number in range(3):
        drawn = train_mini.draw_group(number)
        group = draw_group(source, recipe.seed, number, recipe.group)
        rows = train_mini.look_up(table, drawn.where, drawn.masks)
        for b, example in enumerate(group):
            assert example.grid.shape == drawn.grid.shape
            for row, (pixels, mask) in zip(example.grid.rows, rows, strict=True):
                np.testing.assert_array_equal(pixels[b], row.pixels)
                np.testing.assert_array_equal(row.mask, False if mask is None else mask[b])
            assert drawn.kinds[b].tobytes().rstrip() == example.kind.encode()
        for ours, theirs in zip(drawn.ids, tokenizers([x.prompt for x in group]), strict=False):
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def few():
    """Three subjects that are held out."""
    all_of_them = graphemoji.read_subjects("held_out")
    lists = (getattr(all_of_them, name)[:3] for name in ("codepoints", "names", "groups", "rgba"))
    return graphemoji.Subjects(*lists)


def test_variation_0_is_the_subject_itself(few):
    np.testing.assert_array_equal(
        variations.vary_nodes(few, 0), graphemoji.read_nodes("held_out")[1][:3]
    )


def test_a_variation_moves_all_views_alike_and_derives_the_rest(few, monkeypatch):
    """Its number decides a variation, subjects differ; conditions are those of the view that has
    moved; where nothing is moved a tint exchanges the channels of views and nothing else."""
    one, other = (variations.vary_nodes(few, number) for number in (1, 2))
    np.testing.assert_array_equal(one, variations.vary_nodes(few, 1))
    assert (one != other).any((1, 2, 3, 4)).all()
    monkeypatch.setattr(variations, "draw_affine", lambda rng: (1, 0, 0, 0, 1, 0))
    asis, still, tinted = (variations.vary_nodes(few, number).astype(int) for number in (0, 6, 7))
    channels = list(variations.TINTS[1])
    # Pillow moves colours times alpha, which rounds them once; then they lie on white.
    np.testing.assert_allclose(still[:, :VIEWED], asis[:, :VIEWED], rtol=0, atol=1)
    np.testing.assert_array_equal(tinted[:, :VIEWED], still[:, :VIEWED][..., channels])
    blurred = derive(few.rgba[0, 0][..., [*channels, 3]], "blur", 0)
    np.testing.assert_allclose(tinted[0, NODES.index("blur")], blurred, rtol=0, atol=1)


def test_rows_share_a_tint_and_half_of_the_grids_are_not_varied():
    """Every variation is drawn, by rows whose tint is the same."""
    rng = np.random.default_rng(0)
    for count in (0, 1, 6, 8, 24):
        drawn = np.array([variations.draw_numbers(rng, 3, count) for _ in range(2000)])
        assert set(drawn.ravel()) == set(range(count + 1))
        tints = drawn % len(variations.TINTS)
        varied = drawn.any(1)
        assert (tints == tints[:, :1])[varied].all() and drawn[varied].all()
        if count:  # 0.5, four deviations of the mean of 2000
            assert abs(varied.mean() - 0.5) < 4 * 0.5 / 2000**0.5
