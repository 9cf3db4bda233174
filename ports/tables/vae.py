"""The autoencoder: our path | Black Forest Labs' name | diffusers' name.

Sources: black-forest-labs/flux:src/flux/modules/autoencoder.py (whose decoder counts its levels
from the last, and whose attention is made of 1 x 1 convolutions);
huggingface/diffusers:src/diffusers/models/autoencoders/{autoencoder_kl,vae}.py.
"""

from vcloze_jax.ports.tables import Part, Pointwise, Table, nest_rows, take_column

# fmt: off
BOTH = (
    ("conv_in",              "conv_in",                        "conv_in"),
    ("mid/res1/{part}",      "mid.block_1.{part}",             "mid_block.resnets.0.{part}"),
    ("mid/res2/{part}",      "mid.block_2.{part}",             "mid_block.resnets.1.{part}"),
    ("mid/attn/norm",        "mid.attn_1.norm",                "mid_block.attentions.0.group_norm"),
    ("mid/attn/proj",        Pointwise("mid.attn_1.proj_out"), "mid_block.attentions.0.to_out.0"),
    ("mid/attn/{qkv}",       Pointwise("mid.attn_1.{qkv}"),    "mid_block.attentions.0.to_{qkv}"),
    ("norm_out",             "norm_out",                       "conv_norm_out"),
    ("conv_out",             "conv_out",                       "conv_out"),
)
DOWN = (
    ("{i}/res/{j}/shortcut", "{i}.block.{j}.nin_shortcut",     "{i}.resnets.{j}.conv_shortcut"),
    ("{i}/res/{j}/{part}",   "{i}.block.{j}.{part}",           "{i}.resnets.{j}.{part}"),
    ("{i}/resize",           "{i}.downsample.conv",            "{i}.downsamplers.0.conv"),
)
UP = (
    ("{i}/res/{j}/shortcut", "{3-i}.block.{j}.nin_shortcut",   "{i}.resnets.{j}.conv_shortcut"),
    ("{i}/res/{j}/{part}",   "{3-i}.block.{j}.{part}",         "{i}.resnets.{j}.{part}"),
    ("{i}/resize/conv",      "{3-i}.upsample.conv",            "{i}.upsamplers.0.conv"),
)
ROWS = (
    *nest_rows(("{side}/",       "{side}.",       "{side}."),              BOTH),
    *nest_rows(("encoder/down/", "encoder.down.", "encoder.down_blocks."), DOWN),
    *nest_rows(("decoder/up/",   "decoder.up.",   "decoder.up_blocks."),   UP),
)
BFL_SIGN = r"(encoder|decoder)\.(down|up)\.\d+\.block\.\d+\.conv1\.weight"
DIFFUSERS_SIGN = r"(encoder|decoder)\.(down|up)_blocks\.\d+\.resnets\.\d+\.conv1\.weight"
# fmt: on
BFL = Table(take_column(ROWS, 1), BFL_SIGN)
DIFFUSERS = Table(take_column(ROWS, 2), DIFFUSERS_SIGN)

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
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
    },
    harmless="_.*|sample_size|force_upcast",
    prefixes=("vae.", "first_stage_model."),
    written=lambda entries: {
        "down_block_types": ["DownEncoderBlock2D"] * len(entries["block_out_channels"]),
        "up_block_types": ["UpDecoderBlock2D"] * len(entries["block_out_channels"]),
    },
)
