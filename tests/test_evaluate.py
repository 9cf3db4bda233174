"""Laws of a model card: its table and sheet are those of the last evaluation, all else a hand's."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vcloze_jax import evaluate
from vcloze_jax.config import UserError
from vcloze_jax.data import graph
from vcloze_jax.inputs import card as card_tables
from vcloze_jax.inputs.sheet import LABEL
from vcloze_jax.storage import places

START, END = card_tables.MARKERS
CARD = f"# A model\n\nIt paints foxes, größer.\n\n{START}\n| old |\n{END}\n\nLicence: MIT\n"
SCORES = {"rmse": 0.25, "ssim": 0.5, "content": 0.125, "kind": 0.75}


@pytest.fixture
def card(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(CARD, "utf-8")
    return file


@pytest.fixture
def unpainted(monkeypatch):
    """The evaluation without a model: every score is the same."""

    def measure(painter, source, task, *_):
        wrong = {"demonstrated": "other", "to_asked": 0.5, "to_demonstrated": 0.25}
        settings = {setting.name: SCORES for setting in evaluate.SETTINGS}
        row = {"settings": settings, "wrong": dict.fromkeys(evaluate.WRONG, wrong)}
        row |= dict.fromkeys(evaluate.PAINTERS, SCORES) | {"chance": {"content": 1 / 128}}
        return row, {name: evaluate.truth(source, task.target, [0]) for name in settings}

    monkeypatch.setattr(evaluate, "load_painter", lambda *_: None)
    monkeypatch.setattr(evaluate, "measure", measure)


def test_card_is_written(card, unpainted, capsys):
    """The table and its summary stand between the markers as in table.md; what stands around them
    is left as it is, and a second evaluation takes the place of the first."""
    argv = ["--card", f"{card}", "--out", f"{card.parent}/out", "--subjects", "1"]
    for _ in range(2):
        evaluate.main(argv)
        table = (card.parent / "out/table.md").read_text()
        before, after = CARD.split("| old |")
        assert card.read_text("utf-8") == f"{before}\n{table}\n{after.lstrip()}"
    assert "| mask->edges (held out) | 0.250 (0.50) |" in table
    assert "| mask->edges | 0.250 | 0.50 | 0.12 | 0.75 | – |" in table
    assert "| trained | chance | – | – | 0.01 | – | – |" in table
    assert "- wrong demonstration followed, alike: 100%" in table
    names = sorted(file.name for file in card.parent.iterdir())
    assert names == ["README.md", "evaluation.png", "out"]


def test_sheet_is_of_all_tasks(card, unpainted):
    """The sheet in --out and the one beside the card, which shows it, are one picture: a strip of
    every task, in which each query stands before what is painted and before the truth."""
    evaluate.main(["--card", f"{card}", "--out", f"{card.parent}/out", "--subjects", "1"])
    beside, own = card.parent / evaluate.SHEET, card.parent / "out" / evaluate.SHEET
    assert f"]({evaluate.SHEET})\n" in card.read_text("utf-8")
    assert beside.read_bytes() == own.read_bytes()
    sheet = np.asarray(Image.open(beside))
    tasks = [graph.parse_task(name) for names in evaluate.TASKS.values() for name in names]
    source = evaluate.open_tasks("", evaluate.MINI.recipe).held_out()
    for strip, task in zip(np.split(sheet, len(tasks)), tasks, strict=True):
        x = 0
        for node in (*task.conditions, task.target, task.target):  # `unpainted` paints the truth
            cell = np.rint(evaluate.truth(source, node, [0])[0] * 255)
            x = next(x for x in range(x, sheet.shape[1] - 63) if (cut(strip, x) == cell).all())
            x += 64


def cut(strip, x):
    return strip[LABEL : LABEL + 64, x : x + 64]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"# A model\n", "add the lines <!-- evaluation --> and <!-- end of evaluation -->"),
        (START.encode(), "each once"),
        (f"{END}{START}".encode(), "each once"),
        (f"{START}{END}{START}{END}".encode(), "each once"),
        (b"\xff", "utf-8"),
    ],
)
def test_card_is_refused(card, content, message, monkeypatch):
    """A card that is missing or lacks a marker costs one line, before anything is loaded."""
    monkeypatch.setattr(evaluate, "load_painter", None)
    card.unlink() if content is None else card.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        evaluate.main(["--card", f"{card}"])
    assert f"{refused.value}".startswith(f"--card {card}: ") and "\n" not in f"{refused.value}"


@pytest.mark.parametrize("flag", ["--subjects 0", "--subjects 129", "--num-inference-steps 0"])
def test_numbers_are_refused_before_anything_is_loaded(flag, tmp_path, monkeypatch):
    """A number that cannot be costs one line, not a model and a traceback."""
    monkeypatch.setattr(evaluate, "load_painter", None)
    with pytest.raises(UserError, match=flag.split()[0]):
        evaluate.main([*flag.split(), "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_shipped_card():
    """The card of mini can be written anew, and shows each task in each setting; what the README
    says of them is in it; the pictures that it shows are there."""
    card, readme = places.MINI_FOLDER / "README.md", Path(__file__).parents[1] / "README.md"
    before, after = card_tables.split_card(card)
    table = card.read_text("utf-8")[len(before) : -len(after)]
    first = table.strip().split("\n\n")[0]
    header, _, *rows = first.splitlines()
    names = [setting.name for setting in evaluate.SETTINGS]
    assert header == f"| task | {' | '.join(names)} | copy |"
    tasks = [f"{name} ({group})" for group, names in evaluate.TASKS.items() for name in names]
    assert [row.split(" | ")[0] for row in rows] == [f"| {task}" for task in tasks]
    percent = set(re.findall(r"\d+%", readme.read_text("utf-8")))
    assert percent and percent <= set(re.findall(r"\d+%", table))
    pictures = re.findall(r"!\[[^]]+\]\((.+)\)", card.read_text("utf-8"))
    assert pictures and all((card.parent / name).is_file() for name in pictures)
