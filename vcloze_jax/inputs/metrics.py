"""What a training step tells, as one line of metrics.jsonl. Knows no JAX.

The loss of a single step is mostly the luck of its times: hence the same losses by time, by number
of examples and by kind of task.
"""

from collections import defaultdict

import numpy as np

BINS = 10  # of time, of one tenth each, from the picture to noise


def summarise(sent, seconds, region):
    """What a step told that the Trainer sent and waited for -> its record, all numbers as JSON
    holds them."""
    losses = {r: np.concatenate([np.asarray(x[r]) for x in sent.losses]) for r in sent.losses[0]}
    bins = (np.concatenate([np.asarray(t) for t in sent.times]) * BINS).astype(int)
    norms = {group: float(norm) for group, norm in sent.norms.items()}
    loss = losses[region].astype(np.float64)
    return {
        "step": sent.step,
        "loss": float(loss.mean()),
        "grad_norm": norms.pop("all"),
        "lr": sent.lr,
        "seconds": round(seconds, 4),
        "grids_per_second": round(len(loss) / seconds, 3),
        "skipped": int(sent.skipped),
        "loss_by_region": {name: float(each.mean()) for name, each in losses.items()},
        "loss_by_time": mean_by(np.minimum(bins, BINS - 1).tolist(), loss),
        "loss_by_examples": mean_by([rows - 1 for _, rows in sent.kinds], loss),
        "loss_by_kind": mean_by([kind for kind, _ in sent.kinds], loss),
        "grad_norm_by_block": norms,
    }


def mean_by(groups, values):
    """{group: mean of its values}, groups sorted, as text."""
    found = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        found[group].append(value)
    return {str(group): float(np.mean(found[group])) for group in sorted(found)}
