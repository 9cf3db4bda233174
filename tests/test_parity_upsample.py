"""The second pass in diffusers: FluxFillPipeline itself, from the same first-pass picture.

Its only change is that it takes the posterior's mean, and our noise, where it would draw.
"""

from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vcloze_jax.grid import Spec
from vcloze_jax.inputs.upsampling import Upsampling
from vcloze_jax.pipeline import load_painter

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CASES = {  # width, height, strength, steps
    "0.4": (64, 48, 0.4, 10),
    "a third, rounded": (48, 64, 1 / 3, 8),
    "all noise": (48, 48, 1.0, 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.weights_folder(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def pipeline(folder):
    """The tiny folder as diffusers' own pipeline, in float32."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    return diffusers.FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def painter(folder):
    return load_painter(folder, None, "1")


@pytest.mark.parametrize("name", CASES)
def test_same_picture(pipeline, painter, name):
    """Of the same picture, prompt and noise, diffusers' picture is ours to 2 of 255 levels, on
    average to a quarter."""
    width, height, strength, steps = CASES[name]
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((80, 64))
    picture = np.asarray(picture)
    noise = np.asarray(jax.random.normal(jax.random.key(1), (width * height // 256, 64)))
    up = Upsampling(width, height, strength, steps, noise)
    ours = upsample(painter, up, picture)
    theirs = fill(pipeline, up, picture)
    difference = np.abs(theirs.astype(int) - ours)
    print(f"{name}: at most {difference.max()}, mean {difference.mean():.4f}")
    assert theirs.shape == (height, width, 3) and theirs.std() > 20
    assert difference.max() <= 2 and difference.mean() < 0.25


def upsample(painter, up, picture):
    """The picture by the second pass of ours, uint8."""
    targets = lambda: [picture]  # noqa: E731
    spec = Spec(up.grid(targets), "", 1, 30.0, upsampling=up, content_prompt="a red fox")
    (painted,) = painter(up.specs(spec, targets))
    return painted.pixels


def fill(pipeline, up, picture):
    """The picture by FluxFillPipeline, uint8."""
    import torch
    from diffusers.pipelines.flux import pipeline_flux_fill as room

    h, w = up.height // 8, up.width // 8
    noise = pipeline._unpack_latents(torch.tensor(up.latents)[None], up.height, up.width, 8)
    assert noise.shape == (1, 16, h, w)
    mean = lambda out, generator=None: out.latent_dist.mode()  # noqa: E731
    draws = mock.patch.multiple(
        room, retrieve_latents=mean, randn_tensor=lambda *args, **kwargs: noise
    )
    with draws, torch.no_grad():
        images = pipeline(
            prompt="a red fox",
            image=Image.fromarray(picture),
            mask_image=Image.new("L", picture.shape[1::-1], 255),
            width=up.width,
            height=up.height,
            strength=up.strength,
            num_inference_steps=up.num_inference_steps,
            guidance_scale=30.0,
            max_sequence_length=tiny.TINY.t5.max_length,
        ).images
    return np.asarray(images[0])
