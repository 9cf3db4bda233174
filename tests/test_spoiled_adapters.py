"""What is no adapter of this transformer is refused in one line: all that was tried."""

import re

import lorafiles
import numpy as np
import pytest
from lorafiles import PLAIN, K, Q, V, edited, renamed
from safetensors.numpy import load_file, save_file

from vcloze_jax.config import UserError
from vcloze_jax.storage import adapters


def test_a_fault_is_told_once(adapter_file):
    """What is wrong with all in the same way is said of the first, and how many there are."""
    halves = {"F64": np.float64, "I32": np.int32}
    for kind, dtype in halves.items():
        edited(adapter_file, lambda d, dtype=dtype: {key: x.astype(dtype) for key, x in d.items()})
        with pytest.raises(UserError) as error:
            adapters.check(adapter_file, PLAIN)
        assert str(error.value).count(f"is of type {kind}") == 1
        assert str(error.value).endswith(", and 149 others likewise")
    edited(
        adapter_file,
        lambda d: d | {f"{Q}.dora_scale": np.ones(16), f"{V}.dora_scale": np.ones((16, 1))},
    )
    with pytest.raises(UserError, match=r"a DoRA.*PEFT\), and 1 others likewise$"):
        adapters.check(adapter_file, PLAIN)


def without(key):
    return lambda d: {k: x for k, x in d.items() if k != key}


def other(**tensors):
    return lambda d: d | {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}


