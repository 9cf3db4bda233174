"""Laws of what is drawn of a sample: its blank cell, the order of its columns, its sentences."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from vcloze_jax.config import MINI
from vcloze_jax.data.draws import draw_blank, draw_order, draw_sentences, renumber
from vcloze_jax.data.owndata import open_own
from vcloze_jax.data.sources import draw_group
from vcloze_jax.inputs.prompts import CONTENT_PREFIXES, LAYOUTS

RECIPE = MINI.recipe
ALL_TEXT = replace(RECIPE, caption_dropout=0.0)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_the_blank_cell(columns):
    """With p 0.5 any cell is blank, else the last (the authors'), or as the recipe says."""
    rng = np.random.default_rng(columns)
    for p in (0.5, 0.9):
        recipe = replace(RECIPE, reverse_masking=p)
        drawn = Counter(draw_blank(rng, columns, recipe) for _ in range(3000))
        expected = [3000 * (p / columns + (1 - p) * (i == columns - 1)) for i in range(columns)]
        assert chisquare([drawn[i] for i in range(columns)], expected).pvalue > 1e-4
    never = replace(RECIPE, reverse_masking=0.0)
    assert {draw_blank(rng, columns, never) for _ in range(50)} == {columns - 1}


def test_the_order_of_the_columns():
    """Conditions stand in any order, each as likely, the target last; or as they are given."""
    rng = np.random.default_rng(4)
    drawn = Counter(tuple(draw_order(rng, 4, RECIPE)) for _ in range(3000))
    assert len(drawn) == 6 and chisquare(list(drawn.values())).pvalue > 1e-4
    assert all(order[-1] == 3 for order in drawn)
    assert draw_order(rng, 4, replace(RECIPE, keep_order=True)) == [0, 1, 2, 3]


def test_sentences():
    """The layout is always told, task and content with p 0.8 each (the authors'), each of ten
    templates equally often; with p `caption_dropout` there is no text at all."""
    rng = np.random.default_rng(5)
    args = (2, 2), ["a thing", "a picture"], "red fox"
    drawn = [draw_sentences(rng, ALL_TEXT, *args) for _ in range(3000)]
    told = Counter(("[IMAGE1] a thing" in x, x.endswith("red fox")) for x in drawn)
    expected = {(a, b): (0.8 if a else 0.2) * (0.8 if b else 0.2) for a in (0, 1) for b in (0, 1)}
    counts, shares = zip(*((told[key], 3000 * p) for key, p in expected.items()), strict=True)
    assert chisquare(counts, shares).pvalue > 1e-4
    layouts = [layout.format(R=2, C=2, N=4) for layout in LAYOUTS]
    assert chisquare([sum(x.startswith(each) for x in drawn) for each in layouts]).pvalue > 1e-4
    prefixes = [sum(prefix + "red fox" in x for x in drawn) for prefix in CONTENT_PREFIXES]
    assert chisquare(prefixes).pvalue > 1e-4
    silent = [draw_sentences(rng, RECIPE, *args) == "" for _ in range(3000)]
    assert chisquare([sum(silent), 3000 - sum(silent)], [300, 2700]).pvalue > 1e-4


def test_sentences_by_flags():
    """Fixed templates are sampling's; what the user words is said as it stands."""
    fixed = replace(ALL_TEXT, fixed_templates=True, task_sentence=1.0, content_sentence=1.0)
    rng = np.random.default_rng(6)
    args = (1, 2), "Do it.", "In the last row, go", "Two pictures."
    assert draw_sentences(rng, fixed, *args) == "Two pictures. Do it. In the last row, go"
    sentence = draw_sentences(rng, fixed, (1, 2), ["a", "b"], "a fox")
    assert sentence.startswith("A grid layout with 1 rows") and "depicts: a fox" in sentence
    assert renumber("[IMAGE1], [IMAGE2] to [IMAGE3] or [IMAGE9]", [1, 0, 2]) == (
        "[IMAGE2], [IMAGE1] to [IMAGE3] or [IMAGE9]"
    )


def test_columns_move_together(tmp_path):
    """Shuffled conditions move in all rows and in the phrases alike."""
    for i in range(8):
        for k, name in enumerate(("c", "s", "t")):
            Image.new("RGB", (64, 64), (i, 100 * k, 0)).save(tmp_path / f"{name}{i}.png")
    lines = [{"cond1": f"c{i}.png", "source": f"s{i}.png", "target": f"t{i}.png"} for i in range(8)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = replace(ALL_TEXT, task_sentence=1.0)
    source = open_own(str(tmp_path / "own.jsonl"), recipe)
    orders = set()
    for number in range(20):
        for example in draw_group(source, 0, number, 2):
            order = [[int(cell[0, 0, 1]) // 100 for cell in example.grid.split(row.pixels)]
                     for row in example.grid.rows]  # fmt: skip
            assert order == [order[0]] * len(order) and order[0][-1] == 2
            named = ["a condition image", "a source image", "a high-quality image"]
            for column, kind in enumerate(order[0], start=1):
                assert f"[IMAGE{column}] {named[kind]}" in example.prompt
            orders.add(tuple(order[0]))
    assert len(orders) == 2


def test_conditions_in_a_list(tmp_path):
    """Several conditions of one key are columns, and an instruction that speaks of one means it
    wherever it was put."""
    for i in range(3):
        Image.new("RGB", (64, 64), (0, 100 * i, 0)).save(tmp_path / f"{i}.png")
    line = {"instruction": "Turn <img><|image_2|></img>.", "input_images": ["0.png", "1.png"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(line | {"output_image": "2.png"}))
    source = open_own(str(tmp_path / "own.jsonl"), replace(ALL_TEXT, content_sentence=1.0))
    places = set()
    for number in range(12):
        (example,) = draw_group(source, 0, number, 1)
        row = example.grid.rows[-1]
        cells = [int(cell[0, 0, 1]) for cell in example.grid.split(row.pixels)]
        assert f"Turn [IMAGE{cells.index(100) + 1}]." in example.prompt
        places.add(cells.index(100))
    assert places == {0, 1}
