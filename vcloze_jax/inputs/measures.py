"""How near painted cells are to the truth: by pixels, and by what they show. Knows no JAX.

Pictures are float32 [N, h, w, 3] in [0, 1]. RMSE alone flatters a blur: hence whether the truth is
the nearest picture among others, of other subjects (content) or of other kinds (kind).
"""

import numpy as np
from scipy.ndimage import maximum_filter
from skimage.metrics import structural_similarity


def rmse(a, b):
    """Root mean square error per picture; a and b [..., h, w, 3] broadcast."""
    return np.sqrt(np.square(a - b).mean((-3, -2, -1)))


def ssim(a, b):
    """Structural similarity per picture."""
    pairs = zip(a, b, strict=True)
    return np.array(
        [structural_similarity(x, y, channel_axis=-1, data_range=1.0) for x, y in pairs]
    )


def hits(pictures, candidates, right):
    """Whether the candidate nearest by RMSE is a right one, bool [N].

    `candidates` [N or 1, M, h, w, 3] are those of each picture, or of all; `right` bool [N or 1, M]
    marks what counts. A tie is a hit: some subjects have one silhouette.
    """
    rows = np.broadcast_to(candidates, (len(pictures), *candidates.shape[1:]))
    distance = np.array([rmse(x, each) for x, each in zip(pictures, rows, strict=True)])  # N M
    return (np.where(right, distance, np.inf).min(1) <= distance.min(1)).astype(bool)


def edge_f1(a, b):
    """F1 of the bright pixels of two edge maps, each of which may be a pixel off; 0 where nothing
    is found, 1 where there is nothing to find and nothing is found.

    Source of the measure: canny F1 of the paper's Table 1, whose thresholds are for 512 pixels.
    """
    scores = []
    for x, y in zip(a.mean(-1) > 0.5, b.mean(-1) > 0.5, strict=True):
        found, near = x & maximum_filter(y, 3), y & maximum_filter(x, 3)
        precision, recall = found.sum() / max(x.sum(), 1), near.sum() / max(y.sum(), 1)
        if not x.any() and not y.any():
            precision = recall = 1.0
        scores.append(2 * precision * recall / max(precision + recall, 1e-9))
    return np.array(scores)
