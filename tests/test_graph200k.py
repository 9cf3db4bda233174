"""Laws of Graph200K as a source, on a tiny one of its shape (scripts/make_graph200k.py)."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from graphfolders import ITEMS, SIDE, draw_item, open_graph, write_both
from PIL import Image

from scripts import make_graph200k as maker
from vcloze_jax.config import UserError
from vcloze_jax.data import graph200k
from vcloze_jax.data.graph200k_items import COLUMNS, open_items
from vcloze_jax.data.graph200k_tasks import GROUP_OF, STYLES
from vcloze_jax.data.spans import scan_objects


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"arrow", "json"}: the two forms of the tiny dataset."""
    return write_both(tmp_path_factory.mktemp("graph200k"))


@pytest.fixture(scope="module")
def items(folders):
    return open_items(folders["arrow"] / "train")


@pytest.fixture
def source(folders):
    return open_graph(folders["arrow"])


def generator(*seed):
    return np.random.default_rng(seed)


# --- where pictures lie ---


@pytest.mark.parametrize("form", ["arrow", "json"])
@pytest.mark.parametrize("split", ITEMS)
def test_every_column_is_read(folders, form, split):
    """Both forms have what was drawn and lack what is null: every picture of every column, sets of
    edits and styles whole or not at all, references only if they are good enough."""
    found = open_items(folders[form] / split)
    assert len(found) == len(ITEMS[split]) and not found.notes
    for i, number in enumerate(ITEMS[split]):
        item = draw_item(number, SIDE)
        quality = item["quality_assessment"]
        for name, columns in COLUMNS.items():
            there = all(item[column] for column in columns)
            if name == "reference":
                there = quality is not None and quality["objectConsistency"] >= 3
            assert found.has[name][i] == there, (number, name)
            for k, column in enumerate(columns if there else ()):
                shown = found.picture(i, name, k)
                np.testing.assert_array_equal(shown, decode(item[column]), column)
        assert (
            found.describe(i)
            == f"{item['description']['item']} {item['description']['description_0']}"
        )


def decode(picture):
    return np.asarray(Image.open(io.BytesIO(maker.encode(picture))).convert("RGB"))


def test_some_annotations_are_missing(items):
    """The fixture is worth something: of most annotations some are null, and of none all."""
    counts = {name: int(there.sum()) for name, there in items.has.items()}
    assert all(3 <= count <= 8 for count in counts.values())
    assert sum(count < 8 for count in counts.values()) >= 10 and counts["reference"] == 6


