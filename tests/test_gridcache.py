"""Laws of --cache: training from it is training; it is filled once, by whoever comes, and never
holds what is of other weights or pictures."""

import shutil
from collections import Counter, namedtuple
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hostpair import ends, start_pair
from PIL import Image
from runs import ROOT, assert_same_run, flags, make_home
from test_hosts import assert_equal

import train
from vcloze_jax.config import UserError
from vcloze_jax.data.listing import count_rows
from vcloze_jax.data.owndata import open_own
from vcloze_jax.devices import make_mesh, parse_mesh
from vcloze_jax.storage import arraystore, gridcache, models
from vcloze_jax.storage.gridcache import fill_cache
from vcloze_jax.storage.textreader import Tokenizers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The weights and the grids of the runs; pictures/, where the grids' own may be changed."""
    home = make_home(tmp_path_factory.mktemp("home"))
    shutil.copytree(ROOT / "examples/pictures", home / "pictures")
    lines = (home / "grids.jsonl").read_text().replace(f"{ROOT}/examples/", "")
    (home / "grids.jsonl").write_text(lines)
    return home


def run(home, out, mesh, **changes):
    """The folder of a run of two steps."""
    argv = flags(home, home / out, mesh=mesh, steps=2, save_every=2, preview_every=2, **changes)
    assert train.main(argv) == 0
    return home / out


def fill(home, cache, mesh="1", **changes):
    """Fill a cache for a run of the home's grids -> it, the source."""
    wanted = dict(data=str(home / "grids.jsonl"), resolution=32, cache=str(cache), batch=8, group=8)
    recipe = replace(tiny.TINY.recipe, **wanted | changes)
    source, preset = open_own(recipe.data, recipe), replace(tiny.TINY, recipe=recipe)
    weights = home / "weights"
    how = make_mesh(parse_mesh(mesh)), Tokenizers(weights, preset.t5, preset.clip)
    return fill_cache(source, preset, weights, *how, home / "checkpoints"), source


def files(cache):
    """The names of all entries."""
    return {str(file.relative_to(cache)) for file in cache.rglob("*.safetensors")}


@pytest.fixture
def work(monkeypatch):
    """How often something is written, by the names of its arrays; "loads" of text encoders."""
    done, write = Counter(), arraystore.ArrayStore.write
    load = models.LazyModels.load_encoders

    def counted(store, key, arrays):
        done[store.names] += 1
        write(store, key, arrays)

    def counted_load(self):
        done["loads"] += 1
        return load(self)

    monkeypatch.setattr(arraystore.ArrayStore, "write", counted)
    monkeypatch.setattr(models.LazyModels, "load_encoders", counted_load)
    return done


@pytest.mark.slow
def test_training_from_a_cache(home, work):
    """On one device a run from a cache is the run without it, to the bit, previews included; on a
    mesh it is to rounding, since rows are encoded one by one. The same cache serves both, and is
    filled once."""
    plain = run(home, "plain", 1)
    assert_same_run(run(home, "cached", 1, cache=home / "cache"), plain)
    assert work.pop("loads") == 1 and work
    work.clear()
    assert_equal(run(home, "split", 2, cache=home / "cache"), plain)
    assert not work


@pytest.mark.slow
def test_a_cache_of_two_hosts(home, tmp_path):
    """Two hosts fill a cache together and train from it as one process without one does."""
    argv = dict(steps=2, save_every=2, preview_every=2, mesh=2)
    codes, _, errors = ends(start_pair(flags(home, tmp_path / "two", cache=tmp_path / "c", **argv)))
    assert codes == [0, 0], errors
    assert train.main(flags(home, tmp_path / "one", **argv)) == 0
    assert_equal(tmp_path / "two", tmp_path / "one")


def test_each_is_encoded_once(home, tmp_path, work):
    """A filling that was interrupted goes on; one that is whole, of any run, is not begun again,
    and loads nothing."""
    whole, source = fill(home, tmp_path / "whole")
    total, entries = Counter(work), files(tmp_path / "whole")
    assert total[("moments",)] == count_rows(source)[0] - 1  # two grids share an example
    assert len(entries) == sum(total.values()) - total["loads"]

    class Interrupt(Exception):
        pass

    work.clear()
    write = arraystore.ArrayStore.write
    for limit in (3, 9, 20):

        def refuse(store, key, arrays, limit=limit):
            if sum(work.values()) - work["loads"] >= limit:
                raise Interrupt
            write(store, key, arrays)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(arraystore.ArrayStore, "write", refuse)
            fill(home, tmp_path / "parts")
        assert len(files(tmp_path / "parts")) == limit
    fill(home, tmp_path / "parts")
    assert files(tmp_path / "parts") == entries
    assert work - Counter(loads=work["loads"]) == total - Counter(loads=1)
    work.clear()
    fill(home, tmp_path / "parts", mesh="8", lr=0.1, seed=5)
    assert not work


def test_hosts_share_the_work(home, tmp_path, work, monkeypatch):
    """What one host leaves to others is theirs: together they encode all, each entry once. A host
    that does not see what others wrote says so."""
    monkeypatch.setattr(gridcache, "PATIENCE", 0)
    whole, _ = fill(home, tmp_path / "whole")
    work.clear()
    monkeypatch.setattr(gridcache, "pick_share", lambda things: things[0::2])
    with pytest.raises(UserError, match="name a folder that all of them see"):
        fill(home, tmp_path / "shared")
    monkeypatch.setattr(gridcache, "pick_share", lambda things: things[1::2])
    fill(home, tmp_path / "shared", mesh="8")
    assert files(tmp_path / "shared") == files(tmp_path / "whole")
    assert sum(work.values()) - work["loads"] == len(files(tmp_path / "whole"))


