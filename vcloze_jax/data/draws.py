"""What is drawn of a grid beside its pictures: rows, order, the blank cell, sentences.

The rules are those of the paper's section 3 and of lzyhha/VisualCloze:data/dataset.py, as far as
the data settings of a Recipe, whose defaults they are, do not say otherwise. Every draw is a
function of the generator given.
"""

import re
from collections.abc import Iterator
from itertools import permutations, product

import numpy as np

from vcloze_jax.config import Recipe
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.prompts import CONTENT_PREFIXES, EDITING_PREFIXES

ROWS = {1: 0.3, 2: 0.4, 3: 0.3}  # of a grid, with their share
AS_SAMPLED = dict(layout=0, task=9, content=1)  # templates: those that prompts.py has as defaults
TEMPLATES = 10  # of each
IMAGE = re.compile(r"\[IMAGE(\d+)\]")


def draw_rows(rng: np.random.Generator, most: int = 3) -> int:
    """1, 2 or 3 rows, but at most `most`, whose share the shares of more rows join."""
    return min(int(rng.choice(list(ROWS), p=list(ROWS.values()))), most)


def draw_order(rng: np.random.Generator, columns: int, recipe: Recipe) -> list[int]:
    """The columns in the order in which they stand: the conditions shuffled, the target last."""
    conditions = np.arange(columns - 1)
    return [
        *(conditions if recipe.keep_order else rng.permutation(conditions)).tolist(),
        columns - 1,
    ]


def list_orders(columns: int, recipe: Recipe) -> Iterator[tuple[int, ...]]:
    """All that `draw_order` may draw."""
    conditions = range(columns - 1)
    orders = [conditions] if recipe.keep_order else permutations(conditions)
    return ((*order, columns - 1) for order in orders)


def draw_blank(rng: np.random.Generator, columns: int, recipe: Recipe) -> int:
    """The column whose cell is blank in the query: with p `reverse_masking` any, else the last.

    So the last is it with p 0.5 + 0.5 / columns by default (the authors' code; the paper has it
    that with p 0.5 one of the others is).
    """
    any_cell = rng.random() < recipe.reverse_masking
    return int(rng.integers(columns)) if any_cell else columns - 1


def list_blanks(columns: int, recipe: Recipe) -> range:
    """All that `draw_blank` may draw."""
    return range(0 if recipe.reverse_masking else columns - 1, columns)


def draw_sentences(
    rng: np.random.Generator,
    recipe: Recipe,
    shape: tuple[int, int],
    task: str | list[str],
    content: str,
    layout: str | None = None,
) -> str:
    """The prompt of a grid of `shape` (rows, columns): the layout always, task and content with the
    recipe's p, and with p `caption_dropout` nothing at all.

    `task` is a sentence, or phrases of the columns, of which one is made by a drawn template;
    `content` gets a drawn prefix unless it has one; `layout` is drawn where it is None. "" says
    nothing.
    """
    drawn = {name: int(rng.integers(TEMPLATES)) for name in AS_SAMPLED}
    template = AS_SAMPLED if recipe.fixed_templates else drawn
    layout, task, content = word_sentences(template, shape, task, content, layout)
    if rng.random() >= recipe.task_sentence:
        task = ""
    if rng.random() >= recipe.content_sentence:
        content = ""
    return "" if rng.random() < recipe.caption_dropout else prompts.join(layout, task, content)


def list_sentences(
    recipe: Recipe,
    shape: tuple[int, int],
    task: str | list[str],
    content: str,
    layout: str | None = None,
) -> Iterator[str]:
    """All that `draw_sentences` may draw."""
    drawn = [dict.fromkeys(AS_SAMPLED, number) for number in range(TEMPLATES)]
    templates = [AS_SAMPLED] if recipe.fixed_templates else drawn
    worded = (word_sentences(template, shape, task, content, layout) for template in templates)
    layouts, tasks, contents = map(dict.fromkeys, zip(*worded, strict=True))
    if recipe.task_sentence < 1:
        tasks[""] = None
    if recipe.content_sentence < 1:
        contents[""] = None
    yield from (prompts.join(*parts) for parts in product(layouts, tasks, contents))
    if recipe.caption_dropout:
        yield ""


def word_sentences(
    template: dict[str, int],
    shape: tuple[int, int],
    task: str | list[str],
    content: str,
    layout: str | None,
) -> tuple[str, str, str]:
    """Layout, task and content as `draw_sentences` has them, in the words of some templates."""
    if layout is None:
        layout = prompts.layout_prompt(*shape, template=template["layout"])
    if not isinstance(task, str):
        task = prompts.task_prompt(task, template=template["task"])
    if content and not content.startswith(CONTENT_PREFIXES + EDITING_PREFIXES):
        content = CONTENT_PREFIXES[template["content"]] + content
    return layout, task, content


def renumber(sentence: str, order: list[int]) -> str:
    """A sentence that speaks of [IMAGE1], [IMAGE2] … after its columns were put in this order."""
    names = {str(old + 1): f"[IMAGE{new}]" for new, old in enumerate(order, start=1)}
    return IMAGE.sub(lambda found: names.get(found[1], found[0]), sentence)
