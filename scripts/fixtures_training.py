"""Fixture of tests/test_parity_training.py: ten training steps in PyTorch.

diffusers' transformer, LoRA of the authors' form, their convention of time, clip_grad_norm_ and
AdamW of torch; tests/injected.py has what a run draws. Run by scripts/make_fixtures.py (needs torch
and diffusers, extra `parity`).
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from fixtures_models import flux
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import injected  # noqa: E402
import tiny  # noqa: E402

from vcloze_jax.ports.tables import is_stacked, lay_out  # noqa: E402
from vcloze_jax.ports.tables.mmdit import DIFFUSERS  # noqa: E402

REGIONS = ("target", "grid")
GRIDS = 4  # of a step


def main():
    """Write tests/data/training.safetensors: for each region of the loss R what `train` returns,
    as `R/NAME`; `moved` is float16."""
    runs = {region: train(region) for region in REGIONS}
    arrays = {f"{region}/{name}": x for region, run in runs.items() for name, x in run.items()}
    arrays = {k: x.astype(np.float16) if "/moved/" in k else x for k, x in arrays.items()}
    save_file(dict(sorted(arrays.items())), ROOT / "tests/data/training.safetensors")


def train(region):
    """Ten steps of four grids, each grid asked alone -> {name: float32 array}.

    `losses` [10, 4] of each grid; `norms` [10] of the gradients before the clip; `gradient/PATH` of
    the first step, before it; `moved/PATH`, by how many learning rates the last step's adapter is
    not the first's.
    """
    model, start = transformer(), injected.adapter()
    adapter = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    add_branches(model, adapter)
    optimizer = torch.optim.AdamW(
        adapter.values(), injected.LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
    )
    run = {"losses": [], "norms": []}
    for step in range(injected.STEPS):
        groups = injected.groups(step)
        losses = [grid_loss(model, group, i, region) for group in groups for i in (0, 1)]
        for loss in losses:
            (loss / GRIDS).backward()
        if step == 0:
            run |= {f"gradient/{path}": x.grad.numpy().copy() for path, x in adapter.items()}
        run["norms"].append(torch.nn.utils.clip_grad_norm_(adapter.values(), injected.CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        run["losses"].append([loss.item() for loss in losses])
    run |= {name: np.float32(run[name]) for name in ("losses", "norms")}
    ends = {path: x.detach().numpy() for path, x in adapter.items()}
    return run | {f"moved/{path}": (x - start[path]) / injected.LR for path, x in ends.items()}


def transformer():
    """diffusers' transformer with the frozen weights of tests/data/models.safetensors, the last
    layer scaled."""
    model = flux().requires_grad_(False)
    model.load_state_dict({k: torch.tensor(x).float() for k, x in tiny.part("flux/").items()})
    for weight in model.proj_out.parameters():
        weight *= injected.LAST
    return model


def add_branches(model, adapter):
    """Add its branch to every linear layer: y = W x + b + B (A x) + b_B.

    Parameters have our shapes, so that the q, k and v that are one layer of the authors' share one
    A, as they do there. Source: lzyhha/VisualCloze:models/modules/lora.py.
    """
    tuned = set()
    for path in adapter:
        module, _, leaf = path.rpartition("/")
        if leaf != "lora_a":
            continue
        branch = [adapter[f"{module}/{leaf}"] for leaf in ("lora_a", "lora_b", "lora_bias")]
        stack = branch[0].shape[: is_stacked(DIFFUSERS, f"{module}/kernel")]
        rank, fan_out = branch[0].shape[-1], math.prod(branch[2].shape[len(stack) :])
        flat = (*stack, -1, rank), (*stack, rank, -1), (*stack, -1)
        fan_in = branch[0].numel() // math.prod((*stack, rank))
        kernel = lay_out(DIFFUSERS, f"{module}/kernel", (*stack, fan_in, fan_out))
        columns = np.arange(fan_out)
        columns = np.roll(columns, len(columns) // 2) if kernel.swapped else columns
        for piece in kernel.pieces:
            layer = ... if piece.layer is None else piece.layer
            name, outputs = piece.key.removesuffix(".weight"), columns[piece.place[-1]]
            add_branch(model.get_submodule(name), branch, flat, (layer, outputs))
            tuned.add(name)
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert tuned == linear, tuned ^ linear


def add_branch(linear, branch, flat, part):
    """To one layer, that part (layer, outputs) of a branch: A, B and its bias, in these shapes."""
    layer, outputs = part

    def add(_, inputs, y):
        a, b, bias = (x.reshape(shape) for x, shape in zip(branch, flat, strict=True))
        return y + inputs[0] @ a[layer] @ b[layer][:, outputs] + bias[layer][outputs]

    linear.register_forward_hook(add)


def grid_loss(model, group, i, region):
    """Masked flow matching of grid i of a group, in the authors' convention: time runs from noise
    to picture, the model is told 1 - time. Source: lzyhha/VisualCloze:train.py."""
    x, noise, latent, mask, txt, pooled = (
        torch.tensor(group[name][i : i + 1])
        for name in ("x", "noise", "latent", "mask", "txt", "pooled")
    )
    time = 1 - torch.tensor(group["t"][i : i + 1])
    x_t = time * x + (1 - time) * noise
    out = model(
        hidden_states=torch.cat([x_t, latent, mask], -1),
        encoder_hidden_states=txt,
        pooled_projections=pooled,
        timestep=1 - time,
        guidance=torch.ones(1),
        img_ids=torch.tensor(group["ids"]),
        txt_ids=torch.zeros(injected.TEXT, 3),
        return_dict=False,
    )[0]
    weight = mask.mean(-1) if region == "target" else torch.ones(mask.shape[:2])
    error = (out - (noise - x)) ** 2 * weight[..., None]
    return error.sum() / (weight.sum() * error.shape[-1])


if __name__ == "__main__":
    main()
