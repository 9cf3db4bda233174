"""Laws of prompts.py: templates, prefixes, named tasks."""

import pytest

from vcloze_jax.config import FLUX_FILL
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.tasks import find_task, list_tasks


def test_templates_are_ten_each_and_distinct():
    """Law: ten layouts, ten task sentences, ten prefixes; a layout says rows, columns, count."""
    for templates in (prompts.LAYOUTS, prompts.TASK_SENTENCES, prompts.CONTENT_PREFIXES):
        assert len(templates) == len(set(templates)) == 10
    for i in range(10):
        said = prompts.layout_prompt(2, 3, i)
        assert all(number in said for number in "236") and "{" not in said
        said = prompts.task_prompt(["fog", "sun"], i)
        assert "[IMAGE1] fog" in said and "[IMAGE2] sun" in said and "{" not in said


@pytest.mark.parametrize("prefix", prompts.CONTENT_PREFIXES + prompts.EDITING_PREFIXES)
def test_prefixes_are_added_once_and_stripped(prefix):
    """Law: a content that has a prefix gets no second one; stripping gives the bare content."""
    assert prompts.content_sentence(prefix + "a fox") == prefix + "a fox"
    assert prompts.strip_prefix(prefix + "a fox") == "a fox"
    assert prompts.strip_prefix(prompts.content_sentence("a fox")) == "a fox"
    assert prompts.content_sentence(" ") == ""


def test_named_tasks():
    """Law: every demo of the authors has a name, whose sentence speaks of every column once."""
    tasks = list_tasks(FLUX_FILL)
    assert {"image-to-depth-normal-and-hed", "depth-to-image-and-relighting"} < tasks.keys()
    for name, task in tasks.items():
        assert find_task(name) == task
        numbers = [task.prompt.count(f"[IMAGE{i}] ") for i in range(1, task.columns + 1)]
        assert numbers == [1] * task.columns, name
        assert f"[IMAGE{task.columns + 1}]" not in task.prompt
    assert tasks["image-to-depth-normal-and-hed"].columns == 4
    assert len({task.prompt for task in tasks.values()}) == len(tasks)
