"""Sizes of a weights folder's models: by its JSON files, by its tensors' shapes, or refused."""

import json
from dataclasses import replace

import folders
import numpy as np
import pytest
from folders import FLUX, arrays, key_list, refusal

from vcloze_jax import flow
from vcloze_jax.config import FLUX_FILL, PRESETS
from vcloze_jax.ports import engine
from vcloze_jax.ports.locate import SIZES, recognise_table
from vcloze_jax.ports.tables.folder import PARTS
from vcloze_jax.storage import weights
from vcloze_jax.storage.preset import axes, load_preset


@pytest.mark.parametrize(
    "changes",
    [
        dict(in_channels=64),
        dict(guidance_embed=False, in_channels=64),
        dict(width=64, heads=4, axes_dim=(4, 6, 6)),
        dict(width=40, heads=5, axes_dim=(4, 2, 2), double_blocks=1, single_blocks=1),
        dict(width=48, heads=1, axes_dim=(8, 20, 20), text_width=6, vec_width=4),
    ],
)
def test_sizes_of_the_transformer_from_shapes(changes):
    """Without a config.json every size of the transformer is told by its tensors, in either
    naming; the RoPE axes by the rule of axes."""
    config = replace(FLUX, **changes)
    for table in PARTS["flux"].tables:
        there = engine.export_arrays(table, arrays("flux", config).items())
        source = engine.SafetensorsFile.__new__(engine.SafetensorsFile)
        source.header = {key: (x.shape, "F32") for key, x in there}
        ours = SIZES["flux"](source, table)
        head_dim = ours.pop("head_dim")
        ours |= dict(width=head_dim * ours["heads"], axes_dim=axes(head_dim, FLUX_FILL.flux))
        assert replace(config, **ours) == config and len(ours) == 10


def test_published_sizes_from_shapes():
    """By key lists alone, BFL's and those of the text encoders, FLUX.1-Fill's presets come out."""
    for field, name in (("flux", "flux_bfl"), ("vae", "vae_bfl"), ("t5", "t5"), ("clip", "clip")):
        source = engine.SafetensorsFile.__new__(engine.SafetensorsFile)
        source.header = {key: (shape, "BF16") for key, shape in key_list(name).items()}
        table = recognise_table(PARTS[field], source)
        ours, preset = SIZES[field](source, table), getattr(FLUX_FILL, field)
        assert all(getattr(preset, name) == value for name, value in ours.items()), ours


def test_axes_of_heads():
    """Heads of a preset have its axes; others FLUX's proportions, even and summing to the head."""
    for preset in PRESETS.values():
        assert axes(preset.flux.head_dim, FLUX) == preset.flux.axes_dim
    assert axes(12, FLUX) == (4, 4, 4) == axes(12, FLUX_FILL.flux)
    for head_dim in range(8, 257, 2):
        dims = axes(head_dim, FLUX_FILL.flux)
        assert sum(dims) == head_dim and all(n > 0 and n % 2 == 0 for n in dims)


def test_a_config_beside_single_files_holds(bfl, tmp_path):
    """transformer/config.json, where it lies beside BFL's file, says what shapes cannot."""
    folder = folders.copy(bfl, tmp_path)
    (folder / "transformer").mkdir()
    entries = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2}
    entries |= {"attention_head_dim": 12, "axes_dims_rope": [8, 2, 2], "joint_attention_dim": 10}
    entries |= {"pooled_projection_dim": 6, "guidance_embeds": True, "out_channels": 64}
    (folder / "transformer/config.json").write_text(json.dumps(entries))
    assert weights.checked_preset(folder).flux == replace(FLUX, axes_dim=(8, 2, 2))


def test_configs_as_published(saved, tmp_path):
    """The configs of FLUX.1 read right where they differ from ours: CLIP's legacy end token 2 is
    the highest id, out_channels is absent, the folder names no preset."""
    folder = folders.copy(saved, tmp_path)
    for part, drop, add in (
        ("transformer", ("out_channels",), {"in_channels": 64}),
        ("text_encoder", (), {"eos_token_id": 2}),
    ):
        file = folder / part / "config.json"
        old = json.loads(file.read_text()) | add
        file.write_text(json.dumps({k: v for k, v in old.items() if k not in drop}))
    (folder / "vcloze.json").unlink()
    preset = load_preset(folder)
    assert preset.clip.eos == 23 and preset.flux.out_channels == 64
    assert preset.recipe == FLUX_FILL.recipe and preset.resolution == 384
    assert preset.flux.remat == "full"


