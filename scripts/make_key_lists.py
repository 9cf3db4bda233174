"""Write tests/data/keys_*.txt: every key and shape of FLUX.1-Fill-dev's four models at full size,
as the installed diffusers and transformers build them (no weights are needed or made).

Run: python scripts/make_key_lists.py (needs the extra `parity`). A line is `key dim dim ...`.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

DATA = Path(__file__).parents[1] / "tests/data"


def models():
    """Name of the list -> model on the meta device, with the sizes of the published configs."""
    yield (
        "flux",
        FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True),
    )
    yield (
        "vae",
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )
    yield (
        "t5",
        T5EncoderModel(
            T5Config(
                d_model=4096,
                d_kv=64,
                d_ff=10_240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        ),
    )
    yield (
        "clip",
        CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        ),
    )


def main():
    with torch.device("meta"):
        for name, model in models():
            lines = [
                " ".join([key, *map(str, tensor.shape)])
                for key, tensor in model.state_dict().items()
            ]
            (DATA / f"keys_{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
