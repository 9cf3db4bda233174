"""What is wrong with a file, in words: the one error of this package, and the tables by which files
that are not what they should be can be told."""

import re
from pathlib import Path

from vcloze_jax.ports.tables import mmdit, text, vae

SHOWN = 10  # keys that an error names

# What a file is by its first bytes, where it is not safetensors.
MAGIC = (
    (rb"GGUF", "a GGUF file, of quantised weights, which are not read"),
    (
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "a pickle, which could run anything when it is opened: take safetensors",
    ),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"version https://git-lfs", "a pointer of git-lfs, not the file itself: run git lfs pull"),
    (rb"\s*<", "a web page: the download failed"),
    (rb"(?s)\x1f\x8b|.{257}ustar", "an archive: unpack it"),
    (rb"\s*[{\[]", "a JSON file"),
)

# What a safetensors file is, by the first of these patterns that begins one of its keys; a key is
# followed by a space and the type of its tensor.
KINDS = (
    (r"lora_(unet|te\d?|transformer)_|.*[._]lora([._]|A\b|B\b)", "an adapter, for --lora"),
    (r".*\.(absmax|quant_map|quant_state\.\S*) ", "quantised by bitsandbytes (nf4, int8)"),
    (r".*\.(qweight|qzeros|wscales|wtscale) ", "quantised to 4 bits"),
    (r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|SCB) |.* (F8_|I8|U8)", "quantised to 8 bits"),
    (r"(.*\.)?joint_blocks\.|pos_embed\.proj\.", "of Stable Diffusion 3"),
    (r"(down|up|input|output)_blocks\.\d+\.", "a U-Net, of Stable Diffusion 1, 2 or XL"),
    (r"double_stream_modulation_img\.", "of FLUX.2"),
    (r"distilled_guidance_layer\.", "of Chroma"),
    (r"(transformer\.)?double_blocks\.\d+\.img_attn_q", "of HunyuanVideo"),
    (r"controlnet_", "a ControlNet"),
    (r"(encoder\.)?vision_model\.", "an image encoder"),
    (r"(en|de)coder\.(down|up)\w*\.\d+.*attn|(post_)?quant_conv\.", "an older autoencoder"),
    (mmdit.BFL.sign, "a transformer in BFL's naming"),
    (mmdit.DIFFUSERS.sign, "a transformer in diffusers' naming"),
    (vae.BFL.sign, "an autoencoder in BFL's naming"),
    (vae.DIFFUSERS.sign, "an autoencoder in diffusers' naming"),
    (text.T5_TABLE.sign, "a T5 encoder"),
    (text.CLIP_TABLE.sign, "a CLIP text encoder"),
)

# What the key of an adapter that is in no row says, by the first pattern that is found in it.
STRANGE = (
    (
        r"lora_te|text_encoder|text_model",
        "for a text encoder; only the MMDiT can be adapted: remove these keys, or train without "
        "them, kohya's with --network_train_unet_only",
    ),
    (r"bundle_emb", "a word that was learnt beside it, for a text encoder"),
    (
        r"dora_scale|magnitude|use_dora",
        "a DoRA, whose norms are no sum of W and B A; fold it with PEFT",
    ),
    (
        r"lokr_|hada_|oft_|lora_mid|\.ia3_|\.vera_|\.[ab][12]\.weight$",
        "of LoKr, LoHa, OFT, LoCon, IA3, VeRA or GLoRA, which are no product of two matrices; fold "
        "it into weights, or train a LoRA",
    ),
    (r"\.diff_b$|\.diff$", "a difference of weights, which is no LoRA"),
    (r"lora_unet_(input|output|middle|down|up|mid)_", "for Stable Diffusion"),
    (r"ip_adapter", "an IP-Adapter, which reads a picture of its own; it is no LoRA"),
    (r"\.[ab]_to_(qkv|out)", "DiffSynth-Studio's naming; convert it with its tools"),
    (r"to_qkv_mlp_proj|double_stream_modulation", "of FLUX.2"),
    (r"distilled_guidance_layer", "of Chroma"),
    (r"(self|cross)_attn\.[qkv]\.", "of Wan"),
    (r"\.img_attn_qkv|img_mlp\.fc", "of HunyuanVideo"),
    (r"\.img_mlp\.net|\.img_mod\.1", "of Qwen-Image"),
    (r"\.processor\.", "XLabs' naming; convert it with diffusers"),
    (r"init_lora_weights", "which changes the base too; let PEFT convert it when it saves"),
)

# What a wrong shape tells, by a pattern that is found in its key.
HINTS = (
    (r"x_embedder|img_in", "64 input channels are those of FLUX.1-dev, 384 those of FLUX.1-Fill"),
)


class PortError(Exception):
    """A file that does not fit: one line that names up to ten of its keys."""