def test_of_these_weights_and_pictures_alone(home, tmp_path, work):
    """Entries are known by content: another picture, another fill of its blank cells, an encoder of
    other weights has entries of its own, and the same pictures elsewhere have these; times say
    nothing."""
    other = tmp_path / "other"
    shutil.copytree(home, other, ignore=shutil.ignore_patterns("*.sizes.npz", "cache*"))
    cache = tmp_path / "cache"
    fill(home, cache)
    before = files(cache)
    work.clear()
    fill(other, cache)
    assert not work and files(cache) == before
    for name in ("crab_edges", "skier_fluent_3d"):
        Image.new("RGB", (64, 64), "teal").save(other / f"pictures/{name}.png")
    fill(other, cache)
    assert {names for names in work} == {("moments",)} and before < files(cache)
    work.clear()
    fill(home, cache, mask_fill=0.5)
    assert {names for names in work} == {("moments",)}
    folders = {name.partition("/")[0] for name in files(cache)}
    tiny.weights_folder(tmp_path / "new/weights", seed=1)
    for name in ("vae", "text_encoder_2"):
        shutil.rmtree(other / "weights" / name)
        shutil.copytree(tmp_path / "new/weights" / name, other / "weights" / name)
        fill(other, cache)
        added = {name.partition("/")[0] for name in files(cache)} - folders
        assert [kind.partition("-")[0] for kind in added] == ["rows" if name == "vae" else "texts"]
        folders |= added


def test_damaged_entries(home, tmp_path, work):
    """A row that is damaged or gone is encoded again; a prompt, whose encoder is gone, ends the run
    in a line that names the file."""
    cache, source = fill(home, tmp_path / "cache")
    (example,) = source.previews()[:1]
    for file in cache.rows.folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    memory = gridcache.RowMemory(cache.models.vae, -1.0, "float32", cache.rows)
    work.clear()
    first, again = (memory.encode_grid(example.grid) for _ in range(2))
    assert work[("moments",)] == 3 and np.isfinite(first[0]).all()
    again = gridcache.RowMemory(cache.models.vae, -1.0, "float32", cache.rows)
    for one, other in zip(first, again.encode_grid(example.grid), strict=True):
        np.testing.assert_array_equal(one, other)
    tokenizers = Tokenizers(home / "weights", tiny.TINY.t5, tiny.TINY.clip)
    cache.read_prompts([example.prompt], tokenizers)
    for file in cache.texts.folder.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="safetensors: damaged or gone; start"):
        cache.read_prompts([example.prompt], tokenizers)
    work.clear()
    fill(home, tmp_path / "cache")
    assert work == {"loads": 1, ("txt", "pooled"): 1}
    cache.read_prompts([example.prompt], tokenizers)


def test_its_size_comes_first(home, tmp_path, work, monkeypatch, capsys):
    """What will be written is told before, at most so much and nearly that; where the disk has not
    as much, nothing is written or loaded, and the way out is named."""
    fill(home, tmp_path / "cache")
    said = capsys.readouterr().out
    told = float(said.partition(" kB at most")[0].rpartition(" ")[2])
    size = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors")) / 1000
    assert size <= told * 1.01 and told <= 1.1 * size, said
    fill(home, tmp_path / "cache")
    assert "at most" not in capsys.readouterr().out
    work.clear()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(gridcache.shutil, "disk_usage", lambda _: usage(1000 * (told - 1)))
    with pytest.raises(
        UserError, match="are free; free some space, or have fewer prompts: --fixed"
    ):
        fill(home, tmp_path / "full")
    assert not work and not files(tmp_path / "full")
    fill(home, tmp_path / "cache")  # which needs no more
    monkeypatch.setattr(gridcache, "MOST", 5)
    with pytest.raises(UserError, match="more than 5 prompts; word them as sampling does"):
        fill(home, tmp_path / "many")


REFUSED = {
    "--data graphemoji": "the grids of graphemoji are drawn without end",
    "--data graph200k --data-dir g": "the grids of graph200k are drawn without end",
    "": "the grids of graphemoji:gray->fluent_flat are drawn without end",
    "--data {data} --from-scratch": "text encoders are learnt, too",
}


@pytest.mark.parametrize("argv", REFUSED)
def test_refused(home, call, argv):
    """Where prompts and rows have no end, or the text encoders learn, one line says so, before
    JAX."""
    data = argv.format(data=home / "grids.jsonl")
    code, _, error = call(train.main, f"--cache {home}/refused --out {home}/no {data}")
    assert code == 2 and error.count("\n") == 1 and REFUSED[argv] in error
    assert not (home / "refused").exists()


def test_the_keys_of_prompts(home):
    """Prompts that are read alike, such as are cut at the same word, are one entry."""
    tokenizers = Tokenizers(home / "weights", tiny.TINY.t5, tiny.TINY.clip)
    long = "a fox " * 200
    keys = gridcache.list_keys(["", long, long + "x", "a"], tokenizers)
    assert len(keys) == 3 and {key[0].shape for key in keys} == {(1, tiny.TINY.t5.max_length)}
