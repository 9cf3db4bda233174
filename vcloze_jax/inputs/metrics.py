"""What a training step tells, as one line of metrics.jsonl and as curves. Knows no JAX.

The loss of a single step is mostly the luck of its times: hence the same losses by time, by number
of examples and by kind of task.
"""

import json
from collections import defaultdict

import numpy as np

from vcloze_jax.inputs.pictures import save_figure

BINS = 10  # of time, of one tenth each, from the picture to noise


def summarise_step(sent, seconds, region, speed):
    """What a step told that the Trainer sent and waited for -> its record, all numbers as JSON
    holds them; `speed` is what else depends on the time that it took."""
    told = {key: np.concatenate([np.asarray(x[key]) for x in sent.told]) for key in sent.told[0]}
    kinds = [bytes(kind).decode(errors="ignore").strip() for kind in told.pop("kind")]
    bins = (told.pop("time") * BINS).astype(int)
    norms = {group: float(norm) for group, norm in sent.norms.items()}
    loss = told[region].astype(np.float64)
    return {
        "step": sent.step,
        "loss": float(loss.mean()),
        "grad_norm": norms.pop("all"),
        "lr": sent.lr,
        "seconds": round(seconds, 4),
        "grids_per_second": round(len(loss) / seconds, 3),
        **speed,
        "skipped": int(sent.skipped),
        "loss_by_region": {name: float(each.mean()) for name, each in told.items()},
        "loss_by_time": mean_by(np.minimum(bins, BINS - 1).tolist(), loss),
        "loss_by_examples": mean_by([rows - 1 for rows, _ in sent.shapes], loss),
        "loss_by_kind": mean_by(kinds, loss),
        "grad_norm_by_block": norms,
    }


def mean_by(groups, values):
    """{group: mean of its values}, groups sorted, as text."""
    found = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        found[group].append(value)
    return {str(group): float(np.mean(found[group])) for group in sorted(found)}


def flatten_record(record):
    """A record's numbers as {"loss_by_time/3": value}."""
    flat = {}
    for name, value in record.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}/{key}".rstrip("/"): float(x) for key, x in nested.items()}
    return flat


def draw_curves(metrics, validation, picture, shown="held-out grids"):
    """Two logs -> a picture of the loss, as it was and smoothed, and of that on grids `shown`."""
    from matplotlib.figure import Figure  # slow to import

    steps, losses = read_column(metrics, "loss")
    window = max(1, len(losses) // 20)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#bbbbbb", linewidth=0.7, label="loss of a step")
    if losses:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color="#e25822", label=f"mean of {window}")
    axes.plot(*read_column(validation, "loss"), "o-", color="#2255aa", label=shown)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    save_figure(picture, figure)


def read_column(log, name):
    """Steps and the values of one number in a log, but for those that were skipped."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = [r for r in records if r[name] is not None]
    return [r["step"] for r in records], [r[name] for r in records]
