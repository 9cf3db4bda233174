"""The typed task graph of Graph200K: nodes and their phrases, lists in groups, one drawn question.

A cell shows a node; of a style there are two, so that 51 nodes have the phrases of 49 types. A task
is one of the authors' lists: its cells, the target last. Rules of sampling: paper, section 3, and
lzyhha/VisualCloze:data/{dataset,data_reader}.py. The graph is data: graph200k_tasks.toml.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vcloze_jax.config import Recipe
from vcloze_jax.data.draws import draw_blank
from vcloze_jax.data.graph import Task

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
STYLES = ("InstantStyle", "ReduxStyle")
STYLE = "-style"  # of the name of the cell that shows a style, before the picture in it


def build_phrases(missing_commas: bool) -> dict[str, tuple[str, ...]]:
    """All phrases by node type. With `missing_commas`, two pairs of them run into each other, as in
    what the authors' released model was trained on: 503 phrases, else 505."""
    phrases = {}
    for nodes in _DATA["nodes"].values():
        for name, node in nodes.items():
            frames, details = _DATA["frames"][node["frame"]], node["details"]
            count = range(node.get("phrases", 10))
            said = [frames[i % len(frames)].format(details[i % len(details)]) for i in count]
            if missing_commas and name in _DATA["missing_commas"]:
                first = _DATA["missing_commas"][name]
                said[first : first + 2] = ["".join(said[first : first + 2])]
            phrases[name] = tuple(said)
    return phrases


MISSING_COMMAS = True  # the switch: False trains on 505 phrases that all stand alone
PHRASES = build_phrases(MISSING_COMMAS)
KINDS = {name: kind for kind, nodes in _DATA["nodes"].items() for name in nodes}
DEGRADED = tuple(_DATA["nodes"]["degradation"])


def node_type(node: str) -> str:
    """What a cell is called by: its own name, or that of all styles."""
    if node.removesuffix(STYLE) in STYLES:
        return "style_source" if node.endswith(STYLE) else "style_target"
    return node


def _read_task(words):
    """'canny InstantStyle' -> the task of its three cells."""
    cells = []
    for name in words.split():
        cells += [name + STYLE, name] if name in STYLES else [name]
    return Task(tuple(cells[:-1]), cells[-1])


def _expand(pattern):
    """One pattern of the data -> its tasks."""
    sets = _DATA["sets"] | {"degradations": DEGRADED}
    names = re.findall(r"{(\w+)}", pattern)
    members = [{names[0]: member} for member in sets[names[0]]] if names else [{}]
    return [_read_task(pattern.format(**member)) for member in members]


GROUPS = {
    name: (group["weight"], tuple(task for p in group["lists"] for task in _expand(p)))
    for name, group in _DATA["groups"].items()
}
GROUP_OF = {task: name for name, (_, tasks) in GROUPS.items() for task in tasks}
NAMED = {name: (task,) for task in GROUP_OF for name in (task.name, task.spelling)}
NAMED |= {name: tasks for name, (_, tasks) in GROUPS.items()}
NAMED |= {
    name: tuple(task for inner in names for task in NAMED[inner])
    for name, names in _DATA["selections"].items()
}


@dataclass(frozen=True, eq=False)
class Selection:
    """The tasks that are drawn, each with its share, and those that are never asked for."""

    shares: dict[Task, float]
    left_out: frozenset[Task] = frozenset()

    @cached_property
    def tables(self):
        """Tasks and their summed shares, by their number of columns and, for None, all."""
        tables = {}
        for columns in (None, *sorted({task.columns for task in self.shares})):
            tasks = [task for task in self.shares if columns in (None, task.columns)]
            sums = np.cumsum([self.shares[task] for task in tasks])
            tables[columns] = tasks, sums / sums[-1]
        return tables

    def draw(self, rng, columns: int | None = None) -> Task:
        """One of the tasks, by its share, of those with so many columns, or of all."""
        tasks, sums = self.tables[columns]
        return tasks[np.searchsorted(sums, rng.random(), side="right")]

    def restrict(self, possible) -> "Selection":
        """Those of the tasks for which `possible(task)` holds, with the shares of `share_out`."""
        return Selection(share_out(filter(possible, self.shares)), self.left_out)

    def asks(self, nodes: tuple[str, ...], column: int) -> bool:
        """Whether that cell may be asked of the others: not if it is a task that is left out."""
        given = {*nodes[:column], *nodes[column + 1 :]}
        forbidden = ({*t.conditions} == given and t.target == nodes[column] for t in self.left_out)
        return not any(forbidden)

    def choose_blank(self, rng, nodes: tuple[str, ...], recipe: Recipe) -> int:
        """Which cell of the query row is blank: as `draw_blank` has it, but the last where that
        would ask for a task that is left out (unless the recipe's `reverse_held_out` has it)."""
        blank = draw_blank(rng, len(nodes), recipe)
        return blank if recipe.reverse_held_out or self.asks(nodes, blank) else len(nodes) - 1


def share_out(tasks) -> dict[Task, float]:
    """Shares of these tasks: of the groups that they are in by weight, in a group all alike."""
    kept = set(tasks)
    groups = [(w, [t for t in members if t in kept]) for w, members in GROUPS.values()]
    total = sum(weight for weight, members in groups if members)
    return {task: w / total / len(members) for w, members in groups for task in members}


def select_tasks(text: str) -> Selection:
    """What `--data graph200k:TEXT` names: "" is all, NAME[,NAME…] these, without:NAME[,NAME…] all
    others. A name is that of a task, of a group, or of a selection in the data.

    Raises ValueError that names the unknown.
    """
    without = text.startswith("without:")
    names = [name for name in text.removeprefix("without:").split(",") if name]
    for name in names:
        if name not in NAMED:
            several = ", ".join([*GROUPS, *_DATA["selections"]])
            how = f"python -m vcloze_jax.data --list names all, and {several}"
            raise ValueError(f"{name}: no task; {how}")
    named = {task for name in names for task in NAMED[name]}
    if not without:
        return Selection(share_out(named or GROUP_OF))
    if not named:
        raise ValueError("without: names nothing; write without:NAME[,NAME…]")
    return Selection(share_out(GROUP_OF.keys() - named), frozenset(named))


def draw_phrases(rng, nodes: tuple[str, ...]) -> list[str]:
    """What each cell of a row is called; once for all rows."""
    said = [PHRASES[node_type(node)] for node in nodes]
    return [phrases[rng.integers(len(phrases))] for phrases in said]


def describe_graph() -> str:
    """Nodes with their phrases, groups and lists with their shares: text for people."""
    number = sum(map(len, PHRASES.values()))
    total = sum(weight for weight, _ in GROUPS.values())
    lines = [f"{len(PHRASES)} nodes, {number} phrases"]
    for name, phrases in PHRASES.items():
        lines.append(f"  {name:20} {KINDS[name]:12} {len(phrases):2}  {phrases[0]}")
    lines += ["", f"{len(GROUPS)} groups, {len(GROUP_OF)} lists"]
    for name, (weight, tasks) in GROUPS.items():
        share = weight / total
        lines.append(f"  {share:.2%}  {name}: {len(tasks)} lists, {share / len(tasks):.3%} each")
        lines += [f"          {task.name}" for task in tasks]
    for name in _DATA["selections"]:
        lines += ["", f"without:{name} leaves out {len(NAMED[name])}"]
        lines += [f"  {task.name}" for task in NAMED[name]]
    return "\n".join(lines)
