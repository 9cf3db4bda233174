"""All that ten training steps draw, drawn here instead: for our step and for a reference in torch.

tests/test_parity_training.py and scripts/fixtures_training.py read it; neither stores it. The
generator is one that NumPy froze. The transformer is that of tests/tiny.py.
"""

import zlib
from dataclasses import replace

import numpy as np
import tiny
from tiny import fan_in

from vcloze_jax.model.mmdit import Flux
from vcloze_jax.storage import weights

CONFIG = replace(tiny.FLUX, rank=2)
STEPS, LR, CLIP = 10, 1e-4, 2.0
# Of the two groups of a step: (height, width) of every row of its two grids, in tokens.
SHAPES = ((2, 2), (1, 4)), ((2, 4),)
TEXT = 3  # tokens
# The fixture's transformer says too much: with this much of its last layer, and pictures of these
# sizes in turn, some gradients are above CLIP and some below.
LAST, SCALES = 3 / 16, (1.0, 2.0, 0.5)


def groups(step):
    """The two groups of a step, two grids each of one shape; float32, times so that 1 - t is exact.

    x, noise [2, S, 64]; t [2]; latent [2, S, 64] of the condition and its mask [2, S, 256]; txt
    [2, T, 12]; pooled [2, 10]; ids [S, 3] and the rows' shapes.
    """
    return [draw_group(np.random.RandomState([step, g]), SHAPES[g], step) for g in range(2)]


def draw_group(rng, rows, step):
    ids = [(r, y, x) for r, (h, w) in enumerate(rows, 1) for y in range(h) for x in range(w)]
    S, scale = len(ids), SCALES[step % len(SCALES)]

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16).astype(np.float32)

    return {
        "x": scale * normal(2, S, 64),
        "noise": normal(2, S, 64),
        "t": rng.randint(1, 64, 2).astype(np.float32) / 64,
        "latent": normal(2, S, 64),
        "mask": draw_mask(rng, rows),
        "txt": normal(2, TEXT, CONFIG.text_width),
        "pooled": normal(2, CONFIG.vec_width),
        "ids": np.float32(ids),
        "rows": rows,
    }


def draw_mask(rng, rows):
    """Pixels of two grids' tokens: the right half of the query row is masked, of the first grid
    whole, of the second some tokens in part: float32 [2, S, 256]."""
    _, width = rows[-1]
    tokens = [h * w for h, w in rows]
    mask = np.zeros((2, sum(tokens), 256), np.float32)
    query = mask[:, -tokens[-1] :]
    right = np.arange(tokens[-1]) % width >= width // 2
    query[0, right] = 1
    share = rng.choice([0.2, 0.7, 1.0], (right.sum(), 1))
    query[1, right] = rng.random_sample((right.sum(), 256)) < share
    return mask


def adapter():
    """{our path: float32 array} of an adapter that is on its way: B and its bias are not zero."""
    shapes = weights.shapes(weights.abstract(Flux, CONFIG)[1])
    return {path: draw_weight(path, shape) for path, shape in shapes.items()}


def draw_weight(path, shape):
    rng = np.random.RandomState(zlib.crc32(path.encode()))
    if path.endswith("lora_a"):
        return (rng.uniform(-1, 1, shape) * fan_in(path, shape) ** -0.5).astype(np.float32)
    return (0.1 * rng.standard_normal(shape)).astype(np.float32)
