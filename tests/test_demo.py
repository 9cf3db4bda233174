"""Laws of the page: it says what sample.py says, and keeps what it paints as sample.py does."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import sample
from vcloze_jax import demo
from vcloze_jax.config import UserError
from vcloze_jax.inputs.sheet import MARK
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.pipeline import Painting
from vcloze_jax.storage.places import MINI_LORA, adapter_and_name
from vcloze_jax.studio import Studio, name_adapter

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples/pictures"
SMALL = {"resolution": 32, "num_inference_steps": 2}
BROWSERS = "chromium", "chromium-browser", "google-chrome"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")


def file_of(name):
    return str(PICTURES / f"{name}.png")


def brushed(name):
    """What a brush leaves that went over the right half of a picture."""
    strokes = np.zeros((64, 64, 4), np.uint8)
    strokes[:, 32:] = *MARK, 255
    background = Image.open(file_of(name)).convert("RGBA")
    return {"background": background, "layers": [Image.fromarray(strokes)], "composite": None}


def test_cells(folder, tmp_path):
    """What is dropped is kept byte for byte, and nothing dropped is to be painted."""
    studio = Studio(folder, None, "2", tmp_path)
    nothing = {"background": None, "layers": [], "composite": None}
    clear = nothing | {"background": Image.new("RGBA", (8, 8))}
    saved = [studio.save_cell(x, tmp_path / "x") for x in (None, nothing, clear)]
    assert saved == [None] * 3 and studio.show_cell(None) is None
    icon = tmp_path / "icon.webp"
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(icon)
    saved = Path(studio.save_cell(str(icon), tmp_path / "given"))
    assert saved.name == "given.webp" and saved.read_bytes() == icon.read_bytes()


def test_strokes(folder, tmp_path):
    """What was brushed over is shown again as it was, and stays brushed over under new strokes,
    also where the editor gives back, instead of the picture and its layer, what it showed."""
    studio = Studio(folder, None, "2", tmp_path)
    cell = brushed("rocket_gray")
    shown = studio.show_cell(studio.save_cell(cell, tmp_path / "brushed"))
    assert np.array_equal(shown["layers"][0], cell["layers"][0])
    assert np.array_equal(shown["background"], cell["background"].convert("RGB"))
    seen = np.asarray(shown["composite"])
    assert (seen[:, 32:] == MARK).all()
    new = np.zeros((64, 64, 4), np.uint8)
    new[:8] = *MARK, 255
    edited = {"background": shown["composite"].convert("RGBA"), "layers": [Image.fromarray(new)]}
    saved = studio.save_cell(edited, tmp_path / "edited")
    assert np.array_equal(Image.open(saved["image"]), shown["background"])
    mask = np.asarray(Image.open(saved["mask"])) == 255
    assert mask[:, 32:].all() and mask[:8].all() and not mask[8:, :32].any()


def test_what_is_kept(folder, tmp_path):
    """A grid comes as sheets, step by step, then as a painting; its record opens as the same grid,
    and sample.py paints the same bytes of it."""
    studio = Studio(folder, None, "2", tmp_path)
    rows = [[file_of("poodle_fluent_flat"), file_of("poodle_fluent_3d")]]
    rows += [[brushed("rocket_fluent_flat"), brushed("rocket_fluent_3d")]]
    *sheets, painted = studio.paint(rows, SMALL | {"seed": 3}, [])
    assert sheets and all(Path(sheet["page0"]).suffix == ".png" for sheet in sheets)
    assert isinstance(painted["page0"], Painting)
    names = {"page0.json", "page0.png", "page0_film.webp", "page0_inputs"}
    names |= {"page0_target0.png", "page0_target1.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    examples, query, spec = studio.open(tmp_path / "page0.json")
    assert Path(examples[0][1]).read_bytes() == Path(rows[0][1]).read_bytes() and spec["seed"] == 3
    *_, again = studio.paint([*examples, query], SMALL | {"seed": 3}, [])
    assert again["page1"].grid.tobytes() == painted["page0"].grid.tobytes()
    argv = ["--grid", tmp_path / "page0.json", "--weights", folder, "--out", tmp_path / "cli"]
    sample.main([*map(str, argv), "--mesh", "2"])
    kept, made = (tmp_path / sub / "page0.png" for sub in ("", "cli"))
    assert kept.read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    "rows, keys, message",
    [
        ([[None]], {"seed": -1}, "^seed: must be an integer in 0"),
        ([[None], [None]], {}, r"^image\[0\]\[0\]: only the last row may hold targets"),
        ([["rocket_gray"]], {}, r"^image\[0\]: no target"),
    ],
)
def test_mistakes(folder, tmp_path, rows, keys, message):
    """A mistake is sample.py's line, and leaves nothing behind but a page that is ready."""
    studio = Studio(folder, None, "2", tmp_path)
    rows = [[cell and file_of(cell) for cell in row] for row in rows]
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            list(studio.paint(rows, SMALL | keys, []))
    with pytest.raises(UserError, match="none.safetensors"):
        list(studio.paint([[None]], SMALL, ["none.safetensors"]))
    with pytest.raises(FileNotFoundError):  # as of a file that Gradio has taken away
        list(studio.paint([["gone.png", None]], SMALL, []))
    assert not list(tmp_path.iterdir())


