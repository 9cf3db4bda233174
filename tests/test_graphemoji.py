"""The shipped pictures and the views derived from them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vcloze_jax.config import MINI
from vcloze_jax.data import conditions, graphemoji
from vcloze_jax.data.conditions import CONDITIONS, derive, over_white
from vcloze_jax.data.graph import NODES, PACKS, VIEWS
from vcloze_jax.data.graphemoji import FOLDER, derive_nodes, read_subjects
from vcloze_jax.data.sources import open_source

PACK_FOLDER = FOLDER / "graphemoji"


@pytest.fixture(scope="module")
def train():
    return read_subjects("train")


@pytest.fixture(scope="module")
def held_out():
    return read_subjects("held_out")


@pytest.fixture
def few(held_out):
    return select(held_out, slice(3))


@pytest.fixture
def icon(held_out):
    return held_out.rgba[held_out.names.index("tiger"), 0]


def select(subjects, part):
    return replace(
        subjects,
        codepoints=subjects.codepoints[part],
        names=subjects.names[part],
        groups=subjects.groups[part],
        rgba=subjects.rgba[part],
    )


def test_splits_share_no_subject_and_no_family(train, held_out):
    """No subject of one split, nor its male or female relative, is in the other."""
    assert len(train.codepoints) == 1441 and len(held_out.codepoints) == 128
    families = [
        {tuple(c for c in k.split("-") if c not in graphemoji.RELATIVES) for k in s.codepoints}
        for s in (train, held_out)
    ]
    assert families[0].isdisjoint(families[1])
    assert len(set(train.names) | set(held_out.names)) == 1569


def test_split_is_a_function_of_the_codepoints(train, held_out):
    """The stored split is what the rule says of the stored subjects, in whatever order."""
    codepoints = sorted(held_out.codepoints + train.codepoints)
    assert graphemoji.choose_held_out(codepoints) == set(held_out.codepoints)


def test_every_view_of_every_subject_shows_something(train, held_out):
    """Eight views each, at least 0.5 % of the pixels opaque by half, texts not empty."""
    for subjects in (train, held_out):
        number = len(subjects.codepoints)
        assert subjects.rgba.shape == (number, 8, 64, 64, 4) and subjects.rgba.dtype == np.uint8
        assert ((subjects.rgba[..., 3] >= 128).mean((2, 3)) >= 0.005).all()
        assert len(subjects.names) == len(subjects.groups) == number
        assert all(subjects.names) and all(subjects.groups)


def test_views_of_one_subject_belong_together(held_out):
    """No view is another subject's: OpenMoji's lines lie within its colours, for every subject.

    Beside a neighbour's colours a third of the lines would lie outside.
    """
    color, line = (held_out.rgba[:, VIEWS.index(v), ..., 3] >= 128 for v in PACKS["openmoji"])
    assert not (line & ~color).any()
    assert (line & ~np.roll(color, 1, axis=0)).sum() > 0.2 * line.sum()


@pytest.mark.parametrize("pack", PACKS)
def test_tfds_alone_reads_the_packs(held_out, pack):
    """A pack is a prepared dataset: without our class tfds decodes the same four channels."""
    builder = tfds.builder_from_directory(PACK_FOLDER / pack / "1.0.0")
    source = builder.as_data_source("held_out")
    for i in (0, len(held_out.codepoints) - 1):
        assert source[i]["codepoint"].decode() == held_out.codepoints[i]
        for view in PACKS[pack]:
            assert np.array_equal(source[i][view], held_out.rgba[i, VIEWS.index(view)])


def test_reading_imports_no_tensorflow_prints_nothing_and_writes_nothing():
    """A load leaves TensorFlow alone, is silent, and leaves the package as it was."""
    before = sorted(PACK_FOLDER.rglob("*"))
    code = (
        "import sys\n"
        "from vcloze_jax.data.graphemoji import read_subjects\n"
        "read_subjects('held_out')\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    root, command = FOLDER.parents[1], [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(PACK_FOLDER.rglob("*")) == before


def test_unknown_split_is_an_error():
    """A split that does not exist is named in a ValueError."""
    with pytest.raises(ValueError, match="test"):
        read_subjects("test")


def test_packs_are_small_and_licensed():
    """Both packs together take at most 14 MB, and each one's LICENSES names all its views."""
    assert sum(f.stat().st_size for f in PACK_FOLDER.rglob("*") if f.is_file()) <= 14e6
    for pack, views in PACKS.items():
        notice = (PACK_FOLDER / pack / "LICENSES").read_text()
        assert all(f"\n{view} " in notice for view in views)


