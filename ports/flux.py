"""The MMDiT: our path, Black Forest Labs' name, diffusers' name.

Sources: black-forest-labs/flux:src/flux/model.py and modules/layers.py;
huggingface/diffusers:src/diffusers/models/transformers/transformer_flux.py and
scripts/convert_flux_to_diffusers.py (which also shows the swapped halves of the last modulation).
"""

from ports.rows import Part, Swapped, Table

TIME = "time_text_embed"
BLOCK = "transformer_blocks.{i}"
SINGLE = "single_transformer_blocks.{i}"
MLP = 4  # the MLP is four times as wide as q, k or v

ROWS = (
    ("img_in", "img_in", "x_embedder"),
    ("txt_in", "txt_in", "context_embedder"),
    ("time_in/in_layer", "time_in.in_layer", f"{TIME}.timestep_embedder.linear_1"),
    ("time_in/out_layer", "time_in.out_layer", f"{TIME}.timestep_embedder.linear_2"),
    ("vector_in/in_layer", "vector_in.in_layer", f"{TIME}.text_embedder.linear_1"),
    ("vector_in/out_layer", "vector_in.out_layer", f"{TIME}.text_embedder.linear_2"),
    ("guidance_in/in_layer", "guidance_in.in_layer", f"{TIME}.guidance_embedder.linear_1"),
    ("guidance_in/out_layer", "guidance_in.out_layer", f"{TIME}.guidance_embedder.linear_2"),
    # double blocks, image side
    ("double/img/mod", "double_blocks.{i}.img_mod.lin", f"{BLOCK}.norm1.linear"),
    (
        "double/img/qkv",
        "double_blocks.{i}.img_attn.qkv",
        (f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k", f"{BLOCK}.attn.to_v"),
    ),
    (
        "double/img/q_norm/scale",
        "double_blocks.{i}.img_attn.norm.query_norm.scale",
        f"{BLOCK}.attn.norm_q.weight",
    ),
    (
        "double/img/k_norm/scale",
        "double_blocks.{i}.img_attn.norm.key_norm.scale",
        f"{BLOCK}.attn.norm_k.weight",
    ),
    ("double/img/proj", "double_blocks.{i}.img_attn.proj", f"{BLOCK}.attn.to_out.0"),
    ("double/img/mlp_in", "double_blocks.{i}.img_mlp.0", f"{BLOCK}.ff.net.0.proj"),
    ("double/img/mlp_out", "double_blocks.{i}.img_mlp.2", f"{BLOCK}.ff.net.2"),
    # double blocks, text side
    ("double/txt/mod", "double_blocks.{i}.txt_mod.lin", f"{BLOCK}.norm1_context.linear"),
    (
        "double/txt/qkv",
        "double_blocks.{i}.txt_attn.qkv",
        (f"{BLOCK}.attn.add_q_proj", f"{BLOCK}.attn.add_k_proj", f"{BLOCK}.attn.add_v_proj"),
    ),
    (
        "double/txt/q_norm/scale",
        "double_blocks.{i}.txt_attn.norm.query_norm.scale",
        f"{BLOCK}.attn.norm_added_q.weight",
    ),
    (
        "double/txt/k_norm/scale",
        "double_blocks.{i}.txt_attn.norm.key_norm.scale",
        f"{BLOCK}.attn.norm_added_k.weight",
    ),
    ("double/txt/proj", "double_blocks.{i}.txt_attn.proj", f"{BLOCK}.attn.to_add_out"),
    ("double/txt/mlp_in", "double_blocks.{i}.txt_mlp.0", f"{BLOCK}.ff_context.net.0.proj"),
    ("double/txt/mlp_out", "double_blocks.{i}.txt_mlp.2", f"{BLOCK}.ff_context.net.2"),
    # single blocks
    ("single/mod", "single_blocks.{i}.modulation.lin", f"{SINGLE}.norm.linear"),
    (
        "single/linear1",
        "single_blocks.{i}.linear1",
        (
            f"{SINGLE}.attn.to_q",
            f"{SINGLE}.attn.to_k",
            f"{SINGLE}.attn.to_v",
            (f"{SINGLE}.proj_mlp", MLP),
        ),
    ),
    ("single/linear2", "single_blocks.{i}.linear2", f"{SINGLE}.proj_out"),
    (
        "single/q_norm/scale",
        "single_blocks.{i}.norm.query_norm.scale",
        f"{SINGLE}.attn.norm_q.weight",
    ),
    (
        "single/k_norm/scale",
        "single_blocks.{i}.norm.key_norm.scale",
        f"{SINGLE}.attn.norm_k.weight",
    ),
    ("final/mod", "final_layer.adaLN_modulation.1", Swapped("norm_out.linear")),
    ("final/linear", "final_layer.linear", "proj_out"),
)

HINTS = (
    ("x_embedder", "64 input channels are those of FLUX.1-dev, 384 those of FLUX.1-Fill"),
    ("img_in", "64 input channels are those of FLUX.1-dev, 384 those of FLUX.1-Fill"),
)
BFL = Table(
    tuple((ours, bfl) for ours, bfl, _ in ROWS),
    sign=r"double_blocks\.\d+\.img_attn\.qkv\.weight",
    hints=HINTS,
)
DIFFUSERS = Table(
    tuple((ours, theirs) for ours, _, theirs in ROWS),
    sign=r"transformer_blocks\.\d+\.attn\.to_q\.weight",
    hints=HINTS,
)

PART = Part(
    "transformer",
    "transformer",
    "diffusion_pytorch_model",
    (DIFFUSERS, BFL),
    config={
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "num_layers": "double_blocks",
        "num_single_layers": "single_blocks",
        "num_attention_heads": "heads",
        "attention_head_dim": "head_dim",
        "joint_attention_dim": "text_width",
        "pooled_projection_dim": "vec_width",
        "axes_dims_rope": "axes_dim",
        "guidance_embeds": "guidance_embed",
    },
    fixed={"_class_name": "FluxTransformer2DModel", "patch_size": 1},
)
