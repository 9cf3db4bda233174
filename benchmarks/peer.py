"""diffusers' transformer, and peft's adapter on it, as benchmarks/cpu.py and gpu.py time them."""

import torch
from case import CHANNELS, GUIDANCE, LATENT, TIME
from diffusers import FluxTransformer2DModel
from peft import LoraConfig


def load(folder, dtype=torch.float32, device="cpu"):
    """The transformer of a weights folder."""
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).to(device).eval()


def draw(case, dtype, device):
    """A transformer of normal weights of deviation 0.02, made on the device."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=LATENT,
            num_layers=case.double,
            num_single_layers=case.single,
            attention_head_dim=case.width // case.heads,
            num_attention_heads=case.heads,
            joint_attention_dim=case.text_width,
            pooled_projection_dim=case.vec_width,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
    return model.eval()


def arguments(case, dtype, device):
    """Of a call of the transformer."""
    img, txt, pooled, ids = (torch.tensor(x, device=device) for x in case.inputs())
    full = lambda value: torch.full((case.batch,), value, device=device)  # noqa: E731
    return dict(
        hidden_states=img.to(dtype),
        encoder_hidden_states=txt.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=full(TIME).to(dtype),
        guidance=full(GUIDANCE),
        img_ids=ids,
        txt_ids=torch.zeros(case.text, 3, device=device),
        return_dict=False,
    )


def add_adapter(model, rank):
    """An adapter on every linear layer, with a bias on B, in float32 -> its parameters."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ranks = {}
    for name in names:  # as ours and the authors' code clip it
        layer = model.get_submodule(name)
        ranks[f"^{name}$"] = min(rank, layer.in_features, layer.out_features)
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=ranks,
            alpha_pattern=ranks,
            lora_bias=True,
            init_lora_weights=False,
            target_modules=names,
        )
    )
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.data = parameter.data.float()
    return learnt


def gradient(model, learnt, inputs):
    """One backward pass of the mean square of the velocity."""
    for parameter in learnt:
        parameter.grad = None
    model(**inputs)[0].float().square().mean().backward()


def multiply(size, dtype, device):
    """A call that multiplies two square matrices."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: a @ b
