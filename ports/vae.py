"""The autoencoder: our path, diffusers' name.

Source: huggingface/diffusers:src/diffusers/models/autoencoders/{autoencoder_kl,vae}.py.
"""

from ports.rows import Part, Table

DOWN = "encoder.down_blocks.{i}"
UP = "decoder.up_blocks.{i}"

DIFFUSERS = Table(
    (
        ("{side}/conv_in", "{side}.conv_in"),
        ("encoder/down/{i}/res/{j}/shortcut", f"{DOWN}.resnets.{{j}}.conv_shortcut"),
        ("encoder/down/{i}/res/{j}/{part}", f"{DOWN}.resnets.{{j}}.{{part}}"),
        ("encoder/down/{i}/sample", f"{DOWN}.downsamplers.0.conv"),
        ("decoder/up/{i}/res/{j}/shortcut", f"{UP}.resnets.{{j}}.conv_shortcut"),
        ("decoder/up/{i}/res/{j}/{part}", f"{UP}.resnets.{{j}}.{{part}}"),
        ("decoder/up/{i}/sample/conv", f"{UP}.upsamplers.0.conv"),
        ("{side}/mid/res1/{part}", "{side}.mid_block.resnets.0.{part}"),
        ("{side}/mid/res2/{part}", "{side}.mid_block.resnets.1.{part}"),
        ("{side}/mid/attn/norm", "{side}.mid_block.attentions.0.group_norm"),
        ("{side}/mid/attn/proj", "{side}.mid_block.attentions.0.to_out.0"),
        ("{side}/mid/attn/{qkv}", "{side}.mid_block.attentions.0.to_{qkv}"),
        ("{side}/norm_out", "{side}.conv_norm_out"),
        ("{side}/conv_out", "{side}.conv_out"),
    )
)

PART = Part(
    "vae",
    "diffusion_pytorch_model",
    DIFFUSERS,
    config={
        "block_out_channels": "channels",
        "layers_per_block": "layers",
        "latent_channels": "latent_channels",
        "norm_num_groups": "groups",
        "scaling_factor": "scale",
        "shift_factor": "shift",
    },
    fixed={
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    },
    written=lambda entries: {
        "down_block_types": ["DownEncoderBlock2D"] * len(entries["block_out_channels"]),
        "up_block_types": ["UpDecoderBlock2D"] * len(entries["block_out_channels"]),
    },
)
