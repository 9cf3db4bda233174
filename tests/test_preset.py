"""Sizes of a weights folder's models: by its JSON files, by its tensors' shapes, or refused."""

import json
from dataclasses import replace

import folders
import pytest
from folders import FLUX, arrays, key_list, refusal

from ports import engine
from ports.locate import SIZES, recognise_table
from ports.tables.folder import PARTS
from vcloze_jax.config import FLUX_FILL, PRESETS
from vcloze_jax.storage import weights
from vcloze_jax.storage.preset import axes, load_preset


@pytest.mark.parametrize(
    "changes",
    [
        dict(in_channels=64),
        dict(guidance_embed=False, in_channels=64),
        dict(width=64, heads=4, axes_dim=(4, 6, 6)),
        dict(width=40, heads=5, axes_dim=(4, 2, 2), double_blocks=1, single_blocks=1),
        dict(width=32, heads=1, axes_dim=(8, 12, 12), text_width=6, vec_width=4),
    ],
)
def test_sizes_of_the_transformer_from_shapes(changes):
    """Without a config.json every size of the transformer is told by its tensors, in either
    naming; the RoPE axes by the rule of axes."""
    config = replace(FLUX, **changes)
    for table in PARTS["flux"].tables:
        there = engine.export_arrays(table, arrays("flux", config).items())
        source = engine.Source.__new__(engine.Source)
        source.header = {key: (x.shape, "F32") for key, x in there}
        ours = SIZES["flux"](source, table)
        head_dim = ours.pop("head_dim")
        ours |= dict(width=head_dim * ours["heads"], axes_dim=axes(head_dim, FLUX_FILL.flux))
        assert replace(config, **ours) == config and len(ours) == 10


def test_published_sizes_from_shapes():
    """By key lists alone, BFL's and those of the text encoders, FLUX.1-Fill's presets come out."""
    for field, name in (("flux", "flux_bfl"), ("vae", "vae_bfl"), ("t5", "t5"), ("clip", "clip")):
        source = engine.Source.__new__(engine.Source)
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
    assert weights.check(folder).flux == replace(FLUX, axes_dim=(8, 2, 2))


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
    assert preset.flux.remat


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
    "not JSON": ("transformer", None, "cannot be read as JSON"),
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
    "relu": ("text_encoder_2", {"feed_forward_proj": "relu"}, "gated-gelu"),
    "gelu": ("text_encoder", {"hidden_act": "gelu"}, "quick_gelu"),
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
