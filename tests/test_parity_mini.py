"""The shipped model in diffusers, transformers and peft: they paint the pictures that we paint.

The loop of diffusers' Fill pipeline is written out here, in torch, with the positions of
VisualCloze, because that pipeline draws its condition from the posterior and knows one row only.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from vcloze_jax import cli, weights
from vcloze_jax.config import MINI
from vcloze_jax.paint import Job, Painter
from vcloze_jax.sharding import make_mesh
from vcloze_jax.spec import read_specs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[1] / "examples"
SPECS = ("3_two_examples", "8_partly_masked")


@pytest.fixture(scope="module")
def pipeline():
    """The shipped folder as diffusers' own pipeline, all its parts in float32, with the adapter."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipeline = diffusers.FluxFillPipeline.from_pretrained(cli.MINI, torch_dtype=torch.float32)
    pipeline.load_lora_weights(cli.LORA)
    return pipeline


@pytest.fixture(scope="module")
def painter():
    mesh = make_mesh()
    preset = weights.check(cli.MINI)
    return Painter(*weights.load_models(cli.MINI, preset, [(cli.LORA, 1.0)], mesh), mesh)


@pytest.mark.parametrize("steps", [4, 30])
@pytest.mark.parametrize("name", SPECS)
def test_same_picture(pipeline, painter, name, steps):
    """From the same noise, diffusers' picture is ours to 2 of 255 levels, on average to a quarter:
    float32 sums in another order, N calls deep, and a sinusoid that differs in its last digit."""
    (spec,) = read_specs([EXAMPLES / f"{name}.json"], MINI)
    noise = np.asarray(jax.random.normal(jax.random.key(1), (spec.grid.tokens, 64)))
    (ours,) = painter([Job(spec.grid, spec.prompt, steps, spec.guidance_scale, noise=noise)])
    theirs = paint(pipeline, spec, steps, noise)
    difference = np.abs(theirs.astype(int) - ours.pixels)
    print(f"{name}, {steps} steps: at most {difference.max()}, mean {difference.mean():.4f}")
    assert theirs.std() > 20  # a picture, not a plain colour
    assert difference.max() <= 2 and difference.mean() < 0.25


def paint(pipeline, spec, steps, noise):
    """The query row by diffusers and transformers alone: uint8 [h, W, 3]."""
    import torch
    from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

    c, grid = pipeline.scheduler.config, spec.grid
    shift = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    sigmas = np.linspace(1, 1 / steps, steps)
    pipeline.scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(grid.tokens, *shift))
    with torch.no_grad():
        embeds, pooled, text_ids = pipeline.encode_prompt(
            spec.prompt, None, max_sequence_length=MINI.t5.max_length
        )
        condition = torch.cat([encode(pipeline, row) for row in grid.rows], 1)  # 1 S 320
        x = torch.tensor(noise)[None]  # 1 S 64
        for t in pipeline.scheduler.timesteps:
            velocity = pipeline.transformer(
                hidden_states=torch.cat([x, condition], 2),
                timestep=t[None] / 1000,
                guidance=torch.tensor([spec.guidance_scale]),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=torch.tensor(grid.ids()),
                return_dict=False,
            )[0]
            x = pipeline.scheduler.step(velocity, t, x, return_dict=False)[0]
        return decode(pipeline, x, grid.query)


def encode(pipeline, row):
    """Condition tokens [1, S, 320] of one row: the latent of its blanked picture, and its mask."""
    import torch

    h, w, vae = row.height // 8, row.width // 8, pipeline.vae
    pixels = torch.tensor(row.pixels).permute(2, 0, 1)[None] / 127.5 - 1  # 1 3 H W
    mask = torch.tensor(row.mask)
    blanked = torch.where(mask, -1.0, pixels)
    latent = vae.encode(blanked).latent_dist.mode()  # 1 16 h w
    latent = (latent - vae.config.shift_factor) * vae.config.scaling_factor
    mask = mask.float().view(1, h, 8, w, 8).permute(0, 2, 4, 1, 3).reshape(1, 64, h, w)
    packed = [pipeline._pack_latents(x, 1, x.shape[1], h, w) for x in (latent, mask)]
    return torch.cat(packed, 2)


def decode(pipeline, x, row):
    """The last row of latents [1, S, 64] as uint8 [H, W, 3]."""
    vae, tokens = pipeline.vae, row.height * row.width // 256
    z = pipeline._unpack_latents(x[:, -tokens:], row.height, row.width, 8)
    picture = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample[0]
    levels = ((picture + 1) / 2).clamp(0, 1) * 255
    return levels.round().byte().permute(1, 2, 0).numpy()
