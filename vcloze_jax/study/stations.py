"""The walk through the house: one question, followed from its cells to the painted one.

Every shape is that of an array that was there, every function is named by asking it.
"""

import inspect

from vcloze_jax.study import asking, painting
from vcloze_jax.study.journey import SEED, TASK, travel
from vcloze_jax.study.page import Chapter, Heading, TextTable

STATIONS = (*asking.STATIONS, *painting.STATIONS)
LEAD = (
    "A question, as sampling answers it. Each station names the functions that do it, with the "
    "first sentence of what they say of themselves, and what goes through: `dtype [shape]`."
)


def follow_grid(lab):
    """Chapter of a Lab: ten stations, a table of functions and shapes at each."""
    journey, blocks, numbers = travel(lab), [LEAD], []
    for number, visit in enumerate(STATIONS, 1):
        station = visit(journey)
        functions = [describe_function(function) for function in station.functions]
        shapes = {name: describe_array(x) for name, x in station.things.items()}
        blocks += [Heading(f"{number}. {station.title}"), station.text, *station.figures]
        blocks.append(TextTable([["file", "function", "says"], *functions]))
        blocks.append(TextTable([["what", "shape"], *([f"`{n}`", s] for n, s in shapes.items())]))
        where = [f"{file}: {name}".replace("`", "") for file, name, _ in functions]
        numbers.append({"station": station.title, "where": where, "shapes": shapes})
    return Chapter(blocks, {"task": TASK.name, "seed": SEED, "stations": numbers})


def describe_function(function):
    """[file, name, first sentence of its docstring] of a function, a property or a class."""
    function = inspect.unwrap(getattr(function, "fget", function))
    file = function.__module__.replace(".", "/") + ".py"
    says = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return [f"`{file}`", f"`{function.__qualname__}`", says]


def describe_array(x):
    """Dtype and shape, as float32 [96, 64], or a number as it is."""
    return f"{x.dtype} {[*x.shape]}" if hasattr(x, "shape") else str(x)
