"""A folder of what is given to commands, right and wrong; and what they answer."""

import json

import numpy as np

from vcloze_jax.inputs.pictures import save_png


def make_folder(folder):
    """Specs: fox.json is good, bad.json is not; an empty weights folder; a file that is none; a
    home."""
    save_png(folder / "a.png", np.zeros((64, 64, 3), np.uint8))
    (folder / "fox.json").write_text(json.dumps({"image": [["a.png", None]]}))
    forge = {"image": [["a.png", None]], "content_prompt": "a fox <lora:fox:0.8>"}
    (folder / "forge.json").write_text(json.dumps(forge))
    (folder / "bad.json").write_text(json.dumps({"image": [["a.png", "missing.png"]]}))
    (folder / "own.jsonl").write_text(json.dumps({"image": [["a.png", "a.png"]]}))
    (folder / f"{'n' * 245}.json").write_text(json.dumps({"image": [["a.png", None]]}))
    (folder / "none").mkdir()
    (folder / "odd").mkdir()
    (folder / "odd/vcloze.json").write_text('{"preset": "maxi"}')
    (folder / "file").write_text("text")
    (folder / "home").mkdir()
    (folder / "home/file").write_text("text")
    return folder


def assert_refused(answer, message):
    """Exit code 2 and exactly one line on stderr, which says `message`."""
    code, out, err = answer
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert message in err