SCHEDULER = "scheduler/scheduler_config.json"
THEIRS = {  # what diffusers 0.42 and transformers 5.24 write beside what we do, with their defaults
    "scheduler": {
        "_diffusers_version": "0.42.1", "invert_sigmas": False, "shift_terminal": None,
        "stochastic_sampling": False, "time_shift_type": "exponential", "use_beta_sigmas": False,
        "use_exponential_sigmas": False, "use_karras_sigmas": False,
    },
    "transformer": {"_diffusers_version": "0.32.0.dev0", "_name_or_path": "../checkpoints/flux"},
    "vae": {
        "_diffusers_version": "0.30.0", "_name_or_path": "x", "force_upcast": True,
        "latents_mean": None, "latents_std": None, "sample_size": 1024,
    },
    "text_encoder": {
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "initializer_factor": 1.0,
        "initializer_range": 0.02, "pad_token_id": 1, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.3", "id2label": {"0": "LABEL_0"}, "return_dict": True,
    },
    "text_encoder_2": {
        "classifier_dropout": 0.0, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1, "initializer_factor": 1.0, "is_decoder": False,
        "is_encoder_decoder": True, "is_gated_act": True, "num_decoder_layers": 24,
        "output_past": True, "scale_decoder_outputs": True, "tie_word_embeddings": False,
        "use_cache": True, "dtype": "bfloat16",
    },
}  # fmt: skip


