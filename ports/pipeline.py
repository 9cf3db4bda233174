"""What a weights folder holds beside its models, and how files that are not one can be told.

Source: huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_fill.py.
"""

from ports import flux, text, vae

PARTS = {"flux": flux.PART, "vae": vae.PART, "t5": text.T5, "clip": text.CLIP}

# What a file is by its first bytes, where it is not safetensors.
MAGIC = (
    (rb"GGUF", "a GGUF file, of quantised weights"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a pickle, which could run anything when it is opened"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"version https://git-lfs", "a pointer of git-lfs, not the file itself: run git lfs pull"),
    (rb"\s*<", "a web page: the download failed"),
)

# What a safetensors file is, by the first of these patterns that begins one of its keys; a key is
# followed by a space and the type of its tensor.
KINDS = (
    (r"lora_(unet|te\d?|transformer)_|.*[._]lora([._]|A\b|B\b)", "an adapter, for --lora"),
    (r".*\.(absmax|quant_map|quant_state\.\S*) ", "quantised by bitsandbytes (nf4, int8)"),
    (r".*\.(qweight|qzeros|wscales|wtscale) ", "quantised to 4 bits"),
    (r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|SCB) |.* (F8_|I8|U8)", "quantised to 8 bits"),
    (r"model\.diffusion_model\.", "a whole checkpoint of ComfyUI"),
    (r"(.*\.)?joint_blocks\.|pos_embed\.proj\.", "of Stable Diffusion 3"),
    (r"(down|up|input|output)_blocks\.\d+\.", "a U-Net, of Stable Diffusion 1, 2 or XL"),
    (r"double_stream_modulation_img\.", "of FLUX.2"),
    (r"distilled_guidance_layer\.", "of Chroma"),
    (r"(transformer\.)?double_blocks\.\d+\.img_attn_q", "of HunyuanVideo"),
    (r"controlnet_", "a ControlNet"),
    (r"(encoder\.)?vision_model\.", "an image encoder"),
    (r"(en|de)coder\.(down|up)\w*\.\d+.*attn|(post_)?quant_conv\.", "an older autoencoder"),
    (flux.BFL.sign, "a transformer in BFL's naming"),
    (flux.DIFFUSERS.sign, "a transformer in diffusers' naming"),
    (vae.BFL.sign, "an autoencoder in BFL's naming"),
    (vae.DIFFUSERS.sign, "an autoencoder in diffusers' naming"),
    (text.T5_TABLE.sign, "a T5 encoder"),
    (text.CLIP_TABLE.sign, "a CLIP text encoder"),
)

BASES = {  # input channels of the transformer -> whose they are
    384: "FLUX.1-Fill",
    128: "FLUX.1-Depth or -Canny",
    64: "FLUX.1-dev",
}

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
