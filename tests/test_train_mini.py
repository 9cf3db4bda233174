"""Grids as numbers, and subjects that are moved (scripts/train_mini.py, scripts/variations.py)."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vcloze_jax.config import MINI
from vcloze_jax.data import graphemoji
from vcloze_jax.data.conditions import derive
from vcloze_jax.data.graph import NODES, SIZE, VIEWS
from vcloze_jax.data.sources import draw_group, open_source
from vcloze_jax.storage.places import MINI_FOLDER
from vcloze_jax.storage.preset import load_preset
from vcloze_jax.storage.textreader import Tokenizers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import train_mini  # noqa: E402
import variations  # noqa: E402

VIEWED = len(VIEWS)


@pytest.mark.parametrize("data", ["graphemoji", "graphemoji-fill"])
def test_what_is_looked_up_is_what_train_py_draws(data, monkeypatch):
    """Without variations a group that was drawn as numbers is train.py's group of that number:
    pixels, masks, tokens and kinds of every grid."""
    recipe, mini = replace(MINI.recipe, data=data, group=3, seed=5), load_preset(MINI_FOLDER)
    tokenizers, source = Tokenizers(MINI_FOLDER, mini.t5, mini.clip), open_source(recipe)
    names, pictures = graphemoji.read_nodes("train")
    table = pictures.reshape(1, len(names), len(NODES), -1).view(np.uint32)
    monkeypatch.setattr(graphemoji, "read_subjects", lambda split: source)
    monkeypatch.setattr(train_mini, "follow_parent", lambda: None)
    monkeypatch.setattr(train_mini, "HELD", {})
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
    """Its number decides a variation, every subject has its own, all views of one the same;
    conditions are those of the view that has moved; where nothing is moved a tint exchanges the
    channels of views and nothing else."""
    alike = replace(few, rgba=np.broadcast_to(few.rgba[:1, :1], few.rgba.shape))
    one, other = (variations.vary_nodes(alike, number) for number in (1, 2))
    np.testing.assert_array_equal(one, variations.vary_nodes(alike, 1))
    assert (one != other).any((1, 2, 3, 4)).all()
    assert (one[:, :VIEWED] == one[:, :1]).all() and (one[0, 0] != one[1, 0]).any()
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


def test_a_moved_point_is_found_where_the_affine_says():
    """Angles to 25 degrees, sizes of 0.7 to 1.05, half of them mirrored, the middle at most two
    pixels from the cell's, or as far as a smaller subject has room."""
    mirrored = 0
    for seed in range(200):
        a, b, c, d, e, f = variations.draw_affine(np.random.default_rng(seed))
        back = np.array([[a, b], [d, e]])
        zoom = abs(np.linalg.det(back)) ** -0.5
        assert 0.7 <= zoom <= 1.05 and abs(np.degrees(np.arcsin(d * zoom))) <= 25
        mirrored += np.linalg.det(back) < 0
        middle = np.linalg.solve(back, np.full(2, SIZE / 2) - (c, f))
        room = variations.SHIFT + SIZE / 2 * max(0, variations.FULL - zoom)
        assert (abs(middle - SIZE / 2) <= room + 1e-9).all()
    assert abs(mirrored - 100) < 4 * 50**0.5  # four deviations of 200 halves


@pytest.mark.slow
def test_it_learns_what_train_py_learns(tmp_path):
    """Without variations two steps have train.py's losses, but for sums in another order, and
    leave weights behind."""
    flags = "--data graphemoji:gray-to-fluent_flat --rank 0 --batch 4 --group 2 --micro-batch 2"
    flags = [*flags.split(), "--steps", "2", "--preview-every", "9"]
    losses = []
    for name, own in (("train.py", []), ("scripts/train_mini.py", ["--varied", "0"])):
        out = tmp_path / Path(name).stem
        command = [sys.executable, ROOT / name, *flags, *own, "--out", out]
        subprocess.run(command, check=True, cwd=ROOT)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert (out / "weights/transformer/config.json").is_file()
    assert len(losses[0]) == 2
    # Rows are encoded together, not one by one; the second loss is of what the first one's taught.
    np.testing.assert_allclose(*losses, rtol=1e-4)
