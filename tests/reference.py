"""What diffusers paints: grids of every kind, tiny models, and its own pipeline of VisualCloze.

All of that pipeline's call runs, but for what it does wrong or cannot do: the grid is ours (it
swaps the sides of several targets, and knows no partial mask), the prompt is joined (it prints the
layout as a tuple), the noise is injected, and its draw from the posterior is the posterior's mean.
"""

import json
import shutil
import zlib
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import MINI
from vcloze_jax.inputs.cells import build_grid
from vcloze_jax.storage import places, weights

PRESET = replace(
    MINI,
    flux=tiny.FLUX,
    vae=tiny.VAE_CONFIG,
    t5=replace(MINI.t5, width=12, head_dim=4, heads=3, mlp=16, layers=1),
    clip=replace(MINI.clip, width=10, heads=2, mlp=16, layers=1),
)

# A cell is the size of a picture, None, or a size and the share of its pixels that is generated.
S, WIDE, TALL = (32, 32), (96, 64), (40, 80)
KINDS = {
    "1x1": ([[None]], 32),
    "1x2, no example": ([[S, None]], 32),
    "2x2": ([[S, S], [S, None]], 32),
    "3x2": ([[S, S], [S, S], [S, None]], 32),
    "5x2": ([[S, S]] * 4 + [[S, None]], 32),
    "2x3": ([[S, S, S], [S, S, None]], 32),
    "2x4": ([[S, S, S, S], [S, S, S, None]], 32),
    "rows of other shapes": ([[WIDE, S], [TALL, WIDE], [S, None]], 32),
    "several targets": ([[WIDE, S, S], [S, None, None]], 32),
    "first column": ([[S, S], [None, S]], 32),
    "partly masked": ([[S, S], [S, (S, 0.6)]], 32),
    "two partly masked": ([[S, S], [(WIDE, 0.3), (S, 0.8)]], 32),
    "resolution 48": ([[TALL, S], [S, None]], 48),
}
STEPS = (4, 8)
GUIDANCE = 30.0


def grid(name):
    """The grid of a kind, of pictures of noise."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))

    def cell(c):
        if c is None:
            return None
        (w, h), share = c if isinstance(c[0], tuple) else (c, None)
        picture = Image.fromarray(rng.randint(0, 256, (h, w, 3)).astype(np.uint8))
        return picture if share is None else (picture, rng.rand(h, w) < share)

    rows, resolution = KINDS[name]
    return build_grid([[cell(c) for c in row] for row in rows], resolution)


def inputs(name, steps):
    """Grid, prompt, steps, guidance and noise float32 [S, 64] of a kind: arguments of `paint`."""
    cells, rng = grid(name), np.random.RandomState(zlib.crc32(name.encode()) ^ 1)
    noise = rng.standard_normal((cells.tokens, 64)).astype(np.float32)
    return cells, f"In each row, a task of the kind {name}.", steps, GUIDANCE, noise


def weights_folder(folder):
    """A weights folder of PRESET's sizes. Each tensor is drawn by its name in diffusers and
    transformers, by a generator that NumPy froze, so that no change of ours changes it."""
    modules = {
        name: tiny.filled_module(module, getattr(PRESET, name))
        for name, (module, _) in weights.MODELS.items()
    }
    weights.save_pipeline(folder, PRESET, modules, "float32")
    for file in folder.glob("*/*.safetensors"):
        save_file({key: draw(key, x.shape) for key, x in load_file(file).items()}, file)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(places.MINI_FOLDER / name, folder / name)
    file, length = folder / "tokenizer_2/tokenizer_config.json", PRESET.t5.max_length
    config = json.loads(file.read_text()) | {"model_max_length": length}  # mini's own is shorter
    file.write_text(json.dumps(config))
    return folder


def draw(key, shape):
    """A tensor of that name: matrices of gain 1, norms around 1."""
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) > 1:
        return (x * np.prod(shape[1:]) ** -0.5).astype(np.float32)
    return (0.2 * x + ("norm" in key and key.endswith("weight"))).astype(np.float32)


def load(folder, lora=None):
    """A weights folder as diffusers' pipeline, all in float32, with an adapter."""
    import torch
    from diffusers import FluxFillPipeline

    fill = FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    fill.set_progress_bar_config(disable=True)
    if lora:
        fill.load_lora_weights(lora)
    return fill


def paint(fill, grid, prompt, steps, guidance, noise):
    """By diffusers alone: the query row uint8 [h, W, 3] and the latents float32 [S, 64]."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.visualcloze import (
        VisualClozeGenerationPipeline,
        pipeline_visualcloze_generation,
    )

    length = fill.tokenizer_2.model_max_length
    text = fill.encode_prompt(prompt, None, max_sequence_length=length)
    pipeline = VisualClozeGenerationPipeline(
        **{k: v for k, v in fill.components.items() if k in fill.config}
    )
    pipeline.set_progress_bar_config(disable=True)
    last = {}
    with ExitStack() as stack, torch.no_grad():
        for owner, name, new in (
            (DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()),
            (pipeline_visualcloze_generation, "randn_tensor", lambda *_, **__: torch.tensor(noise)),
            (pipeline, "check_inputs", lambda *_, **__: None),
            (pipeline, "encode_prompt", lambda **_: text),
            (pipeline.image_processor, "preprocess", lambda *_, **__: prepared(grid)),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        (cells,) = pipeline(
            task_prompt="",
            content_prompt="",
            image=[],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator(),
            max_sequence_length=length,
            output_type="np",
            callback_on_step_end=lambda _, i, t, kept: last.update(kept) or {},
            return_dict=False,
        )
    levels = np.rint(np.concatenate(list(cells), 1) * np.float32(255)).astype(np.uint8)
    return levels, last["latents"][0].numpy()


def prepared(grid):
    """A grid as diffusers' VisualClozeProcessor returns one; every cell of the query is cut."""
    import torch

    init, masks, sizes = [], [], []
    for row in grid.rows:
        pixels = torch.tensor(row.pixels).permute(2, 0, 1)[None] / 127.5 - 1  # 1 3 h W
        mask = torch.tensor(row.mask)[None, None].float()
        blanked = torch.where(mask > 0, -1.0, pixels)
        init.append(list(blanked.chunk(grid.columns, 3)))
        masks.append(list(mask.chunk(grid.columns, 3)))
        sizes.append([(row.size[0], row.size[1] // grid.columns)] * grid.columns)
    return dict(
        init_image=[init],
        mask=[masks],
        image_size=[sizes],
        target_position=[[1] * grid.columns],
        layout_prompt=[""],
        task_prompt=[""],
        content_prompt=[""],
    )
