"""What a weights folder holds: its models, and the JSON files of its pipeline.

Sources: huggingface/diffusers:src/diffusers/pipelines/flux/pipeline_flux_fill.py and
schedulers/scheduling_flow_match_euler_discrete.py; comfyanonymous/ComfyUI:comfy/
{supported_models,supported_models_base,model_detection}.py for files of several models.
"""

from vcloze_jax.ports.tables import mmdit, text, vae

PARTS = {"flux": mmdit.PART, "vae": vae.PART, "t5": text.T5, "clip": text.CLIP}
# What ComfyUI writes for an encoder beside its keys: the scale of a loss of CLIP's.
UNREAD = "text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale"

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
SCHEDULER_FIXED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
STATIC = "use_dynamic_shifting", "shift"  # where the first is false, the second is the only shift
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
