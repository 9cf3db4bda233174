"""Write tests/data/keys_*.txt: every key and shape of FLUX.1-Fill-dev's four models at full size,
as the installed diffusers and transformers build them (no weights are needed or made), of the
transformer and the autoencoder in BFL's naming, as BFL's own code builds them, and of the authors'
adapter, whose module tree is written here.

Run: python scripts/make_key_lists.py [--bfl CHECKOUT] (needs the extra `parity`; CHECKOUT is of
black-forest-labs/flux, and without it BFL's two lists stay as they are). A line is
`key dim dim ...`; lines that begin with # say how the list was made.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch
import transformers
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


def visualcloze():
    """Key, shape of the authors' adapter: A, B and a bias on B of every Linear of BFL's Flux, of
    rank 256 (lzyhha/VisualCloze:models/model.py, models/modules/{layers,lora}.py)."""
    D = 3072
    modules = {"img_in": (384, D), "txt_in": (4096, D)}
    for name, fan_in in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        modules |= {f"{name}.in_layer": (fan_in, D), f"{name}.out_layer": (D, D)}
    for block in (f"double_blocks.{i}.{side}" for i in range(19) for side in ("img", "txt")):
        modules |= {f"{block}_mod.lin": (D, 6 * D), f"{block}_attn.qkv": (D, 3 * D)}
        modules |= {f"{block}_attn.proj": (D, D), f"{block}_mlp.0": (D, 4 * D)}
        modules |= {f"{block}_mlp.2": (4 * D, D)}
    for block in (f"single_blocks.{i}" for i in range(38)):
        modules |= {f"{block}.linear1": (D, 7 * D), f"{block}.linear2": (5 * D, D)}
        modules |= {f"{block}.modulation.lin": (D, 3 * D)}
    modules |= {"final_layer.adaLN_modulation.1": (D, 2 * D), "final_layer.linear": (D, 64)}
    for name, (fan_in, fan_out) in modules.items():
        rank = min(256, fan_in, fan_out)
        yield f"{name}.lora_A.weight", (rank, fan_in)
        yield f"{name}.lora_B.weight", (fan_out, rank)
        yield f"{name}.lora_B.bias", (fan_out,)


def bfl(checkout):
    """Name of the list -> BFL's own model on the meta device (its src/flux/util.py has the sizes,
    under flux-dev-fill)."""
    sys.path.insert(0, str(checkout / "src"))
    from flux.model import Flux, FluxParams
    from flux.modules.autoencoder import AutoEncoder, AutoEncoderParams

    yield (
        "flux_bfl",
        Flux(
            FluxParams(
                in_channels=384,
                out_channels=64,
                vec_in_dim=768,
                context_in_dim=4096,
                hidden_size=3072,
                mlp_ratio=4.0,
                num_heads=24,
                depth=19,
                depth_single_blocks=38,
                axes_dim=[16, 56, 56],
                theta=10_000,
                qkv_bias=True,
                guidance_embed=True,
            )
        ),
    )
    yield (
        "vae_bfl",
        AutoEncoder(
            AutoEncoderParams(
                resolution=256,
                in_channels=3,
                ch=128,
                out_ch=3,
                ch_mult=[1, 2, 4, 4],
                num_res_blocks=2,
                z_channels=16,
                scale_factor=0.3611,
                shift_factor=0.1159,
            )
        ),
    )


def write(name, how, shapes):
    lines = [" ".join([key, *map(str, shape)]) for key, shape in shapes]
    (DATA / f"keys_{name}.txt").write_text("\n".join([f"# {how}", *lines]) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bfl", type=Path, metavar="CHECKOUT")
    checkout = parser.parse_args().bfl
    write("visualcloze", "from the modules that scripts/make_key_lists.py lists", visualcloze())
    libraries = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    with torch.device("meta"):
        built = [(*pair, libraries) for pair in models()]
        if checkout:
            built += [(*pair, "black-forest-labs/flux at 802fb47") for pair in bfl(checkout)]
    for name, model, source in built:
        shapes = ((key, tensor.shape) for key, tensor in model.state_dict().items())
        write(name, f"{type(model).__name__} on the meta device, {source}", shapes)


if __name__ == "__main__":
    main()