def read_start(path: Path) -> bytes:
    """The first bytes of a file. PortError for a pipe, which would be waited for."""
    if path.is_fifo():
        raise PortError(f"{path.name} is a pipe; save what comes out of it, and give that file")
    with open(path, "rb") as file:
        return file.read(262)


def describe_start(path: Path) -> str:
    """What a file is by its first bytes, or nothing where that is not known."""
    start = read_start(path)
    if start[8:9] == b"{":  # safetensors, whatever the eight bytes of its header's length look like
        return ""
    return next((kind for sign, kind in MAGIC if re.match(sign, start)), "")


def describe_header(header, expected: str = "") -> str:
    """What a file is by its keys and types, {key: (shape, type)}; nothing where that is not known,
    or its sign is the one expected."""
    bare = [key.removeprefix(mmdit.PART.prefixes[0]) for key in header]
    names = [f"{key} {dtype}" for key, (_, dtype) in zip(bare, header.values(), strict=True)]
    kinds = (row for row in KINDS if any(re.match(row[0], name) for name in names))
    sign, kind = next(kinds, ("", ""))
    return "" if sign == expected else kind


def describe_remedy(kind: str) -> str:
    """What to do with a file of this kind, as the tail of a message, or nothing."""
    wanted = "; take the file in bfloat16, or in float8 with at most one scale per tensor"
    return wanted if kind.startswith("quantised") else ""


def say_fetch(path: Path) -> str:
    """How to complete what lies in Hugging Face's cache, as the tail of a message; "" elsewhere."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{path}/")
    name = found and "/".join(found.groups())
    complete = f"hf download {name}, or --weights {name} --download, completes it"
    return f"; if its download was broken off, {complete}" if found else ""


def describe_key(key: str) -> str:
    """What is known of an adapter's key that is in no row, in parentheses, or nothing."""
    return next((f" ({meaning})" for sign, meaning in STRANGE if re.search(sign, key)), "")


def describe_holder(keys, known: tuple[str, ...]) -> str:
    """What stands before the names of FLUX's layers in an adapter's keys, where that is none of the
    known prefixes, and what to do about it; "" elsewhere."""
    blocks = r"((single_)?transformer_blocks|double_blocks|single_blocks)\.\d"
    found = (re.match(rf"(.+?\.)(?={blocks})", key) for key in keys)
    odd = next((match[1] for match in found if match and match[1] not in known), "")
    remedy = "rename its keys to begin with transformer., if it is FLUX's"
    return odd and f": nobody calls the transformer {odd[:-1]}; {remedy}"


def misshapen(key: str, shape, expected) -> str:
    """The fault of a tensor that has another shape than the one expected."""
    hint = next((f" ({hint})" for sign, hint in HINTS if re.search(sign, key)), "")
    return f"{key} is {in_brackets(shape)}, expected {in_brackets(expected)}{hint}"


def list_faults(faults: list[str]) -> str:
    """The first ten, joined, and how many more there are. Of faults that differ in their keys only,
    and whose words say more than that these are missing or unknown, the first stands for all."""
    alike = {}
    for fault in faults:
        words = re.sub(r"^\S+ ?(\[[\d, ]*\] (?=is))?", "", fault)
        own = words in ("", "is unknown") or words.startswith("is missing")
        alike.setdefault(fault if own else words, []).append(fault)
    listed = [
        first + (f", and {len(others)} others likewise" if others else "")
        for first, *others in alike.values()
    ]
    more = f"; and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return "; ".join(listed[:SHOWN]) + more


def refuse_entries(entries: dict, read, fixed: dict, harmless: str):
    """PortError for an entry of a JSON file that says what we cannot honour.

    An entry that is `fixed` must have that value, or one of a tuple (each item of a list must);
    others must be `read`, or match the pattern of what is `harmless`, or say nothing: null, false.
    """
    for name, value in entries.items():
        if name in fixed and value is not None:
            allowed = fixed[name] if isinstance(fixed[name], tuple) else (fixed[name],)
            if any(one not in allowed for one in (value if isinstance(value, list) else [value])):
                only = " or ".join(map(repr, allowed))
                hint = describe_key(name)
                raise PortError(f"{name} is {value!r}, only {only} can be read{hint}")
        elif name not in read and value and not re.fullmatch(harmless, name):
            raise PortError(
                f"{name} is {value!r}, an entry that is not known here and could change the "
                "picture; remove it if it does not"
            )


def in_brackets(shape) -> str:
    return f"[{', '.join(map(str, shape))}]" if shape else "a number"


def with_shape(key: str, shape) -> str:
    """A key and the shape of its tensor, if that is more than a number."""
    return f"{key} {in_brackets(shape)}" if shape else key
