"""The walk through the house: one question, followed from its cells to the painted one.

Every shape is that of an array that was there, every function is named by asking it.
"""

import inspect

from vcloze_jax.study import painting_stops, question_stops
from vcloze_jax.study.journey import SEED, TASK, travel
from vcloze_jax.study.page import Chapter, Heading, Table

STOPS = (*question_stops.STOPS, *painting_stops.STOPS)
LEAD = (
    "A question, as sampling answers it. Each stop names the functions that do it, with the first "
    "sentence of what they say of themselves, and what goes through: `dtype [shape]`."
)


def follow_grid(lab):
    """Chapter of a Lab: ten stops, a table of functions and shapes at each."""
    journey, blocks, numbers = travel(lab), [LEAD], []
    for number, visit in enumerate(STOPS, 1):
        stop = visit(journey)
        functions = [describe_function(function) for function in stop.functions]
        shapes = {name: describe_array(x) for name, x in stop.things.items()}
        blocks += [Heading(f"{number}. {stop.title}"), stop.text, *stop.figures]
        blocks.append(Table([["file", "function", "says"], *functions]))
        blocks.append(Table([["what", "shape"], *([f"`{n}`", s] for n, s in shapes.items())]))
        where = [f"{file}: {name}".replace("`", "") for file, name, _ in functions]
        numbers.append({"stop": stop.title, "where": where, "shapes": shapes})
    return Chapter(blocks, {"task": TASK.name, "seed": SEED, "stops": numbers})


def describe_function(function):
    """[file, name, first sentence of its docstring] of a function, a property or a class."""
    function = inspect.unwrap(getattr(function, "fget", function))
    file = function.__module__.replace(".", "/") + ".py"
    says = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return [f"`{file}`", f"`{function.__qualname__}`", says.replace("`", "")]


def describe_array(x):
    """ "float32 [96, 64]", or a number as it is."""
    return f"{x.dtype} {[*x.shape]}" if hasattr(x, "shape") else str(x)
