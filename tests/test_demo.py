"""Laws of the page: it says what sample.py says, and keeps what it paints as sample.py does."""

import importlib.util
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
from vcloze_jax.pipeline import Painting
from vcloze_jax.studio import Studio, save_cell, show_cell

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples/pictures"
SMALL = {"resolution": 32, "num_inference_steps": 2}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER = CHROMIUM and all(map(importlib.util.find_spec, ("gradio", "playwright")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")


def picture(name):
    return Image.open(PICTURES / f"{name}.png")


def brushed(name):
    """What a brush leaves that went over the right half of a picture."""
    strokes = np.zeros((64, 64, 4), np.uint8)
    strokes[:, 32:] = *MARK, 255
    background = picture(name).convert("RGBA")
    return {"background": background, "layers": [Image.fromarray(strokes)], "composite": None}


def test_cells(tmp_path):
    """What is saved of a cell is shown again as it was; nothing dropped is to be painted."""
    nothing = {"background": None, "layers": [], "composite": None}
    clear = nothing | {"background": Image.new("RGBA", (8, 8))}
    assert [save_cell(x, tmp_path / "x") for x in (None, nothing, clear)] == [None] * 3
    assert show_cell(None) is None
    saved = save_cell(picture("rocket_gray"), tmp_path / "given")
    assert np.array_equal(Image.open(saved), picture("rocket_gray"))
    cell = brushed("rocket_gray")
    shown = show_cell(save_cell(cell, tmp_path / "brushed"))
    assert np.array_equal(shown["layers"][0], cell["layers"][0])
    assert np.array_equal(shown["background"], cell["background"].convert("RGB"))


def test_what_is_kept(folder, tmp_path):
    """A grid comes as sheets, step by step, then as a painting; its record opens as the same grid,
    and sample.py paints the same bytes of it."""
    studio = Studio(folder, None, "2", tmp_path)
    rows = [[picture("poodle_fluent_flat"), picture("poodle_fluent_3d")]]
    rows += [[picture("rocket_fluent_flat"), brushed("rocket_fluent_3d")]]
    *sheets, painted = studio.paint(rows, SMALL | {"seed": 3}, [])
    assert sheets and all(isinstance(sheet["page0"], Image.Image) for sheet in sheets)
    assert isinstance(painted["page0"], Painting)
    names = {"page0.json", "page0.png", "page0_target0.png", "page0_film.webp", "page0_inputs"}
    assert {file.name for file in tmp_path.iterdir()} == names
    examples, query, spec = studio.open(tmp_path / "page0.json")
    assert np.array_equal(examples[0][1], rows[0][1]) and spec["seed"] == 3
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
    """A mistake is sample.py's line, and leaves the page ready for the next grid."""
    studio = Studio(folder, None, "2", tmp_path)
    rows = [[cell and picture(cell) for cell in row] for row in rows]
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            list(studio.paint(rows, SMALL | keys, []))
    with pytest.raises(UserError, match="none.safetensors"):
        list(studio.paint([[None]], SMALL, ["none.safetensors"]))


def test_without_gradio(monkeypatch, tmp_path):
    """Without Gradio one line says what to install."""
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'vcloze-jax\[demo\]'"):
        demo.main(["--out", str(tmp_path)])


@pytest.fixture
def page(folder, tmp_path):
    """The page of tiny models in a real browser; its files lie in tmp_path/out."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--weights", folder, "--out", tmp_path / "out", "--port", port]
    command = [sys.executable, "-m", "vcloze_jax.demo", *map(str, argv)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    try:
        wait(lambda: answers(port))
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1500, "height": 1200})
            page.set_default_timeout(180_000)
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_selector("#cell_0_0")
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait(ready, seconds=300):
    """Until `ready()` is true, which it gives."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs gradio, playwright and chromium")
def test_in_a_browser(page, tmp_path):
    """Pictures are dropped into cells, one is brushed over, and the painted cell is seen; the
    record, opened, lays out the same grid, which is painted to the same bytes."""

    def drop(cell, name):
        page.locator(f"#{cell} input[type=file]").first.set_input_files(PICTURES / f"{name}.png")
        page.wait_for_selector(f"#{cell} :is(img, canvas)")

    def told():
        text = page.locator("#told textarea").input_value()
        return text if text.startswith(("done", "error", "opened")) else ""

    def paint():  # what is told then; never twice the same in a row, here
        before = told()
        page.get_by_role("button", name="paint", exact=True).click()
        return wait(lambda: told() != before and told())

    page.get_by_role("button", name="+ row").click()
    page.wait_for_selector("#cell_1_0")
    names = iter(
        f"{x}_{view}" for x in ("peacock", "rocket", "hut") for view in ("gray", "fluent_3d")
    )
    for row in (0, 1, 4):
        for column in (0, 1):
            drop(f"cell_{row}_{column}", next(names))
    time.sleep(3)
    box = page.locator("#cell_4_1 canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=8)
    page.mouse.up()
    for label, value in {"num_inference_steps": 2, "seed": -1}.items():
        page.get_by_label(label).fill(str(value))
    assert paint() == "error: seed: must be an integer in 0 ... 4294967295"
    page.get_by_label("seed").fill("5")
    assert paint().startswith("done")
    record = json.loads((tmp_path / "out/page1.json").read_text())["spec"]
    assert record["seed"] == 5 and len(record["image"]) == 3
    mask = np.asarray(Image.open(record["image"][2][1]["mask"])) == 255
    assert 0.01 < mask.mean() < 0.9
    assert page.locator("#shown img").count() >= 1

    page.reload()
    page.wait_for_selector("#cell_0_0")
    page.locator("#record input[type=file]").set_input_files(tmp_path / "out/page1.json")
    assert wait(told) == "opened page1.json"
    page.wait_for_selector("#cell_1_1 img")
    time.sleep(3)
    assert paint().startswith("done")
    first, again = (tmp_path / f"out/page{n}_target0.png" for n in (1, 2))
    assert first.read_bytes() == again.read_bytes()
