"""How adapter files name what they change: a row per naming; its modules are a column of flux.py.

Sources: kohya-ss/sd-scripts:networks/{lora_flux,convert_flux_lora}.py;
lzyhha/VisualCloze:models/modules/lora.py, which is black-forest-labs/flux:src/flux/modules/lora.py
(FLUX.1-Depth-dev-lora and FLUX.1-Canny-dev-lora, which give norms in full besides);
huggingface/diffusers:src/diffusers/loaders/lora_conversion_utils.py for who writes which prefix.
"""

import re
from typing import NamedTuple

from ports import flux
from ports.read import PortError, seems, several
from ports.rows import Table


class Naming(NamedTuple):
    """prefix + module, its dots written as `dot`, + suffix: of A, B, a bias on B, and alpha.

    A file has one of `prefixes` throughout; the first is the one that we write.
    """

    title: str
    modules: Table
    prefixes: tuple[str, ...]
    dot: str
    suffixes: tuple[str, ...]


AB = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".alpha"
DOWN_UP = ".lora_down.weight", ".lora_up.weight", None, ".alpha"
DOTTED = "transformer.", "diffusion_model.", "base_model.model.", ""
BARE = "", "diffusion_model.", "base_model.model.", "transformer."
FLAT = "lora_transformer_", "lora_unet_"

NAMINGS = {
    "diffusers": Naming("diffusers' naming", flux.DIFFUSERS, DOTTED, ".", AB),
    "visualcloze": Naming("VisualCloze's (BFL's) naming", flux.BFL, BARE, ".", AB),
    "kohya": Naming("kohya's naming", flux.BFL, ("lora_unet_",), "_", DOWN_UP),
    # only read
    "onetrainer": Naming("OneTrainer's naming", flux.DIFFUSERS, FLAT, "_", DOWN_UP),
    "diffusers-old": Naming("diffusers' old naming", flux.DIFFUSERS, DOTTED, ".", DOWN_UP),
    "comfyui": Naming("ComfyUI's naming", flux.BFL, DOTTED, ".", DOWN_UP),
}
TARGETS = "diffusers", "kohya", "visualcloze"

# What an unknown key says, by the first of these patterns that is found in it.
STRANGE = (
    (r"lora_te|text_encoder|text_model", "for a text encoder; only the MMDiT can be adapted"),
    (r"dora_scale|magnitude", "a DoRA, whose norms are no sum of W and B A; fold it with PEFT"),
    (r"lokr_|hada_|oft_|lora_mid", "a LyCORIS kind that is no product of two matrices"),
    (r"\.diff_b$|\.diff$", "a difference of weights, which is no LoRA"),
    (r"lora_unet_(input|output|middle|down|up|mid)_", "for Stable Diffusion"),
    (r"\.processor\.", "XLabs' naming; convert it with diffusers"),
)
LAYER = r"(\d{1,3})"  # no model has a thousand blocks, and a false number must not make one


def pattern(naming: Naming, prefix: str, module: str) -> str:
    """The regular expression of a module's key without suffix; its group is the layer."""
    return re.escape(prefix + module.replace(".", naming.dot)).replace(r"\{i\}", LAYER)


def recognise(source) -> Naming:
    """The naming, with the one prefix of this file, that explains most keys of a source.

    PortError if none explains any: then the file is no adapter of FLUX.
    """
    best, most = None, 0
    for naming in NAMINGS.values():
        modules = [part for _, parts in linear(naming) for part, _ in parts]
        suffixes = "|".join(re.escape(suffix) for suffix in naming.suffixes[:2])
        for prefix in naming.prefixes:
            alternatives = "|".join(pattern(naming, prefix, module) for module in modules)
            sign = re.compile(rf"(?:{alternatives})(?:{suffixes})")
            count = sum(sign.fullmatch(key) is not None for key in source.header)
            if count > most:
                best, most = naming._replace(prefixes=(prefix,)), count
    if not best:
        keys = several([f"{key}{strange(key)}" for key in source.header]) or "none"
        kind = seems(source.header)
        other = f", seems to be {kind}" if kind and "adapter" not in kind else ""
        raise PortError(f"is no adapter of FLUX in a naming that is known{other}; it holds {keys}")
    return best


def linear(naming):
    """The rows of linear layers: (our path, [(module, width)])."""
    return [row for row in parted(naming) if not row[0].endswith("/scale")]


def norms(naming):
    """The rows of norms, which files with dotted keys may give in full."""
    rows = [row for row in parted(naming) if row[0].endswith("/scale")]
    return rows if naming.dot == "." else []


def parted(naming):
    for ours, foreign in naming.modules.rows:
        parts = foreign if isinstance(foreign, tuple) else (foreign,)
        yield ours, [part if isinstance(part, tuple) else (part, 1) for part in parts]


def strange(key: str) -> str:
    """What is known of a key that is in no row, in parentheses, or nothing."""
    return next((f" ({meaning})" for sign, meaning in STRANGE if re.search(sign, key)), "")
