"""Fixture of tests/test_text.py: tiny T5 and CLIP of transformers, their weights and outputs.

Run by scripts/make_fixtures.py (needs torch and transformers, extra `parity`).
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

DATA = Path(__file__).parents[1] / "tests/data"
VOCAB, EOS, LENGTH = 24, 23, 12


def main():
    """Write tests/data/text.safetensors.

    `t5/NAME`, `clip/NAME`: random weights under transformers' names, float16 but exact in
    bfloat16 too; `t5_ids`, `clip_ids`: rows of int32; `t5_out`, `clip_out`: float32 outputs;
    `t5_bf16_error`, `clip_bf16_error`: relative error of transformers in bfloat16 to those;
    `buckets`: T5's bucket of the distances -600 ... 600 at its real size (32, 128).
    """
    arrays = dict(t5_ids=t5_ids(), clip_ids=clip_ids())
    for name, model in (("t5", t5()), ("clip", clip())):
        ids = torch.tensor(arrays[f"{name}_ids"].astype(np.int64))
        out, rounded = run(name, model, ids), run(name, model.bfloat16(), ids)
        arrays[f"{name}_out"] = out
        arrays[f"{name}_bf16_error"] = np.asarray(relative(rounded, out))
        for key, value in model.named_parameters():  # a tied embedding is listed once
            arrays[f"{name}/{key}"] = value.detach().float().numpy().astype(np.float16)
    distance = torch.arange(-600, 601)
    arrays["buckets"] = T5Attention._relative_position_bucket(distance).numpy().astype(np.uint8)
    save_file(arrays, DATA / "text.safetensors")


def t5():
    """4 near and 4 far buckets, so that 12 tokens reach exact, logarithmic and clipped ones."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return randomize(T5EncoderModel(config))


def clip():
    config = CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    return randomize(CLIPTextModel(config))


def randomize(model):
    """Every parameter normal with deviation 0.5, norms around 1; few enough bits for float16."""
    rng = np.random.default_rng(0)
    for name, value in model.named_parameters():
        noise = torch.tensor(0.5 * rng.standard_normal(value.shape), dtype=torch.bfloat16)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.data = (noise + centre).bfloat16().to(torch.float16).float()
    return model.eval()


def t5_ids():
    """A full row, a row padded with 0 after its end token 1, and an empty prompt."""
    rng = np.random.default_rng(1)
    full, padded, empty = rng.integers(2, VOCAB, (3, LENGTH))
    full[-1], padded[5], empty[0] = 1, 1, 1
    padded[6:], empty[1:] = 0, 0
    return np.stack([full, padded, empty]).astype(np.int32)


def clip_ids():
    """End token at the last place, early with more of them as padding, and right at the start."""
    rng = np.random.default_rng(2)
    full, padded, empty = rng.integers(0, EOS - 1, (3, LENGTH))
    full[-1], padded[4:], empty[1:] = EOS, EOS, EOS
    return np.stack([full, padded, empty]).astype(np.int32)


@torch.no_grad()
def run(name, model, ids):
    out = model(ids)
    return (out.last_hidden_state if name == "t5" else out.pooler_output).float().numpy()


def relative(x, reference):
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


if __name__ == "__main__":
    main()
