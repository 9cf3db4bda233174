"""The MMDiT: our path | Black Forest Labs' name | diffusers' name.

Sources: black-forest-labs/flux:src/flux/model.py and modules/layers.py;
huggingface/diffusers:src/diffusers/models/transformers/transformer_flux.py and
scripts/convert_flux_to_diffusers.py (which also shows the swapped halves of the last modulation).
Of cond_in and cond_mod, of placements (vcloze_jax/inputs/papers.py), nobody has published any:
these names are ours.
"""

from vcloze_jax.ports.tables import Joining, Part, Swapped, Table, nest_rows, take_column

LATENT = 64  # channels of the noisy latent, which every base reads first

# fmt: off
INPUTS = (
    ("img_in", "img_in", "x_embedder"),
    ("txt_in", "txt_in", "context_embedder"),
    ("cond_in", "cond_in", "condition_embedder"),
)
VECTOR = (
    ("time_in/in_layer",      "time_in.in_layer",      "timestep_embedder.linear_1"),
    ("time_in/out_layer",     "time_in.out_layer",     "timestep_embedder.linear_2"),
    ("vector_in/in_layer",    "vector_in.in_layer",    "text_embedder.linear_1"),
    ("vector_in/out_layer",   "vector_in.out_layer",   "text_embedder.linear_2"),
    ("guidance_in/in_layer",  "guidance_in.in_layer",  "guidance_embedder.linear_1"),
    ("guidance_in/out_layer", "guidance_in.out_layer", "guidance_embedder.linear_2"),
)
DOUBLE = (
    ("img/mod",           "img_mod.lin",                    "norm1.linear"),
    ("img/cond_mod",      "cond_mod.lin",                   "norm1_condition.linear"),
    ("img/qkv",           "img_attn.qkv",                   "attn.to_{q,k,v}"),
    ("img/q_norm/scale",  "img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    ("img/k_norm/scale",  "img_attn.norm.key_norm.scale",   "attn.norm_k.weight"),
    (Joining("img/proj"), "img_attn.proj",                  "attn.to_out.0"),
    ("img/mlp_in",        "img_mlp.0",                      "ff.net.0.proj"),
    ("img/mlp_out",       "img_mlp.2",                      "ff.net.2"),
    ("txt/mod",           "txt_mod.lin",                    "norm1_context.linear"),
    ("txt/qkv",           "txt_attn.qkv",                   "attn.add_{q,k,v}_proj"),
    ("txt/q_norm/scale",  "txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    ("txt/k_norm/scale",  "txt_attn.norm.key_norm.scale",   "attn.norm_added_k.weight"),
    (Joining("txt/proj"), "txt_attn.proj",                  "attn.to_add_out"),
    ("txt/mlp_in",        "txt_mlp.0",                      "ff_context.net.0.proj"),
    ("txt/mlp_out",       "txt_mlp.2",                      "ff_context.net.2"),
)
SINGLE = (
    ("mod",              "modulation.lin",        "norm.linear"),
    ("cond_mod",         "cond_modulation.lin",   "norm_condition.linear"),
    ("linear1",          "linear1",               "{attn.to_q,attn.to_k,attn.to_v,proj_mlp*4}"),
    (Joining("linear2"), "linear2",               "proj_out"),
    ("q_norm/scale",     "norm.query_norm.scale", "attn.norm_q.weight"),
    ("k_norm/scale",     "norm.key_norm.scale",   "attn.norm_k.weight"),
)
FINAL = (
    ("final/mod",    "final_layer.adaLN_modulation.1", Swapped("norm_out.linear")),
    ("final/linear", "final_layer.linear",             "proj_out"),
)
ROWS = (
    *INPUTS,
    *nest_rows(("",        "",                   "time_text_embed."),               VECTOR),
    *nest_rows(("double/", "double_blocks.{i}.", "transformer_blocks.{i}."),        DOUBLE),
    *nest_rows(("single/", "single_blocks.{i}.", "single_transformer_blocks.{i}."), SINGLE),
    *FINAL,
)
# fmt: on
BFL = Table(take_column(ROWS, 1), sign=r"double_blocks\.\d+\.img_attn\.qkv\.weight")
DIFFUSERS = Table(take_column(ROWS, 2), sign=r"transformer_blocks\.\d+\.attn\.to_q\.weight")

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
    harmless="_.*",
    prefixes=("model.diffusion_model.", "diffusion_model.", "transformer.", "model."),
)
