"""The parts of the study. A new one is a file, and its row in PARTS.

A part is a function of a Lab that gives a Chapter: what it paints is a function of the Lab alone.
"""

from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from vcloze_jax.config import UserError

PARTS = {  # name: its title, and where it is
    "walk": ("One grid, followed through the house", "stations:follow_grid"),
    "ambiguity": ("Examples against ambiguity", "ambiguity:measure_ambiguity"),
    "dial": ("The dial, and how often a seed fails", "dial:turn_dial"),
    "unseen": ("Unseen tasks, unseen pictures", "unseen:measure_unseen"),
    "unions": ("Two tasks in one grid", "unions:unite_tasks"),
    "choice": ("Which examples are shown", "choice:compare_choices"),
    "reverse": ("From the target back to its conditions", "reverse:turn_round"),
    "looks": ("Where it looks", "looks:look_around"),
    "tables": ("The paper's tables", "tables:fill_tables"),
    "ablations": ("What each choice of the recipe is good for", "ablations:ablate"),
    "placements": ("Ways to place cells", "placements:compare_placements"),
}
OPENING = "walk", "looks"  # they open the MMDiT, and tell it no segments
SLOW = "ablations", "placements"  # --quick leaves them out, unless they are named


class Lab(NamedTuple):
    """What every part works with."""

    painter: object  # a Painter
    source: object  # GraphEmojiGrids of subjects that were never trained on
    steps: int  # of Euler
    quick: bool  # few tasks, subjects and noises
    bar: object  # (iterable, label) -> the same, with a progress bar
    out: Path = Path("study")  # the report's folder
    photographs: Path | None = None  # a folder of the user's pictures
    items: object = None  # Graph200KGrids of test items
    grids: tuple = ()  # Specs of the user's
    judges: dict = {}  # folders of study/judges.py


def choose_parts(names, quick):
    """The named parts in the study's order; all if none is named, but if it is to be quick not the
    slow ones. Raises UserError."""
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"{unknown[0]!r} is no part of the study; parts are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names or not names and not (quick and name in SLOW)]


def check_parts(names, placement):
    """Raise UserError for a part that cannot see into a model of this Placement."""
    for name in OPENING if placement.by_segment else ():
        if name in names:
            reason = "it follows noise with its condition beside it; this adapter is of placement"
            raise UserError(f"{name}: {reason} {placement.name}; name other parts")


def run_part(name, lab):
    """(title, Chapter) of one part."""
    title, place = PARTS[name]
    return title, resolve_name(f"vcloze_jax.study.{place}")(lab)
