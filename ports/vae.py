"""The autoencoder: our path, Black Forest Labs' name, diffusers' name.

Sources: black-forest-labs/flux:src/flux/modules/autoencoder.py (whose decoder counts its levels
from the last, and whose attention is made of 1 x 1 convolutions);
huggingface/diffusers:src/diffusers/models/autoencoders/{autoencoder_kl,vae}.py.
"""

from ports.rows import Part, Pointwise, Table

DOWN = "encoder.down_blocks.{i}"
UP = "decoder.up_blocks.{i}"
ATTENTION = "{side}.mid_block.attentions.0"

ROWS = (
    ("{side}/conv_in", "{side}.conv_in", "{side}.conv_in"),
    (
        "encoder/down/{i}/res/{j}/shortcut",
        "encoder.down.{i}.block.{j}.nin_shortcut",
        f"{DOWN}.resnets.{{j}}.conv_shortcut",
    ),
    (
        "encoder/down/{i}/res/{j}/{part}",
        "encoder.down.{i}.block.{j}.{part}",
        f"{DOWN}.resnets.{{j}}.{{part}}",
    ),
    ("encoder/down/{i}/sample", "encoder.down.{i}.downsample.conv", f"{DOWN}.downsamplers.0.conv"),
    (
        "decoder/up/{i}/res/{j}/shortcut",
        "decoder.up.{3-i}.block.{j}.nin_shortcut",
        f"{UP}.resnets.{{j}}.conv_shortcut",
    ),
    (
        "decoder/up/{i}/res/{j}/{part}",
        "decoder.up.{3-i}.block.{j}.{part}",
        f"{UP}.resnets.{{j}}.{{part}}",
    ),
    ("decoder/up/{i}/sample/conv", "decoder.up.{3-i}.upsample.conv", f"{UP}.upsamplers.0.conv"),
    ("{side}/mid/res1/{part}", "{side}.mid.block_1.{part}", "{side}.mid_block.resnets.0.{part}"),
    ("{side}/mid/res2/{part}", "{side}.mid.block_2.{part}", "{side}.mid_block.resnets.1.{part}"),
    ("{side}/mid/attn/norm", "{side}.mid.attn_1.norm", f"{ATTENTION}.group_norm"),
    ("{side}/mid/attn/proj", Pointwise("{side}.mid.attn_1.proj_out"), f"{ATTENTION}.to_out.0"),
    ("{side}/mid/attn/{qkv}", Pointwise("{side}.mid.attn_1.{qkv}"), f"{ATTENTION}.to_{{qkv}}"),
    ("{side}/norm_out", "{side}.norm_out", "{side}.conv_norm_out"),
    ("{side}/conv_out", "{side}.conv_out", "{side}.conv_out"),
)
BFL = Table(
    tuple((ours, bfl) for ours, bfl, _ in ROWS),
    sign=r"(encoder|decoder)\.(down|up)\.\d+\.block\.\d+\.conv1\.weight",
)
DIFFUSERS = Table(
    tuple((ours, theirs) for ours, _, theirs in ROWS),
    sign=r"(encoder|decoder)\.(down|up)_blocks\.\d+\.resnets\.\d+\.conv1\.weight",
)

PART = Part(
    "autoencoder",
    "vae",
    "diffusion_pytorch_model",
    (DIFFUSERS, BFL),
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