# what is done to training's file, or to it in kohya's naming -> what the error must say
SPOILED = {
    "half, no B": (without(f"{Q}.lora_B.weight"), [f"{Q}.lora_B.weight is missing"]),
    "half, no A": (without(f"{Q}.lora_A.weight"), [f"{Q}.lora_A.weight is missing"]),
    "transposed": (
        lambda d: d | {f"{Q}.lora_A.weight": d[f"{Q}.lora_A.weight"].T.copy()},
        [f"{Q}.lora_A.weight is [16, 11]"],
    ),
    "ranks differ": (
        lambda d: d | {f"{Q}.lora_A.weight": d[f"{Q}.lora_A.weight"][:5]},
        [f"{Q}.lora_A.weight is [5, 16], expected [11, 16]"],
    ),
    "rank 0": (
        other(**{f"{Q}.lora_A.weight": (0, 16), f"{Q}.lora_B.weight": (16, 0)}),
        [f"{Q}.lora_A.weight is [0, 16]"],
    ),
    "deeper model": (
        other(**{Q.replace("0", "2") + ".lora_A.weight": (11, 16)}),
        ["transformer_blocks.2.attn.to_q.lora_A.weight [11, 16] is unknown"],
    ),
    "text encoder": (
        other(**{"text_encoder.q.lora_A.weight": (2, 2)}),
        ["text_encoder.q.lora_A.weight [2, 2] is unknown (for a text encoder"],
    ),
    "DoRA": (
        other(**{f"{Q}.lora_magnitude_vector": (16,)}),
        ["lora_magnitude_vector [16] is unknown (a DoRA"],
    ),
    "wrong bias": (
        other(**{f"{Q}.lora_B.bias": (16, 1)}),
        [f"{Q}.lora_B.bias is [16, 1], expected [16]"],
    ),
    "bias without factors": (
        lambda d: {k: x for k, x in d.items() if not k.startswith(f"{Q}.lora_") or "bias" in k},
        [f"{Q}.lora_A.weight is missing", f"{Q}.lora_B.weight is missing"],
    ),
    "wrong alpha": (other(**{f"{Q}.alpha": (2,)}), [f"{Q}.alpha is [2], expected a number"]),
    "integers": (
        lambda d: d | {f"{Q}.lora_A.weight": np.zeros((11, 16), np.int32)},
        [f"{Q}.lora_A.weight is of type I32"],
    ),
    "two namings": (
        other(**{"double_blocks.0.img_attn.qkv.lora_A.weight": (11, 16)}),
        ["read as an adapter in diffusers' naming: double_blocks.0.img_attn.qkv"],
    ),
    "with and without prefix": (
        other(**{Q.removeprefix("transformer.") + ".lora_A.weight": (11, 16)}),
        ["transformer_blocks.0.attn.to_q.lora_A.weight [11, 16] is unknown"],
    ),
    "no adapter": (
        lambda d: {"transformer.nothing.lora_A.weight": np.ones(3)},
        ["no adapter of FLUX", "transformer.nothing.lora_A.weight"],
    ),
    "a transformer": (
        lambda d: {"double_blocks.0.img_attn.qkv.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "a transformer in BFL's naming"],
    ),
    "XLabs": (
        lambda d: {"double_blocks.0.processor.qkv_lora1.down.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "XLabs"],
    ),
    "IA3": (lambda d: {f"{Q}.ia3_l": np.ones((1, 3))}, ["fold it into weights"]),
    "FLUX.2": (
        lambda d: {"single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": np.ones(3)},
        ["no adapter of FLUX", "(of FLUX.2)"],
    ),
    "Wan": (
        lambda d: {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "(of Wan)"],
    ),
    "empty": (lambda d: {}, ["no adapter of FLUX"]),
    "everything unknown": (
        lambda d: {f"{k}_": x for k, x in d.items()},
        ["no adapter", "and 140 more"],
    ),
}


KOHYA = {
    "half": (without(f"{K}.lora_up.weight"), [f"{K}.lora_up.weight is missing"]),
    "wider": (
        other(**{f"{K}.lora_up.weight": (51, 11)}),
        ["in kohya's naming", f"{K}.lora_up.weight is [51, 11], expected [48, 11]"],
    ),
    "difference": (
        other(**{f"{K}.diff": (48, 16)}),
        [f"{K}.diff [48, 16] is unknown (a difference of weights"],
    ),
    "bias": (other(**{f"{K}.diff_b": (16,)}), [f"{K}.diff_b is [16], expected [48]"]),
    "LoKr": (other(**{f"{K}.lokr_w1": (4, 4)}), ["lokr_w1 [4, 4] is unknown (of LoKr", "fold it"]),
    "CLIP": (
        other(lora_te1_text_model_encoder_layers_0_mlp_fc1=(2, 2)),
        ["is unknown (for a text encoder", "kohya's with --network_train_unet_only"],
    ),
    "a number": (
        other(**{"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ()}),
        ["fc1.alpha is unknown (for a text encoder"],
    ),
    "Stable Diffusion": (
        lambda d: {"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": np.ones((3, 3))},
        ["no adapter of FLUX", "for Stable Diffusion"],
    ),
    "LyCORIS": (  # its many alphas, of float32, stand first in its header
        lambda d: {
            f"lycoris_transformer_blocks_{i}_attn_to_q.{leaf}": np.ones(2, dtype)
            for i in range(12)
            for leaf, dtype in (("alpha", np.float32), ("lokr_w1", np.float16))
        },
        ["no adapter of FLUX", "to_q.lokr_w1 (of LoKr", "fold it", "and 11 others likewise"],
    ),
    "layer of a million": (
        other(**{K.replace("0", "1000000") + ".lora_down.weight": (11, 16)}),
        ["lora_unet_double_blocks_1000000_img_attn_qkv.lora_down.weight [11, 16] is unknown"],
    ),
}


@pytest.mark.parametrize(
    ("to", "kind"), [("diffusers", kind) for kind in SPOILED] + [("kohya", kind) for kind in KOHYA]
)
def test_spoiled_adapters_are_refused(adapter_tree, tmp_path, to, kind):
    """An adapter that does not fit is one line that names the key, and is never half applied."""
    kohya = to == "kohya"
    file = lorafiles.written(tmp_path, adapter_tree, bias=not kohya)
    file = renamed(file, "kohya") if kohya else file
    spoil, words = (KOHYA if kohya else SPOILED)[kind]
    save_file(spoil(load_file(file)), file)
    with pytest.raises(UserError) as error:
        adapters.check(file, PLAIN)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert len(message.split("; ")) <= 12


def test_broken_headers_and_tensors(adapter_file):
    """NaN is named; a header that is no LoraConfig, DoRA, a folder and no file are errors."""
    good = load_file(adapter_file)
    save_file(good | {f"{Q}.lora_B.weight": np.full((16, 11), np.nan, np.float32)}, adapter_file)
    with pytest.raises(UserError, match=f"{Q}.lora_B.weight holds NaN"):
        adapters.load(adapter_file, PLAIN)
    save_file(good, adapter_file)
    for config in (dict(lora_alpha=[]), dict(alpha_pattern={"(": 1}), dict(lora_alpha=1e999)):
        with pytest.raises(UserError, match="is not a LoraConfig"):
            adapters.load(edited(adapter_file, lambda d: d, **config), PLAIN)
    with pytest.raises(UserError, match="DoRA"):
        adapters.load(edited(adapter_file, lambda d: d, use_dora=True), PLAIN)
    with pytest.raises(UserError, match="a folder"):
        adapters.check(adapter_file.parent, PLAIN)
    with pytest.raises(UserError, match="nowhere"):
        adapters.check(adapter_file.with_name("nowhere"), PLAIN)
    for data in (b"", b"GGUF" + bytes(100), b"<html>" * 9, b"version https://git-lfs" + bytes(40)):
        adapter_file.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(adapter_file))):
            adapters.check(adapter_file, PLAIN)
