"""What the parts of the study share: questions that are asked of some subjects, each from several
noises; what is found, with its spread.

The noise of the last row is the same however many examples stand above it, so that what moves a
picture is the examples' doing.
"""

import hashlib
import pickle
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from vcloze_jax.data import graph
from vcloze_jax.grid import Grid, Row, Spec
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.painter import initial_noise
from vcloze_jax.questions import STRIDES, choose_examples, pose_question, truth

SUBJECTS, QUICK_SUBJECTS, NOISES, QUICK_NOISES = 12, 4, 3, 2
DIALLED = 2  # examples, where their number is not what is asked
SPREADS = (
    "Numbers are means (deviation over subjects; mean deviation over noise) for {subjects} "
    "subjects from {noises} noises each (seeds 0 to {last})."
)
PAINTED = WeakKeyDictionary()  # {painter: {digest of a Spec: its painted cells}}


class Spread(NamedTuple):
    """A number, and its deviations over subjects and over noise."""

    mean: float
    subjects: float
    noise: float

    @classmethod
    def of(cls, values):
        """Of values [noises, subjects]."""
        deviation = partial(np.std, ddof=1)
        over_noise = deviation(values, axis=0).mean()
        return cls(float(values.mean()), float(deviation(values.mean(0))), float(over_noise))

    def __str__(self):
        return f"{self.mean:.3f} ({self.subjects:.3f}; {self.noise:.3f})"


class Asker:
    """Asks a Lab's model about subjects of a source, the Lab's own if none is named."""

    def __init__(self, lab, source=None):
        count, noises = (QUICK_SUBJECTS, QUICK_NOISES) if lab.quick else (SUBJECTS, NOISES)
        self.lab, self.source, self.noises = lab, source or lab.source, noises
        self.subjects = np.linspace(0, len(self.source.names) - 1, count).astype(int)

    @property
    def names(self):
        """What the subjects are called."""
        return [str(self.source.names[s]) for s in self.subjects]

    @property
    def spreads(self):
        """What the numbers of a table are, in words."""
        count = len(self.subjects)
        return SPREADS.format(subjects=count, noises=self.noises, last=count * self.noises - 1)

    def truth(self, node):
        """A node of the subjects, float32 [N, 64, 64, 3]."""
        return truth(self.source, node, self.subjects)

    def examples(self, count, first=0):
        """What is shown to each subject: `count` subjects, the first ones left out."""
        choose = getattr(self.source, "choose_examples", partial(choose_examples, self.source))
        return [choose(subject, count)[first:] for subject in self.subjects]

    def paint(self, task, examples, sentence=False):
        """The last cell of a question, from each noise for each subject: float32 [noises, N, 64,
        64, 3]; `examples` are numbers of subjects, a list for each."""
        return self.paint_blank(task, examples, (task.columns - 1,), sentence=sentence)[..., 0]

    def paint_blank(self, task, examples, blank, given=None, sentence=False):
        """The cells of the columns `blank`, in their order, as painted: float32 [noises, N, 64, 64,
        3, len(blank)].

        `given` {column: float32 [noises, N, 64, 64, 3]} are pictures that stand in the query in
        place of the truth, as those that were painted before.
        """
        specs, given = [], given or {}
        for seed in range(self.noises * len(self.subjects)):
            noise, number = divmod(seed, len(self.subjects))
            asked = task, task, examples[number], self.subjects[number], sentence
            grid, prompt = pose_question(self.source, *asked)
            cells = {column: to_levels(x[noise, number]) for column, x in given.items()}
            specs.append(specify(self.lab, change_query(grid, blank, cells), prompt, seed))
        cells = np.stack(paint_once(self.lab, specs))
        shape = self.noises, len(self.subjects), *cells.shape[1:]
        return cells.reshape(shape).astype(np.float32) / 255

    def error(self, pictures, node):
        """Spread of the RMSE of pictures [noises, N, 64, 64, 3] to a node of the subjects."""
        return Spread.of(rmse(pictures, self.truth(node)))

    def nearest_given(self, task):
        """Of a task's conditions the one that is nearest to its target, left as it is: float32 [N,
        64, 64, 3]."""
        asked, given = self.truth(task.target), [self.truth(node) for node in task.conditions]
        return min(given, key=lambda pictures: rmse(pictures, asked).mean())


def paint_once(lab, specs):
    """The painted cells of some Specs, uint8 [h, w, 3, cells] each. Parts ask some of what
    others asked before: of the same painter that is not painted again."""
    known = PAINTED.setdefault(lab.painter, {})
    keys = [hashlib.sha256(pickle.dumps(spec)).digest() for spec in specs]
    new = {key: spec for key, spec in zip(keys, specs, strict=True) if key not in known}
    canvases = lab.painter([*new.values()], lab.bar) if new else []
    for (key, spec), canvas in zip(new.items(), canvases, strict=True):
        known[key] = np.stack(spec.grid.cut(canvas.pixels), -1)
    return [known[key] for key in keys]


def specify(lab, grid, prompt, seed):
    """The Spec of a grid whose noise is the end of that of the largest grid."""
    how = lab.steps, lab.painter.preset.guidance_scale, seed
    rows = grid.rows[:1] * (len(STRIDES) + 1)
    largest = initial_noise(Spec(Grid(rows, grid.columns), prompt, *how))
    return Spec(grid, prompt, *how, latents=largest[-grid.tokens :])


def change_query(grid, blank, cells):
    """The grid with other columns blank in its query, and other pictures in some of its cells:
    {column: uint8 [h, w, 3]}."""
    now = [cells.get(i, cell) for i, cell in enumerate(grid.split(grid.query.pixels))]
    masks = [np.full(cell.shape[:2], i in blank) for i, cell in enumerate(now)]
    return Grid((*grid.rows[:-1], Row(np.hstack(now), np.hstack(masks))), grid.columns)


def to_levels(pictures):
    """Float pictures in [0, 1] -> uint8."""
    return np.rint(pictures * 255).astype(np.uint8)


def parse_tasks(names, most=None):
    """The first of some tasks, by their names."""
    return [graph.parse_task(name) for name in names[:most]]


def name_count(count):
    """How many examples, in words."""
    return f"{count} example{'s' * (count != 1)}"


def mean_error(spreads):
    """Mean of the means of some Spreads."""
    return float(np.mean([spread.mean for spread in spreads]))
