"""What a training step tells, as one line of metrics.jsonl. Knows no JAX.

The loss of a single step is mostly the luck of its times: hence the same losses by time, by number
of examples and by kind of task.
"""

from collections import defaultdict

import numpy as np

BINS = 10  # of time, of one tenth each, from the picture to noise


def summarise(measured, region):
    """What the Trainer measured of a step -> its record, all numbers as JSON holds them."""
    losses, norms = measured["losses"], dict(measured["norms"])
    loss = losses[region].astype(np.float64)
    bins = np.minimum((measured["times"] * BINS).astype(int), BINS - 1)
    examples = [rows - 1 for _, rows in measured["kinds"]]
    return {
        "step": measured["step"],
        "loss": float(loss.mean()),
        "grad_norm": norms.pop("all"),
        "lr": measured["lr"],
        "seconds": round(measured["seconds"], 4),
        "grids_per_second": round(len(loss) / measured["seconds"], 3),
        "skipped": measured["skipped"],
        "loss_by_region": {name: float(each.mean()) for name, each in losses.items()},
        "loss_by_time": mean_by(bins.tolist(), loss),
        "loss_by_examples": mean_by(examples, loss),
        "loss_by_kind": mean_by([kind for kind, _ in measured["kinds"]], loss),
        "grad_norm_by_block": norms,
    }


def mean_by(groups, values):
    """{group: mean of its values}, groups sorted, as text."""
    found = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        found[group].append(value)
    return {str(group): float(np.mean(found[group])) for group in sorted(found)}
