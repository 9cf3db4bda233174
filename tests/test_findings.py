"""Laws of what the study finds, by painters whose findings are known: one that knows the truth, one
that reads no examples, one that copies one of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vcloze_jax import conditioning
from vcloze_jax.config import MINI, UserError
from vcloze_jax.data import graph
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.dial import change_spec
from vcloze_jax.grid import Spec
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.painter import initial_noise
from vcloze_jax.study import (
    ambiguity,
    asker,
    choice,
    dial,
    photographs,
    reverse,
    unions,
    unseen,
)
from vcloze_jax.study.asker import Asker, Spread
from vcloze_jax.study.parts import Lab

ROOT = Path(__file__).parents[1]
TASK = graph.parse_task("edges+mask->fluent_3d")


class Oracle:
    """A painter that knows the truth: what a grid holds below its mask. Its autoencoder changes
    nothing."""

    preset, models = MINI, SimpleNamespace(vae=None)

    def __call__(self, specs, bar):
        self.specs = specs
        found = [SimpleNamespace(pixels=self.paint(spec)) for spec in specs]
        for spec, canvas in zip(specs, found, strict=True):
            canvas.targets = spec.grid.cut(canvas.pixels)
        return found

    def paint(self, spec):
        return spec.grid.query.pixels

    def encode_picture(self, vae, pixels):
        return conditioning.to_model(pixels)

    def decode_row(self, vae, latents, size):
        return latents


class Echo(Oracle):
    """One that knows nothing of examples: a cell is the noise of its row's first tokens."""

    def paint(self, spec):
        last = initial_noise(spec)[-spec.grid.tokens // len(spec.grid.rows) :]
        level = np.uint8(128 + np.clip(40 * last[0, 0], -100, 100))
        return np.full_like(spec.grid.query.pixels, level)


class Copier(Oracle):
    """One that paints the last example again, and black where there is none."""

    def paint(self, spec):
        return spec.grid.rows[len(spec.grid.rows) - 2].pixels * (len(spec.grid.rows) > 1)


@pytest.fixture
def few(monkeypatch):
    """As few subjects and sets as a law needs."""
    monkeypatch.setattr(asker, "QUICK_SUBJECTS", 2)
    monkeypatch.setattr(dial, "QUICK_SEEDS", 3)


def make_lab(painter):
    return Lab(painter, open_tasks("", MINI.recipe).held_out(), 2, quick=True, bar=None)


def spreads(record):
    return {key: x["mean"] for key, x in record.items() if isinstance(x, dict)}


def test_what_reads_no_examples_is_not_moved_by_them(few):
    """The noise of the last row is the same however many examples stand above: a model that does
    not read them has one error, only another noise moves its picture, and no choice matters."""
    lab = make_lab(Echo())
    errors = [row["error"] for row in ambiguity.measure_ambiguity(lab).numbers["ambiguity"]]
    assert len(errors) == 2 * len(ambiguity.COUNTS) and all(e == errors[0] for e in errors)
    (record,) = dial.turn_dial(lab).numbers["dial"]
    moved = spreads(record)
    assert moved.pop("another noise") > 0
    assert moved == dict.fromkeys(moved, 0) and moved
    (record,) = choice.compare_choices(lab).numbers["choice"]
    assert len({*spreads(record).values()}) == 1 and record["its gain"] == "+0.000 ± 0.000"


def test_what_copies_an_example_is_moved_with_it(few):
    """No noise moves what reads none; what is changed moves it if the last example changes; the
    best set is best, and what shows the nearest example is as good as that example."""
    lab = make_lab(Copier())
    rows = ambiguity.measure_ambiguity(lab).numbers["ambiguity"]
    assert {row["moves"]["mean"] for row in rows} == {0}
    (record,) = dial.turn_dial(lab).numbers["dial"]
    moved = {change for change, mean in spreads(record).items() if mean > 0}
    others = {"the last replaced", "one more", "all replaced", "all dropped"}
    assert moved == {"examples swapped"} | others
    (record,) = choice.compare_choices(lab).numbers["choice"]
    found = spreads(record)
    assert found["best"] <= found["median"] <= found["worst"] and found["best"] < found["random"]
    assert found["best of other noises"] == pytest.approx(found["best"])
    assert found["nearest"] == pytest.approx(record["copied"])


def test_the_dial_of_own_grids():
    """Another order and other numbers of examples keep the query and its noise, and the prompt
    counts the rows; a model that reads no examples is moved by other seeds alone, one that copies
    the last by what takes that away."""
    (spec,) = read_specs([ROOT / "examples/3_two_examples.json"], MINI)
    changed = change_spec(spec)
    for what, now in changed.items():
        assert now.grid.query is spec.grid.query
        assert f"{len(now.grid.rows)} rows" in now.prompt
        if not what.startswith("seed"):
            assert np.array_equal(now.latents, initial_noise(spec)[-now.grid.tokens :])
    others = {"in reverse order", "without example 1", "without example 2", "without examples"}
    seeds = {"seed 1", "seed 2", "seed 3"}
    assert changed.keys() == others | seeds
    for painter, expected in ((Echo(), seeds), (Copier(), others - {"without example 1"})):
        lab = make_lab(painter)._replace(grids=[spec])
        (rows,) = dial.turn_dial(lab).numbers.values()
        assert {row[""] for row in rows if row["moved"]} == expected


CHAPTERS = {
    dial.turn_dial: "seeds",
    unseen.measure_unseen: "unseen",
    unions.unite_tasks: "unions",
    choice.compare_choices: "choice",
    reverse.turn_round: "reverse",
}


@pytest.mark.parametrize("measure", CHAPTERS, ids=lambda f: f.__name__)
def test_the_truth_has_no_error(measure, few):
    """In whatever way it is asked: as a task of its own, backwards, with others, in two steps."""
    numbers = measure(make_lab(Oracle())).numbers
    found = [x for record in numbers[CHAPTERS[measure]] for x in spreads(record).values()]
    assert found and set(found) == {0}
    if measure is dial.turn_dial:
        assert numbers["seeds"][0]["seeds that fail"] == "0%"
    if measure is unseen.measure_unseen:
        assert [row["autoencoder"] for row in numbers["square"]] == [0, 0, 0, 0]


def test_a_question_is_painted_once(few):
    """What was asked before is not painted again, whoever asks and among what; another painter,
    and what differs in words, blank cells or noise, knows nothing of it."""
    counts = []

    class Counting(Echo):
        def __call__(self, specs, bar):
            counts.append(len(specs))
            return super().__call__(specs, bar)

    lab = make_lab(Counting())
    who, others = Asker(lab), Asker(lab._replace(painter=Counting()))
    was = who.paint(TASK, who.examples(1))
    assert np.array_equal(who.paint(TASK, who.examples(1)), was) and counts == [4]
    others.paint(TASK, who.examples(1))
    who.paint(TASK, who.examples(1), sentence=True)
    who.paint_blank(TASK, who.examples(1), blank=(0,))
    again = Asker(lab)
    again.noises += 1
    more = again.paint(TASK, who.examples(1))
    assert counts == [4] * 4 + [2] and np.array_equal(more[: who.noises], was)


def test_what_was_painted_is_given(few):
    """The second of two steps is asked beside what the first one painted, from each noise."""
    painter = Echo()
    who = Asker(make_lab(painter))
    first = who.paint(graph.Task(("noise",), "fluent_3d"), who.examples(1))
    who.paint_blank(TASK, who.examples(1), blank=(2,), given={1: first})
    cells = [spec.grid.split(spec.grid.query.pixels)[1] for spec in painter.specs]
    given = np.rint(first.reshape(-1, *first.shape[2:]) * 255)
    assert len({cell.max() for cell in cells}) == len(cells)
    assert np.array_equal(np.stack(cells), given)


def test_only_what_is_asked_is_blank():
    """Blank columns are masked whole and nothing else is; examples, and other cells, stay."""
    source = open_tasks("", MINI.recipe).held_out()
    grid, _ = asker.pose_question(source, TASK, TASK, [3, 5], 7)
    asked = asker.change_query(grid, (0, 2), {1: np.zeros((64, 64, 3), np.uint8)})
    assert asked.targets == [0, 2]
    masks = asked.split(asked.query.mask)
    assert masks[0].all() and masks[2].all() and not masks[1].any()
    assert asked.rows[:2] == grid.rows[:2]
    before, after = (g.split(g.query.pixels) for g in (grid, asked))
    assert np.array_equal(before[0], after[0]) and not after[1].any() and before[1].any()


def test_spreads():
    """Over subjects: of their means; over noise: inside each. Neither tells of the other."""
    subjects, noises = np.array([[0.0, 2.0], [0.0, 2.0]]), np.array([[0.0, 0.0], [2.0, 2.0]])
    assert Spread.of(subjects) == (1.0, pytest.approx(2**0.5), 0.0)
    assert Spread.of(noises) == (1.0, 0.0, pytest.approx(2**0.5))


def test_noise_of_the_last_row_is_kept():
    """The noise of a grid is the end of that of the largest one, its rows from the bottom."""
    who = Asker(make_lab(Echo()))
    specs = []
    for count in ambiguity.COUNTS:
        asked = TASK, TASK, who.examples(count)[0], who.subjects[0]
        specs.append(asker.specify(who.lab, *asker.pose_question(who.source, *asked), seed=3))
    largest = Spec(specs[-1].grid, "", 2, 30.0, 3)
    for spec in specs:
        assert np.array_equal(spec.latents, initial_noise(largest)[-spec.grid.tokens :])


def test_seen_and_unseen():
    """What is called unseen is never drawn in training, also not by blanking other cells of a task,
    from which draws keep those of its own list; of the square's two kinds of tasks one was trained,
    the other was not, and their targets are the same."""
    kinds = {kind: {*map(graph.parse_task, names)} for kind, names in unseen.KINDS.items()}
    seen, not_seen = ([*map(graph.parse_task, names)] for names in (unseen.SEEN, unseen.UNSEEN))
    assert {*seen, *kinds.pop("trained")} <= {*graph.TRAIN}
    assert graph.TRAIN.keys().isdisjoint({*not_seen}.union(*kinds.values()))
    for task in {*not_seen} - {*graph.HELD_OUT_TASKS, *graph.HELD_OUT_COMPOSITIONS}:
        asked = {*task.conditions, task.target}
        assert not any(asked <= {*other.conditions, other.target} for other in graph.TRAIN), task
    assert [t.target for t in seen] == [t.target for t in not_seen]
    nodes = {node for task in (*seen, *not_seen) for node in (*task.conditions, task.target)}
    assert nodes <= {photographs.VIEW, *photographs.DERIVED}


def test_photographs_show_each_other(tmp_path):
    """A photograph is never an example for itself, not even another part of it; a folder of the
    user's does as well, if it holds enough."""
    for i in range(3):
        Image.new("RGB", (90, 70), (80 * i, 0, 9)).save(tmp_path / f"{i}.png")
    for source in (photographs.read_photographs(), photographs.read_photographs(tmp_path)):
        assert len(source.pictures) == len(source.names)
        file = [name.rpartition(",")[0] for name in source.names]
        for subject in range(len(source.names)):
            shown = source.choose_examples(subject, 2)
            assert len({file[s] for s in (*shown, subject)}) == 3
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=f"--photographs {tmp_path}: holds 2 pictures"):
        photographs.read_photographs(tmp_path)