def test_shards_are_mapped_not_read(folders):
    """Opening and showing a picture allocates next to nothing in Arrow's pools, reads nothing ahead
    and needs neither datasets nor JAX."""
    code = f"""
import sys, pyarrow as pa
from vcloze_jax.config import Recipe
from vcloze_jax.data.sources import draw_group, open_source
grids = open_source(Recipe(data="graph200k", data_dir={str(folders["arrow"])!r}))
assert grids.items.table.nbytes > 50_000
draw_group(grids, 0, 0, 2)
assert pa.total_allocated_bytes() < 10_000, pa.total_allocated_bytes()
assert {{"datasets", "jax", "tensorflow_datasets", "cv2"}}.isdisjoint(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_json_is_indexed_by_bytes(form, block):
    """Each object's place cuts it out again, in arrays and in lines, whatever the blocks, with text
    beyond ASCII; what is broken is told by its place."""
    objects = [{"a": "Füchse – 狐", "b": [1, {"c": None}]}, {"a": "]},{["}, {"a": "last"}]
    lines = [json.dumps(item, ensure_ascii=False) for item in objects]
    text = "[" + ", ".join(lines) + "]\n" if form == "array" else "\ufeff" + "\n".join(lines)
    data = text.encode()
    spans = [span for span, _ in scan_objects(data, block)]
    assert [json.loads(data[a:b]) for a, b in spans] == objects
    with pytest.raises(UserError, match=r"^byte \d+: "):
        list(scan_objects(data[:-4], block))


# --- what a grid shows ---


def test_missing_annotations_do_not_change_the_tasks(source, monkeypatch):
    """Tasks are drawn by the table whatever is null; items of a grid differ and have all that it
    shows."""
    shown = []
    monkeypatch.setattr(
        graph200k.Graph200KGrids,
        "show",
        lambda self, item, nodes, rng: (
            shown.append((item, nodes)) or np.zeros((len(nodes), 16, 16, 3))
        ),
    )
    kinds = []
    for seed in range(400):
        shape = source.shape(generator(seed))
        kinds.append(source.example(generator(1, seed), shape, [seed % 8]).kind)
        grid = shown[-shape.rows :]
        assert (
            len({item for item, _ in grid}) == shape.rows and len({nodes for _, nodes in grid}) == 1
        )
        for item, nodes in grid:
            assert all(
                source.items.has[name][item] for node in nodes for name in graph200k.needs(node)
            )
    shares = np.array([kinds.count(group) / 400 for group in dict.fromkeys(GROUP_OF.values())])
    assert (abs(shares - 1 / 12) < 5 * (1 / 12 * 11 / 12 / 400) ** 0.5).all()


def test_derived_cells(source):
    """Foreground and background add up to the target; a degradation is of the target, too; a style
    is beside the picture in it; an edit is one of five."""
    rng = generator(0)

    def show(item, *nodes):
        numbers = rng.integers(3), rng.integers(5)
        return [np.asarray(source.draw_node(item, node, numbers, rng)) for node in nodes]

    target, front, back = show(1, "target", "foreground", "background")
    np.testing.assert_array_equal(front + back, target)
    assert front.any() and back.any() and not (front * back).any()
    (turned,) = show(1, "rotate180")
    np.testing.assert_array_equal(turned[::-1, ::-1], target)
    for style in ("InstantStyle", "ReduxStyle"):
        pairs = [
            [np.asarray(source.items.picture(1, style, k + d)) for d in (0, 3)] for k in range(3)
        ]
        seen = set()
        for _ in range(20):
            picture, sample = show(1, style, f"{style}-style")
            (k,) = [k for k, pair in enumerate(pairs) if np.array_equal(pair[0], picture)]
            np.testing.assert_array_equal(sample, pairs[k][1])
            seen.add(k)
        assert seen == {*range(STYLES_OF_EACH)}
    edits = [np.asarray(source.items.picture(0, "FillEdit", k)).tobytes() for k in range(5)]
    assert {show(0, "FillEdit")[0].tobytes() for _ in range(60)} == {*edits}


STYLES_OF_EACH = len(COLUMNS[STYLES[0]]) // 2


def test_rows_are_drawn_apart(source):
    """What rows show hangs on (seed, index, row) alone: another order, blank cell or text leaves
    their cells as they are; degradations differ from row to row. The last row has the item that it
    is dealt, if that has what the task shows."""
    plain = dict(keep_order=True, reverse_masking=0.0, task_sentence=0.0, caption_dropout=1.0)
    other = replace(source, recipe=replace(source.recipe, **plain))
    for seed in range(20):
        shape = source.shape(generator(seed))._replace(rows=3)
        a, b = (s.example(generator(seed), shape, [seed % 8]) for s in (source, other))
        for row, again in zip(a.grid.rows, b.grid.rows, strict=True):
            cells = [sorted(c.tobytes() for c in a.grid.split(r.pixels)) for r in (row, again)]
            assert cells[0] == cells[1] and a.kind == b.kind
    noisy = next(task for task in GROUP_OF if task.name == "GaussianNoise->target")
    args = noisy, ("GaussianNoise", "target"), 3
    cells, content = source.draw_cells(generator(0), *args, [6])
    noise = cells[:, 0].astype(int) - cells[:, 1]
    assert len({round(float(n.std()), 3) for n in noise}) == 3
    target = source.items.picture(6, "target").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(cells[-1, 1], target)
    assert content == source.items.describe(6)


def test_cells_are_stretched_to_the_resolution(folders):
    """Every cell is R x R, R in whole tokens; one of the query row is blank, all of it."""
    grids = open_graph(folders["arrow"], resolution=50)
    for seed in range(8):
        shape = grids.shape(generator(seed))
        grid = grids.example(generator(seed), shape, [0]).grid
        assert grid.shape == shape.sizes == ((48, 48 * shape.columns),) * shape.rows
        assert grid.query.mask.sum() == 48 * 48 and len(grid.targets) == 1
        assert not any(row.mask.any() for row in grid.rows[:-1])


# --- what is held out ---


def test_the_test_split_is_held_out(source, folders):
    """Previews show its items; where there is none, the last items, which are not trained on."""
    assert len(source.held_out().items) == 4 and len(source.items) == 8
    previews = source.held_out().previews()
    assert [len(example.grid.rows) for example in previews] == [1, 2, 3] * 2
    assert all(example.grid.targets == [example.grid.columns - 1] for example in previews)
    for place in (folders["arrow"] / "train", folders["json"] / "train" / "data.json"):
        grids = open_graph(place)
        assert grids.numbers.tolist() == [0, 1, 2, 3, 4]
        assert grids.held_out().numbers.tolist() == [5, 6, 7]
        assert len(open_graph(place, held_out=0.0).numbers) == 8


def test_runs_know_what_they_learn_from(folders, source):
    """Another selection, resolution or content is another digest; another place is not."""
    arrow = folders["arrow"]
    others = [open_graph(arrow, t) for t in ("restoration", "gray->target", "without:gray->target")]
    others += [open_graph(folders["json"]), open_graph(arrow, resolution=48), source.held_out()]
    assert len({grids.digest() for grids in [source, *others]}) == 7
    assert open_graph(arrow / ".." / "arrow").digest() == source.digest()
    told = source.summary().splitlines()
    assert told[0] == "Graph200K: 8 items, 4 held out; 129 tasks"
    assert "openpose 7" in told[1] and "reference 6" in told[1]


# --- for users of tfds ---


def test_tfds_takes_every_column(items, folders):
    """The builder's records hold the encoded pictures, none or one, and encode by its features."""
    from vcloze_jax.data.graph200k_builder import PICTURES, Graph200K

    builder = Graph200K(data_dir=folders["arrow"].parent / "tfds")
    records = dict(builder._generate_examples(folders["arrow"] / "train"))
    assert {*PICTURES} | {"qwen_2_5_meta"} <= {*records[0]} and len(records) == 8
    for i, record in records.items():
        item = draw_item(i, SIDE)
        builder.info.features.encode_example(record)
        for column in PICTURES:
            expected = [maker.encode(item[column])] if item[column] else []
            assert record[column] == expected, (i, column)
    assert records[3]["quality_assessment"]["objectConsistency"] == -1
    assert records[7]["FillEdit_meta"] == {"name": "", "description": ""}


def test_tfds_alone_reads_what_the_builder_wrote(folders, tmp_path):
    """Prepared, it is a data source without our class. (To write, tfds imports what it does not
    bring along.)"""
    pytest.importorskip("importlib_resources")
    import tensorflow_datasets as tfds

    from vcloze_jax.data.graph200k_builder import Graph200K

    builder = Graph200K(data_dir=tmp_path, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=folders["arrow"], num_shards=1)
    builder.download_and_prepare(download_dir=tmp_path, download_config=config)
    train = tfds.builder_from_directory(builder.data_path).as_data_source("train")
    assert len(train) == 8 and len(train[3]["mlsd"]) == 0
    np.testing.assert_array_equal(train[3]["target"][0], decode(draw_item(3, SIDE)["target"]))
