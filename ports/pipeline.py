"""What a weights folder holds beside its models, and how files that are not one can be told.

Source: huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_fill.py.
"""

# What a safetensors file is, by the first of these patterns that one of its keys matches.
KINDS = (
    (r"lora_unet_.*", "an adapter in kohya's naming"),
    (r"(double|single)_blocks\..*lora_.*", "an adapter in VisualCloze's naming"),
    (r".*\.processor\..*lora.*", "an adapter in XLabs' naming"),
    (r".*\.lora_A\.weight", "peft"),
    (r".*(double|single)_blocks\.\d+\..*", "a transformer in Black Forest Labs' naming"),
    (r"(encoder|decoder)\.(down|up)\.\d+\..*", "an autoencoder in Black Forest Labs' naming"),
    (r".*transformer_blocks\.\d+\..*", "a transformer without its folder"),
)

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
# entry of the scheduler's config -> our field
SHIFT = {
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
}
INDEX = {
    "_class_name": "FluxFillPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