def alter(file, entries):
    """Other entries in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_what_others_write_is_read(saved, tmp_path):
    """Entries that diffusers and transformers write and that change nothing here are no error."""
    folder = folders.copy(saved, tmp_path)
    before = load_preset(folder)
    for part, entries in THEIRS.items():
        name = "scheduler_config" if part == "scheduler" else "config"
        alter(folder / part / f"{name}.json", entries)
    assert load_preset(folder) == before


@pytest.mark.parity
def test_what_the_installed_write_is_read(saved, tmp_path):
    """The configs of ours as the installed diffusers and transformers write them, in full."""
    diffusers, hf = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = folders.copy(saved, tmp_path)
    before = load_preset(folder)
    for part, cls in (
        ("scheduler", diffusers.FlowMatchEulerDiscreteScheduler),
        ("transformer", diffusers.FluxTransformer2DModel),
        ("vae", diffusers.AutoencoderKL),
    ):
        cls.from_config(cls.load_config(folder / part)).save_config(folder / part)
    for part, cls in (("text_encoder", hf.CLIPTextConfig), ("text_encoder_2", hf.T5Config)):
        config = cls.from_pretrained(folder / part)
        (folder / part / "config.json").write_text(config.to_json_string(use_diff=False))
    assert load_preset(folder) == before


@pytest.mark.parametrize("tokens", [16, 256, 4096, 9000])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_static_shift(saved, tmp_path, shift, tokens):
    """Without dynamic shifting, times t become s t / (1 + (s - 1) t), whatever a grid's tokens
    (diffusers' set_timesteps); a shift that is absent is 1."""
    folder = folders.copy(saved, tmp_path)
    entries = {"use_dynamic_shifting": False, "shift": shift}
    alter(folder / SCHEDULER, entries)
    t = np.linspace(1, 1 / 30, 30)
    expected = np.append(shift * t / (1 + (shift - 1) * t), 0)
    found = flow.schedule(30, tokens, load_preset(folder).flow)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    (folder / SCHEDULER).write_text(json.dumps({"use_dynamic_shifting": False}))
    np.testing.assert_allclose(
        flow.schedule(30, tokens, load_preset(folder).flow), np.append(t, 0), rtol=1e-6
    )


SCHEDULERS = {
    "class": ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "_class_name is 'FlowMatchHeun"),
    "linear": ({"time_shift_type": "linear"}, "time_shift_type is 'linear', only 'exponential'"),
    "Karras": ({"use_karras_sigmas": True}, "use_karras_sigmas is True, only False can be read"),
    "beta": ({"use_beta_sigmas": True}, "use_beta_sigmas is True"),
    "exponential": ({"use_exponential_sigmas": True}, "use_exponential_sigmas is True"),
    "inverted": ({"invert_sigmas": True}, "invert_sigmas is True"),
    "stochastic": ({"stochastic_sampling": True}, "stochastic_sampling is True"),
    "terminal": ({"shift_terminal": 0.02}, "shift_terminal is 0.02, only None can be read"),
    "steps": ({"num_train_timesteps": 500}, "num_train_timesteps is 500, only 1000 can be read"),
    "tomorrow's": (
        {"sigma_curve": "cosine"},
        "sigma_curve is 'cosine', an entry that is not known",
    ),
    "text": ({"use_dynamic_shifting": "no"}, "use_dynamic_shifting cannot be 'no'"),
    "shift": ({"use_dynamic_shifting": False, "shift": 0}, "shift is 0.0, must be above 0"),
    "no slope": ({"max_image_seq_len": 256}, "max_image_seq_len are 256; they must differ"),
    "infinite": ({"max_shift": float("inf")}, "max_shift cannot be inf"),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_wrong_schedulers(saved, tmp_path, kind):
    """A scheduler's entry that would make other pictures and that we do not know how to obey is an
    error with its name."""
    entries, words = SCHEDULERS[kind]
    folder = folders.copy(saved, tmp_path)
    alter(folder / SCHEDULER, entries)
    message = refusal(folder)
    assert message.startswith(f"{folder / SCHEDULER}: ") and words in message, message


@pytest.mark.parametrize("length", ["absent", None, 10**30, 50])
def test_length_of_the_prompts(saved, tmp_path, length):
    """T5 reads as many tokens as its tokenizer's config says, at most the preset's; the preset's
    where there is no such file, or nothing in it."""
    folder = folders.copy(saved, tmp_path)
    file = folder / "tokenizer_2/tokenizer_config.json"
    file.write_text(json.dumps({"model_max_length": length}))
    if length == "absent":
        file.unlink()
    assert load_preset(folder).t5.max_length == (50 if length == 50 else 96)


CONFIGS = {
    "not JSON": ("transformer", None, "is not JSON at column"),
    "text": ("transformer", {"num_layers": "2"}, "num_layers cannot be '2'"),
    "boolean": ("transformer", {"num_layers": True}, "num_layers cannot be True"),
    "negative": ("vae", {"layers_per_block": -1}, "layers_per_block cannot be -1"),
    "infinite": ("vae", {"scaling_factor": float("inf")}, "scaling_factor cannot be inf"),
    "list": ("transformer", {"axes_dims_rope": [4, "4", 4]}, "axes_dims_rope cannot be '4'"),
    "axes": ("transformer", {"axes_dims_rope": [4, 4, 6]}, "must sum to the head dim 12"),
    "class": ("transformer", {"_class_name": "SD3Transformer2DModel"}, "FluxTransformer2DModel"),
    "patch": ("transformer", {"patch_size": 2}, "patch_size is 2"),
    "groups": ("vae", {"norm_num_groups": 3}, "are not divisible by 3 groups"),
    "levels": ("vae", {"block_out_channels": [4, 8]}, "must be 4"),
    "quant": ("vae", {"use_quant_conv": True}, "use_quant_conv"),
    "nothing": ("text_encoder", {"text_config": None}, "must be an object, not null"),
    "relu": ("text_encoder_2", {"feed_forward_proj": "relu"}, "gated-gelu"),
    "gelu": ("text_encoder", {"hidden_act": "gelu"}, "quick_gelu"),
    "ungated": ("text_encoder_2", {"is_gated_act": False}, "is_gated_act is False, only True"),
    "other gate": ("text_encoder_2", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu'"),
    "decoder": ("text_encoder_2", {"is_decoder": True}, "is_decoder is True"),
    "epsilon": ("text_encoder", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, only 1e-05"),
    "quantised": (
        "text_encoder",
        {"quantization_config": {"load_in_8bit": True}},
        "quantization_config is {'load_in_8bit': True}",
    ),
    "quantised blocks": ("transformer", {"quantization_config": {"a": 1}}, "quantization_config"),
    "blocks": (
        "vae",
        {"down_block_types": ["AttnDownEncoderBlock2D", *["DownEncoderBlock2D"] * 3]},
        "down_block_types is ['Attn",
    ),
    "means": ("vae", {"latents_mean": [0.1]}, "latents_mean is [0.1], an entry that is not known"),
    "tomorrow's": ("transformer", {"qk_norm": "layer"}, "qk_norm is 'layer', an entry that is not"),
    "wider": (
        "text_encoder",
        {"hidden_size": 20},
        "its CLIP text encoder is 20 wide, its transformer reads 6; take both from one model",
    ),
    "deeper": ("text_encoder", {"num_hidden_layers": 3}, "encoder.layers.2"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_configs(saved, tmp_path, kind):
    """An entry of a config.json of the wrong type, out of range or of another architecture is an
    error that names the file and the entry."""
    part, entries, words = CONFIGS[kind]
    folder = folders.copy(saved, tmp_path)
    file = folder / part / "config.json"
    old = json.loads(file.read_text())
    file.write_text("{" if entries is None else json.dumps(old | entries))
    message = refusal(folder)
    assert message.startswith(str(folder)) and words in message, message
    assert kind == "wider" or message.startswith(str(folder / part)), message


@pytest.mark.parametrize(
    "file, name",
    [
        ("vae/config.json", "scaling_factor"),
        ("scheduler/scheduler_config.json", "max_shift"),
        ("transformer/config.json", "axes_dims_rope"),
    ],
)
def test_null_is_no_default(saved, tmp_path, file, name):
    """An entry that is null is none that is absent: diffusers would fail on it, so it is refused
    by name."""
    folder = folders.copy(saved, tmp_path)
    entries = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(entries | {name: None}))
    assert f"{file}: {name} cannot be null" in refusal(folder)
