"""Laws of the user's own data that is broken: named, passed over, and too much of it refused."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_owndata import RECIPE, numbers, write_pairs

from vcloze_jax.config import UserError
from vcloze_jax.data.owndata import open_own
from vcloze_jax.data.sources import Shape, draw_group, draw_groups


@pytest.fixture
def worn(tmp_path):
    """250 pairs: pictures of 0 and 1 cannot be opened, one of 2 is cut in the midst of its data."""
    folder = write_pairs(tmp_path / "worn", 250)
    (folder / "in" / "000.png").write_bytes(b"")
    (folder / "out" / "001.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "in" / "002.png")
    whole = (folder / "in" / "002.png").read_bytes()
    (folder / "in" / "002.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_broken_samples_are_skipped(worn, capfd):
    """They are named and counted when they are found, never drawn, and draws stay what they are: a
    function of (seed, number), at every start and by any number of threads."""
    recipe = replace(RECIPE, held_out=0.0)
    source = open_own(str(worn), recipe)
    assert "2 of 250 samples broken, 2 allowed" in (told := capfd.readouterr().err)
    assert "000" in told and "001" in told
    source.broken.limit = 3
    groups = [draw_group(source, 0, number, 8) for number in range(60)]
    assert "002: image[0][0]: " in (told := capfd.readouterr().err) and told.count("002") < 4
    shown = {i for group in groups for example in group for i in numbers(example)}
    assert not shown & {0, 1, 2} and len(shown) > 150
    again = open_own(str(worn), recipe)
    again.broken.limit = 3
    threads = draw_groups(again, replace(recipe, threads=3), 20, 60)
    for group, other in zip(groups[20:], threads, strict=True):
        assert [numbers(e) for e in group] == [numbers(e) for e in other]
        assert len({numbers(e)[-1] for e in group}) == 8


def test_what_breaks_behind_its_header_is_named_at_the_start(tmp_path, capfd, monkeypatch):
    """A picture whose size can be told and whose pixels cannot, among those that are looked at:
    stderr is, as a command's, the very descriptor that decoders are kept from."""
    monkeypatch.setattr(sys, "stderr", open(2, "w", buffering=1, closefd=False))
    file = write_pairs(tmp_path / "cut", 120) / "in/000.png"
    file.write_bytes(file.read_bytes()[:60])
    open_own(f"{tmp_path}/cut", RECIPE)
    assert "cut: 000: image[0][0]: " in capfd.readouterr().err


def test_where_one_is_too_many_all_are_looked_at(tmp_path):
    """Of less than a hundred samples none may be broken: wherever it is it ends no run later."""
    file = write_pairs(tmp_path / "cut", 70) / "in/041.png"  # none of 32 that are spread evenly
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match="cut: 041: image.*1 of 70 samples broken, 0 allowed"):
        open_own(f"{tmp_path}/cut", RECIPE)


@pytest.mark.parametrize("few, cut", [(11, 5), (2, 1)])
def test_one_that_is_allowed_ends_no_run(tmp_path, few, cut):
    """A broken picture that is within the limit is passed over also where its bucket has fewer
    members than a group, or than a grid has rows."""
    sizes = [(64, 64)] * (300 - few) + [(128, 64)] * few
    folder = write_pairs(tmp_path / "cut", 300, sizes)
    file = folder / f"in/{300 - cut:03}.png"
    file.write_bytes(file.read_bytes()[:60])
    source = open_own(f"{folder}", replace(RECIPE, held_out=0.0))
    for shape in source.shapes():
        queries = np.arange(source.count(shape))
        source.example(np.random.default_rng(0), shape, queries)
    for seed in range(4):
        for number in range(40):
            draw_group(source, seed, number, 8)


def test_previews_pass_over_what_is_broken(tmp_path):
    """The first of the samples that are held out may be broken, where one is allowed."""
    folder = write_pairs(tmp_path / "cut", 200)
    first = numbers(open_own(f"{folder}", RECIPE).held_out().previews()[0])[-1]
    file = folder / f"in/{first:03}.png"
    file.write_bytes(file.read_bytes()[:60])
    previews = open_own(f"{folder}", RECIPE).held_out().previews()
    assert first not in {i for e in previews for i in numbers(e)}


def test_too_many_broken_samples_stop_the_run(worn):
    """More than one in a hundred ends it, and the line says which: also where a thread finds the
    last one."""
    recipe = replace(RECIPE, held_out=0.0)
    source = open_own(str(worn), recipe)
    with pytest.raises(
        UserError, match=r"worn: 002: .*\(3 of 250 samples broken, 2 allowed; .*001"
    ):
        list(draw_groups(source, recipe, 0, 400))
    (worn / "out" / "003.png").write_text("no picture")
    (worn.parent / "worn.sizes.npz").unlink()
    with pytest.raises(UserError, match="3 of 250 samples broken, 2 allowed"):
        open_own(str(worn), RECIPE)


def test_what_was_repaired_is_learnt(worn):
    """Broken pictures are looked at again at every start, all others are not."""
    assert 0 not in open_own(str(worn), RECIPE).members(Shape(1, 2, 64, 64))
    Image.new("RGB", (64, 64)).save(worn / "in" / "000.png")
    everything = open_own(str(worn), replace(RECIPE, held_out=0.0))
    assert 0 in everything.members(Shape(1, 2, 64, 64)) and len(everything.broken.reasons) == 1
