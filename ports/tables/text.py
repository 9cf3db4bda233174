"""The text encoders: our path | the name in transformers.

Source: huggingface/transformers:src/transformers/models/{t5/modeling_t5,clip/modeling_clip}.py.
transformers 5 writes CLIP without the prefix that transformers 4 gave it; both read it with.
Their configs hold whatever the text models of transformers have in common, which these do not read:
all that changes what they compute is read or fixed here.
"""

from vcloze_jax.ports.tables import Part, Table

# fmt: off
T5_ROWS = (
    ("embed",         "shared.weight"),
    ("relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("blocks/norm1",  "encoder.block.{i}.layer.0.layer_norm"),
    ("blocks/norm2",  "encoder.block.{i}.layer.1.layer_norm"),
    ("blocks/wi_0",   "encoder.block.{i}.layer.1.DenseReluDense.wi_0"),
    ("blocks/wi_1",   "encoder.block.{i}.layer.1.DenseReluDense.wi_1"),
    ("blocks/wo",     "encoder.block.{i}.layer.1.DenseReluDense.wo"),
    ("blocks/{qkvo}", "encoder.block.{i}.layer.0.SelfAttention.{qkvo}"),
    ("norm",          "encoder.final_layer_norm"),
)
CLIP_ROWS = (
    ("embed",         "embeddings.token_embedding.weight"),
    ("positions",     "embeddings.position_embedding.weight"),
    ("blocks/norm1",  "encoder.layers.{i}.layer_norm1"),
    ("blocks/norm2",  "encoder.layers.{i}.layer_norm2"),
    ("blocks/fc1",    "encoder.layers.{i}.mlp.fc1"),
    ("blocks/fc2",    "encoder.layers.{i}.mlp.fc2"),
    ("blocks/o",      "encoder.layers.{i}.self_attn.out_proj"),
    ("blocks/{qkv}",  "encoder.layers.{i}.self_attn.{qkv}_proj"),
    ("norm",          "final_layer_norm"),
)
# fmt: on
T5_TABLE = Table(
    T5_ROWS,
    sign=r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.q\.weight",
    ignored=(
        r"encoder\.embed_tokens\.weight",  # a second name of shared.weight
        r"decoder\..*|lm_head\.weight",  # the half that writes
    ),
    tied=(("shared.weight", "encoder.embed_tokens.weight"),),
)
CLIP_TABLE = Table(
    CLIP_ROWS,
    sign=r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.q_proj\.weight",
    prefix="text_model.",
    ignored=(
        r"(text_model\.)?embeddings\.position_ids",  # the numbers 0, 1, 2, ...
        r"(text_model\.)?text_projection(\.weight)?",  # from what FLUX reads to pictures
        r"logit_scale",  # of the loss that CLIP was trained by
        r"vision_model\..*|visual_projection\.weight",  # the half that reads pictures
    ),
)

T5 = Part(
    "T5 encoder",
    "text_encoder_2",
    "model",
    (T5_TABLE,),
    config={
        "vocab_size": "vocab",
        "d_model": "width",
        "d_kv": "head_dim",
        "num_heads": "heads",
        "d_ff": "mlp",
        "num_layers": "layers",
        "relative_attention_num_buckets": "buckets",
        "relative_attention_max_distance": "max_distance",
    },
    fixed={
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "quantization_config": None,
    },
    harmless=".*",
    prefixes=("text_encoders.t5xxl.transformer.",),
    written=lambda entries: {"architectures": ["T5EncoderModel"], "tie_word_embeddings": False},
)

CLIP = Part(
    "CLIP text encoder",
    "text_encoder",
    "model",
    (CLIP_TABLE,),
    config={
        "vocab_size": "vocab",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp",
        "num_hidden_layers": "layers",
        "max_position_embeddings": "max_length",
        "eos_token_id": "eos",
    },
    fixed={
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "quantization_config": None,
    },
    harmless=".*",
    nested="text_config",
    prefixes=("text_encoders.clip_l.transformer.",),
    written=lambda entries: {
        "architectures": ["CLIPTextModel"],
        "projection_dim": entries["hidden_size"],
        "bos_token_id": entries["eos_token_id"] - 1,
        "pad_token_id": entries["eos_token_id"],
    },
)
