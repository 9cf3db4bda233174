"""Fixture of the tests of ops, flow, mmdit, vae and conditioning: tiny models of diffusers.

Run by scripts/make_fixtures.py (needs torch and diffusers, extra `parity`).
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from diffusers.pipelines.visualcloze import VisualClozeGenerationPipeline
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "tests/data"
HEIGHTS, WIDTHS = (32, 16), (32, 64)  # of the two rows, two cells each: 8 tokens in all
TEXT = 3  # tokens
INPUTS = ("img", "txt", "pooled", "t", "guidance")


@torch.no_grad()
def main():
    """Write tests/data/models.safetensors, all of it made by diffusers.

    `flux/KEY`, `vae/KEY`: random weights under diffusers' names, float16 but exact in bfloat16
    too; `grid/*`: a grid of two rows, what VisualCloze's pipeline makes of it; `row/*`: four rows,
    their moments and decoded pictures; `in/*`, `out/*`: inputs of the transformer and its
    velocity, by case; `*_bf16`: relative error of diffusers in bfloat16 to its own float32;
    `sigmas/S/N`, `rope/*`, `pack/*`: schedules, tables and the order of packed channels.
    """
    vae = randomize(
        AutoencoderKL(
            block_out_channels=(4, 8, 8, 8),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=16,
            scaling_factor=0.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    arrays = grid(vae)
    arrays |= transformer(arrays["grid/ids"]) | autoencoder(vae)
    arrays |= schedules() | rope() | packing(vae)
    arrays = {name: np.array(x, order="C") for name, x in sorted(arrays.items())}
    save_file(arrays, DATA / "models.safetensors")


def randomize(model):
    """Matrices of gain 1.5, biases of deviation 0.2, norms around 1; few bits, for float16."""
    rng = np.random.default_rng(0)
    for name, value in model.named_parameters():
        gain = 1.5 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.2
        noise = torch.tensor(gain * rng.standard_normal(value.shape), dtype=torch.bfloat16)
        centre = 1.0 if "norm" in name and value.ndim == 1 and name.endswith("weight") else 0.0
        value.data = (noise + centre).to(torch.float16).float()
    return model.eval()


def stored(prefix, model):
    return {f"{prefix}/{k}": v.numpy().astype(np.float16) for k, v in model.state_dict().items()}


def grid(vae):
    """A grid as VisualClozeGenerationPipeline conditions on it: its tokens (the condition latent,
    then the mask) and their ids. The pixels stored are before blanking; the pipeline sees black,
    -1, where the mask is. Its draw from the posterior is replaced by the posterior's mean."""
    rng = np.random.default_rng(1)
    arrays, pictures, masks = {}, [], []
    for r, (h, w) in enumerate(zip(HEIGHTS, WIDTHS, strict=True)):
        pixels, mask = rng.integers(0, 256, (h, w, 3), np.uint8), np.zeros((h, w), bool)
        if r == 1:  # the right cell, whole and in part
            mask[:, w // 2 :] = rng.random((h, w // 2)) < 0.7
        x = np.where(mask[..., None], -1.0, pixels / 127.5 - 1).astype(np.float32)
        pictures.append([channels_first(x[None, :, i]) for i in halves(w)])
        masks.append([torch.tensor(mask[None, None, :, i]).float() for i in halves(w)])
        arrays |= {f"grid/pixels{r}": pixels, f"grid/mask{r}": mask}
    pipeline = without_models(VisualClozeGenerationPipeline, vae)
    with mock.patch.object(DiagonalGaussianDistribution, "sample", lambda self, _: self.mode()):
        _, latent, mask, ids = pipeline._prepare_latents(
            pictures, masks, None, 8, "cpu", torch.float32
        )
    arrays["grid/condition"] = torch.cat([latent, mask], -1)[0].numpy()
    return arrays | {"grid/ids": ids.numpy()}


def halves(width):
    return slice(width // 2), slice(width // 2, None)


def without_models(pipeline, vae=None):
    names = ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return pipeline(vae=vae, transformer=None, **dict.fromkeys(names))


def transformer(ids):
    """Velocity of eight samples as FLUX.1-Fill in float32, with diffusers' error in bfloat16; of
    the first two at high guidance, without guidance, and with 64 channels, the last two with the
    weights that remain.

    1000 times a time or guidance of the first case is exact in bfloat16: diffusers rounds there,
    ours does not, and the error should be that of the model. `in/img` is in units of 1/32.
    """
    rng = np.random.default_rng(2)
    img = rng.standard_normal((8, len(ids), 384)) * 32
    arrays = {"in/img": img.round().clip(-127, 127).astype(np.int8)}
    arrays["in/t"] = rng.choice(np.float32([0.125, 0.25, 0.5]), 8)
    arrays["in/guidance"] = rng.choice(np.float32([1, 2, 4]), 8)
    for name, shape in (("txt", (8, TEXT, 12)), ("pooled", (8, 10))):
        noise = torch.tensor(rng.standard_normal(shape), dtype=torch.bfloat16)
        arrays[f"in/{name}"] = noise.to(torch.float16).numpy()
    full = flux()
    arrays |= stored("flux", full)
    out = velocity(full, arrays, ids, slice(8))
    error = relative(velocity(full.bfloat16(), arrays, ids, slice(8)), out)
    high = arrays | {"in/t": np.float32([0.3, 0.9]), "in/guidance": np.float32([30, 50])}
    return arrays | {
        "out/fill": out,
        "out/fill_bf16": error,
        "out/high": velocity(full.float(), high, ids),
        "out/dev": velocity(flux(full, in_channels=64), arrays, ids),
        "out/unguided": velocity(flux(full, guidance_embeds=False), arrays, ids),
    }


def flux(source=None, **changes):
    """The tiny transformer; with a `source`, cut out of its weights."""
    sizes = dict(in_channels=384, guidance_embeds=True) | changes
    model = FluxTransformer2DModel(
        out_channels=64,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        **sizes,
    ).eval()
    if source is None:
        return randomize(model)
    weights = source.state_dict()
    weights = {k: weights[k][..., : v.shape[-1]] for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    return model


def velocity(model, arrays, ids, samples=slice(2)):
    inputs = {k: torch.tensor(arrays[f"in/{k}"][samples]).to(model.dtype) for k in INPUTS}
    return (
        model(
            hidden_states=inputs["img"][..., : model.config.in_channels] / 32,
            encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["pooled"],
            timestep=inputs["t"],
            guidance=inputs["guidance"] if model.config.guidance_embeds else None,
            img_ids=torch.tensor(ids),
            txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )[0]
        .float()
        .numpy()
    )


def autoencoder(vae):
    """Raw mean and deviation of four rows that are not square, and the pictures of those means;
    then the same in bfloat16."""
    pixels = np.random.default_rng(3).integers(0, 256, (4, 16, 32, 3), np.uint8)
    arrays = stored("vae", vae) | {"row/pixels": pixels}
    x = channels_first((pixels / 127.5 - 1).astype(np.float32))
    posterior = vae.encode(x).latent_dist
    exact = dict(mean=posterior.mean, std=posterior.std, picture=vae.decode(posterior.mean)[0])
    vae.bfloat16()
    rounded = vae.encode(x.bfloat16()).latent_dist
    picture = vae.decode(posterior.mean.bfloat16())[0]
    vae.float()
    for name, low in dict(mean=rounded.mean, std=rounded.std, picture=picture).items():
        low, value = (y.permute(0, 2, 3, 1).float().numpy() for y in (low, exact[name]))
        arrays |= {f"row/{name}": value, f"row/{name}_bf16": relative(low, value)}
    return arrays


def schedules():
    """Shifted sigmas of grids of S tokens in N steps, with FLUX.1's scheduler config."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    arrays = {}
    for tokens in (32, 1152, 3456, 6912):
        for steps in (1, 4, 30):
            sigmas = np.linspace(1.0, 1 / steps, steps)
            scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens))
            arrays[f"sigmas/{tokens}/{steps}"] = scheduler.sigmas.numpy()
    return arrays


def rope():
    """FluxPosEmbed at FLUX's size; diffusers repeats each angle for both elements of its pair."""
    ids = [(0, 0, 0), (1, 0, 1), (3, 23, 71), (2, 1, 0), (4, 255, 256), (1, 257, 1023)]
    tables = FluxPosEmbed(theta=10_000, axes_dim=[16, 56, 56])(torch.tensor(ids))
    names = ("rope/cos", "rope/sin")
    arrays = {k: x.numpy()[:, ::2].copy() for k, x in zip(names, tables, strict=True)}
    return arrays | {"rope/ids": np.int16(ids)}


def packing(vae):
    """Where FluxFillPipeline puts each element of a latent [16, 4, 6] and of a mask [32, 48]."""
    latent, mask = torch.arange(16 * 4 * 6), torch.arange(32 * 48)
    fill = without_models(FluxFillPipeline, vae)
    packed_mask, packed = fill.prepare_mask_latents(
        mask.float().view(1, 1, 32, 48),
        (latent / 0.5 + 0.1).view(1, 16, 4, 6),
        *(1, 16, 1, 32, 48, torch.float32, "cpu", None),
    )
    pairs = (("pack/latent", packed), ("pack/mask", packed_mask))
    return {name: x[0].round().numpy().astype(np.int16) for name, x in pairs}


def channels_first(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def relative(x, reference):
    """Relative error in the Euclidean norm, as an array that safetensors can hold."""
    return np.asarray(np.linalg.norm(x - reference) / np.linalg.norm(reference))


if __name__ == "__main__":
    main()