def test_other_keys(folder, tmp_path):
    """Keys of a record that the page has no field for go with it as JSON, and come back; the
    layout's sentence only where it does not follow from the grid."""
    row = [str(file_of("poodle_fluent_flat")), None]
    for told in ({}, {"layout_prompt": ""}, {"layout_prompt": "Four.", "adapter": "maps"}):
        (spec,) = read_specs([{"image": [row], **told, **SMALL}], tiny.TINY)
        text = demo.show_others(spec.resolved)
        assert (json.loads(text) if text else {}) == told == demo.read_others(text)
    for text in ("{", "[]", '{"a": 1, "a": 2}'):
        with pytest.raises(UserError, match="^other keys: "):
            demo.read_others(text)
    for given in (f"maps={MINI_LORA}:0.123456789", f"{MINI_LORA}:2.0"):
        assert name_adapter(adapter_and_name(given)) == given


def test_ports(tmp_path, monkeypatch):
    """A port that a page cannot have is refused before anything is loaded."""
    with socket.create_server((demo.LOCAL, 0)) as taken:
        monkeypatch.setattr(demo, "find_spec", lambda _: True)
        for port in (taken.getsockname()[1], 70_000):
            with pytest.raises(UserError, match=f"^--port {port}: .*; choose another"):
                demo.main(["--out", str(tmp_path), "--port", str(port)])


def test_without_gradio(monkeypatch, tmp_path):
    """Without Gradio one line says what to install."""
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'vcloze-jax\[demo\]'"):
        demo.main(["--out", str(tmp_path)])