def test_nodes_of_a_subject_depend_on_nobody_else(few):
    """Derived views are the same in every call and beside whatever other subjects."""
    pictures = derive_nodes(few)
    assert pictures.shape == (3, len(NODES), 64, 64, 3) and pictures.dtype == np.uint8
    assert np.array_equal(derive_nodes(select(few, slice(1, 2))), pictures[1:2])


def test_every_condition_changes_the_picture(icon):
    """Each derived view is uint8 RGB and differs from the picture and from the others."""
    pictures = [over_white(icon)] + [derive(icon, name, 0) for name in CONDITIONS]
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(pictures)


@pytest.mark.parametrize("name", CONDITIONS)
def test_only_noise_and_hole_read_the_seed(icon, name):
    """Another seed gives another picture for noise and hole, and the same for the rest."""
    same = np.array_equal(derive(icon, name, 1), derive(icon, name, [2, 3]))
    assert same == (name not in ("noise", "hole"))


def test_over_white_is_exact_at_both_ends():
    """Opaque pixels keep their colour, transparent ones are white, between: the rounded mean."""
    color = np.arange(256, dtype=np.uint8)
    rgba = np.stack(np.broadcast_arrays(color, color, color, color[:, None]), -1)
    exact = (
        rgba[..., :3].astype(int) * rgba[..., 3:] + 255 * (255 - rgba[..., 3:].astype(int))
    ) / 255
    assert np.array_equal(over_white(rgba), np.rint(exact))
    assert np.array_equal(over_white(rgba)[255, :, 0], color)
    assert (over_white(rgba)[0] == 255).all()


def test_gray_mask_edges_and_distance_are_what_they_say(icon):
    """Gray views have equal channels; the mask is alpha; depth runs from 0 outside to 255."""
    for name in ("gray", "mask", "edges", "distance"):
        picture = derive(icon, name, 0)
        assert (picture == picture[..., :1]).all()
    assert np.array_equal(derive(icon, "mask", 0)[..., 0], icon[..., 3])
    assert set(np.unique(derive(icon, "edges", 0))) == {0, 255}
    depth = derive(icon, "distance", 0)
    assert depth.max() == 255 and (depth[icon[..., 3] < 128] == 0).all()


def test_degradations_are_what_they_say(icon):
    """Low resolution is constant on its blocks, a palette has five colours, a hole is one box."""
    low = derive(icon, "low_resolution", 0)
    side = conditions.BLOCK
    assert np.array_equal(low, low[::side, ::side].repeat(side, 0).repeat(side, 1))
    assert len(np.unique(derive(icon, "palette", 0).reshape(-1, 3), axis=0)) <= conditions.COLORS
    hole = derive(icon, "hole", 0)
    y, x = np.nonzero((hole == 128).all(-1))
    box = np.s_[y.min() : y.max() + 1, x.min() : x.max() + 1]
    assert (hole[box] == 128).all()
    restored = hole.copy()
    restored[box] = over_white(icon)[box]
    assert np.array_equal(restored, over_white(icon))


def test_unknown_condition_is_an_error(icon):
    """A name that does not exist is named, with those that do."""
    with pytest.raises(ValueError, match="'depth'.*distance"):
        derive(icon, "depth", 0)


def test_infilling_is_never_told_a_task():
    """Previews of the infilling base ask as its grids do: what the last cell shows, no task."""
    asked, others = (
        open_source(replace(MINI.recipe, data=f"graphemoji{x}")).previews() for x in ("-fill", "")
    )
    assert not any("[IMAGE1]" in example.prompt for example in asked)
    assert all("[IMAGE1]" in example.prompt for example in others)
    assert all("depicts" in example.prompt for example in asked)
