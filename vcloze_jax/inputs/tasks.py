"""The tasks that a spec can name: the authors', which FLUX's adapter knows, and mini's.

A task of mini is a path in its graph of tasks (vcloze_jax/data/graph.py): "gray-to-fluent_flat",
"edges-and-palette-to-fluent_3d".
"""

from typing import NamedTuple

from vcloze_jax.config import PRESETS
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.checks import suggest_name


class NamedTask(NamedTuple):
    """A task sentence and the number of columns that it speaks of."""

    prompt: str
    columns: int


def find_task(name: str) -> NamedTask | None:
    """The task of this name, whichever model knows it; None if none does."""
    if name in prompts.TASKS:
        return say_authors_task(prompts.TASKS[name])
    from vcloze_jax.data.graph import parse_task  # slow to import: it derives pictures

    try:
        return say_task(parse_task(name))
    except ValueError:
        return None


def suggest_task(name: str) -> str:
    """The task that is most like `name`, whichever model knows it, as the tail of a message."""
    return suggest_name(name, [task for preset in PRESETS.values() for task in list_tasks(preset)])


def list_tasks(preset) -> dict[str, NamedTask]:
    """{name: task} of all that the model of a preset was trained on."""
    if preset.name != "mini":
        return {name: say_authors_task(columns) for name, columns in prompts.TASKS.items()}
    from vcloze_jax.data.graph import TRAIN

    return {task.spelling: say_task(task) for task in TRAIN}


def describe_tasks(preset) -> str:
    """Those tasks, a line each."""
    tasks = list_tasks(preset).items()
    return "\n".join(f"{name} ({task.columns} columns): {task.prompt}" for name, task in tasks)


def say_authors_task(columns: str) -> NamedTask:
    """'photo style -> styled' -> the sentence that leads from those kinds of pictures to that."""
    given, painted = (kinds.split() for kinds in columns.split("->"))
    phrases = [(prompts.PHRASES | prompts.RESTORATIONS)[kind] for kind in given + painted]
    return NamedTask(prompts.task_prompt(phrases, targets=len(painted)), len(phrases))


def say_task(task) -> NamedTask:
    """A path of mini's graph of tasks, said with the first phrase of each node."""
    from vcloze_jax.data.graph import NODE_PHRASES

    nodes = *task.conditions, task.target
    sentence = prompts.task_prompt([NODE_PHRASES[node][0] for node in nodes])
    return NamedTask(sentence, task.columns)
