"""The paper's fourth finding: it matters which examples are shown. The best, the median and the
worst of some sets; and a rule that knows no answer: show those whose conditions lie nearest to the
query's in the autoencoder's latent space."""

import numpy as np

from vcloze_jax.inputs.measures import rmse
from vcloze_jax.questions import truth
from vcloze_jax.sharding import on_host
from vcloze_jax.study import draw
from vcloze_jax.study.asker import DIALLED, Asker, Spread, mean_error, parse_tasks, to_levels
from vcloze_jax.study.page import Chapter, Figure, TextTable, list_records, tabulate_records

TASKS = ("gray->fluent_3d", "mask->fluent_3d", "noto->openmoji_line", "fluent_3d->mask")
QUICK_TASKS, SETS, QUICK_SETS = 1, 8, 3
SHOWN = 4  # subjects of a sheet
SAYS = (
    "{sets} sets of {dialled} examples for each subject, drawn at random (seed 0) from the other "
    "held-out subjects, each painted from the same noises. `best`, `median` and `worst` are chosen "
    "for each subject in hindsight, by the mean error over its noises; `best of other noises` is "
    "chosen by all noises but one and measured on that one: what of the choice is the set's and "
    "not the noise's. `nearest` are the {dialled} subjects whose conditions are nearest to the "
    "query's in latent space, the nearest one last; relatives of an emoji are among them. Its gain "
    "is the mean of the random sets less it, with the standard error over subjects. `copied` is "
    "the target of the nearest example itself, left as it is."
)


def compare_choices(lab):
    """Chapter of a Lab: errors by choice of the examples."""
    asker, sets = Asker(lab), QUICK_SETS if lab.quick else SETS
    records, figures = [], []
    for task in parse_tasks(TASKS, QUICK_TASKS if lab.quick else None):
        rng = np.random.default_rng(0)
        drawn = [draw_sets(asker, rng) for _ in range(sets)]
        pictures = np.stack([asker.paint(task, examples) for examples in drawn])
        near = find_nearest(asker, task)
        nearest = asker.paint(task, near)
        asked = asker.truth(task.target)
        errors = rmse(pictures, asked)  # sets noises N
        copied = truth(asker.source, task.target, [each[-1] for each in near])
        record = {"task": f"`{task.name}`"} | rank_sets(errors)
        record |= compare_nearest(errors.mean(0), rmse(nearest, asked))
        record["copied"] = float(rmse(copied, asked).mean())
        records.append(record)
        figures.append(show_choices(asker, task, pictures, nearest))
    blocks = [
        SAYS.format(sets=sets, dialled=DIALLED),
        asker.spreads,
        sum_up_choices(records),
        TextTable(tabulate_records(records)),
        *figures,
    ]
    return Chapter(blocks, {"sets": sets, "choice": list_records(records)})


def draw_sets(asker, rng):
    """Other subjects for each subject, all as likely: `DIALLED` numbers each."""
    count = len(asker.source.names)
    draws = [rng.choice(count - 1, DIALLED, replace=False) for _ in asker.subjects]
    return [list(x + (x >= s)) for x, s in zip(draws, asker.subjects, strict=True)]


def find_nearest(asker, task):
    """For each subject the numbers of the others whose conditions are nearest to its own by RMSE
    of their latents, the nearest last."""
    painter = asker.lab.painter
    everyone = np.arange(len(asker.source.names))
    nodes = [to_levels(truth(asker.source, node, everyone)) for node in task.conditions]
    rows = np.concatenate(nodes, 2)  # N 64 conditions*64 3
    vae, encode = painter.models.vae, painter.encode_picture
    latents = on_host([encode(vae, row[None])[0] for row in rows])
    latents = np.stack(latents).astype(np.float32).reshape(len(rows), -1)
    found = []
    for subject in asker.subjects:
        distance = np.square(latents - latents[subject]).mean(1)
        distance[subject] = np.inf
        found.append(distance.argsort()[:DIALLED][::-1].tolist())
    return found


def rank_sets(errors):
    """Best, median and worst set of each subject, by errors [sets, noises, N]: Spreads."""
    order = errors.mean(1).argsort(0)  # sets N
    ranks = {"best": 0, "median": len(order) // 2, "worst": -1}
    pick = lambda chosen: np.take_along_axis(errors, chosen[None, None], 0)[0]  # noqa: E731
    found = {name: Spread.of(pick(order[rank])) for name, rank in ranks.items()}
    held = []
    for noise in range(errors.shape[1]):
        chosen = np.delete(errors, noise, 1).mean(1).argmin(0)  # N
        held.append(np.take_along_axis(errors[:, noise], chosen[None], 0)[0])
    return (
        {"random": Spread.of(errors.mean(0))}
        | found
        | {"best of other noises": Spread.of(np.stack(held))}
    )


def compare_nearest(random, nearest):
    """The rule against chance: errors [noises, N] of both."""
    gain = (random - nearest).mean(0)  # N
    error = gain.std(ddof=1) / len(gain) ** 0.5
    return {"nearest": Spread.of(nearest), "its gain": f"{gain.mean():+.3f} ± {error:.3f}"}


def sum_up_choices(records):
    """The means over all tasks, in words."""
    names = "random", "best", "median", "worst", "best of other noises", "nearest"
    means = ", ".join(f"{name} {mean_error([r[name] for r in records]):.3f}" for name in names)
    return f"Over all tasks: {means}."


def show_choices(asker, task, pictures, nearest):
    """Some subjects: given, best and worst set, nearest examples, truth."""
    order = rmse(pictures, asker.truth(task.target)).mean(1).argsort(0)  # sets N
    everyone = np.arange(len(asker.subjects))
    columns = {node: asker.truth(node) for node in task.conditions}
    columns |= {name: pictures[order[i], 0, everyone] for name, i in (("best", 0), ("worst", -1))}
    columns |= {"nearest": nearest[0], "truth": asker.truth(task.target)}
    sheet = draw.label_columns({label: to_levels(x[:SHOWN]) for label, x in columns.items()})
    return Figure(sheet, f"`{task.name}`, the first noise.")