@pytest.fixture
def chromium():
    """A browser of this machine; where there is none, or nothing to drive it, the test is skipped
    with what is missing by name."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        file = next(filter(None, map(shutil.which, BROWSERS)), play.chromium.executable_path)
        if not Path(file).exists():
            pytest.skip("no browser here: apt-get install chromium, or playwright install chromium")
        with play.chromium.launch(executable_path=file, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def page(chromium, folder, tmp_path):
    """The page of tiny models in a real browser; its files lie in tmp_path/out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--weights", folder, "--out", tmp_path / "out", "--port", port]
    command = [sys.executable, "-m", "vcloze_jax.demo", *map(str, argv)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    try:
        wait(lambda: answers(port))
        page = chromium.new_page(viewport={"width": 1500, "height": 1200})
        page.set_default_timeout(120_000)
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_selector("#cell_0_0")
        yield page
    finally:
        server.terminate()
        server.wait(30)


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait(ready, seconds=120):
    """Until `ready()` is true, which it gives."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def middle_of(page, cell):
    """The levels that are seen in the middle of a cell of the query, int [24, 24, 3]."""
    seen = page.locator(f"#{cell} canvas").first.screenshot()
    image = Image.open(io.BytesIO(seen)).convert("RGB")
    left, top = image.width // 2 - 12, image.height // 2 - 12
    return np.asarray(image.crop((left, top, left + 24, top + 24))).astype(int)


def is_drawn(page, cell):
    return middle_of(page, cell).mean() < 200  # an empty cell is nearly white


def is_marked(page, cell):
    return (np.abs(middle_of(page, cell) - MARK).max(-1) < 24).mean() > 0.2


def shown(page):
    """The first picture among the painted, as the browser has it."""
    source = page.locator("#shown img").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


@pytest.mark.slow
def test_in_a_browser(page, tmp_path):
    """What is no picture is told and taken back; pictures are dropped into cells, one is brushed
    over, and the painted cell is seen, and its film; the record, opened, lays out the same grid,
    which is painted to the same bytes, and the brush goes on where it was."""
    out = tmp_path / "out"

    def drop(cell, file):
        page.locator(f"#{cell} input[type=file]").first.set_input_files(file)
        page.wait_for_selector(f"#{cell} :is(img, canvas)")

    def told():
        text = page.locator("#told textarea").input_value()
        return text if text.startswith(("done", "error", "opened")) else ""

    def films():
        paths = [x.get_attribute("src") for x in page.locator("#shown img").all()]
        return [path for path in paths if path.endswith("_film.webp")]

    def paint():  # what is told then; never twice the same in a row, here
        before = told()
        page.get_by_role("button", name="paint", exact=True).click()
        return wait(lambda: told() != before and told())

    def brush(by):  # over the middle of a cell, or so many pixels below
        box = page.locator("#cell_4_1 canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + by
        page.mouse.move(x - 30, y)
        page.mouse.down()
        page.mouse.move(x + 30, y, steps=8)
        page.mouse.up()

    (tmp_path / "text.png").write_text("no picture")
    page.locator("#cell_0_0 input[type=file]").first.set_input_files(tmp_path / "text.png")
    assert wait(told).startswith("error: example 1, column 1: 'text.png' is none of PNG")
    page.wait_for_selector("#cell_0_0 :is(img, canvas)", state="detached")
    page.get_by_role("button", name="+ row").click()
    page.wait_for_selector("#cell_1_0")
    icon = Image.open(file_of("peacock_gray")).convert("RGBA")
    icon.putalpha(icon.convert("L").point(lambda level: 255 * (level < 250)))  # its white is clear
    icon.save(tmp_path / "icon.png")
    drop("cell_0_0", tmp_path / "icon.png")
    names = "peacock_fluent_3d", "rocket_gray", "rocket_fluent_3d", "hut_gray", "hut_fluent_3d"
    cells = "cell_0_1", "cell_1_0", "cell_1_1", "cell_4_0", "cell_4_1"
    for cell, name in zip(cells, names, strict=True):
        drop(cell, file_of(name))
    for cell in ("cell_4_0", "cell_4_1"):
        wait(lambda: is_drawn(page, cell))  # noqa: B023
    brush(0)
    wait(lambda: is_marked(page, "cell_4_1"))
    for label, value in {"num_inference_steps": 2, "seed": -1}.items():
        page.get_by_label(label).fill(str(value))
    assert paint() == "error: seed: must be an integer in 0 ... 4294967295, not -1"
    assert not list(out.iterdir())
    page.get_by_label("seed").fill("5")
    assert paint().startswith("done")
    assert np.array_equal(shown(page), Image.open(out / "page0.png"))
    (film,) = wait(films)
    assert page.request.get(film).body() == (out / "page0_film.webp").read_bytes()
    record = json.loads((out / "page0.json").read_text())["spec"]
    assert record["seed"] == 5 and len(record["image"]) == 3
    kept = Path(record["image"][0][0])
    assert kept.read_bytes() == (tmp_path / "icon.png").read_bytes()
    mask = np.asarray(Image.open(record["image"][2][1]["mask"])) == 255
    assert 0.01 < mask.mean() < 0.9 and not mask[-8:].any()

    page.reload()
    page.wait_for_selector("#cell_0_0")
    page.locator("#record input[type=file]").set_input_files(out / "page0.json")
    assert wait(told) == "opened page0.json"
    page.wait_for_selector("#cell_1_1 img")
    wait(lambda: is_drawn(page, "cell_4_0") and is_marked(page, "cell_4_1"))
    assert paint().startswith("done")
    first, again = (out / f"page{n}_target0.png" for n in (0, 1))
    assert first.read_bytes() == again.read_bytes()
    brush(120)
    page.get_by_role("button", name="paint", exact=True).click()
    wait((out / "page2.json").exists)
    first, again = (out / f"page{n}_inputs/2_1.png" for n in (0, 2))
    assert np.array_equal(Image.open(first).convert("RGB"), Image.open(again))
    more = np.asarray(Image.open(out / "page2_inputs/2_1_mask.png")) == 255
    assert more[mask].all() and more[-8:].any()
