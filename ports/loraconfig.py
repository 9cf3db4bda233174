"""What stands beside an adapter's tensors and changes what they mean: PEFT's LoraConfig.

It is in the header of diffusers' files (METADATA, each entry behind "transformer.") and in PEFT's
adapter_config.json beside adapter_model.safetensors. Every entry is obeyed, or it is refused by
name where it says something that we cannot honour.
Sources: huggingface/peft:src/peft/tuners/lora/config.py (LoraConfig) and utils/other.py
(get_pattern_key); huggingface/diffusers:src/diffusers/loaders/lora_base.py.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vcloze_jax.ports.diagnose import PortError, refuse_entries
from vcloze_jax.ports.tables.namings import DIFFERENCE

METADATA = "lora_adapter_metadata"  # diffusers' entry of the header: LoraConfig as JSON
SIDECAR = "adapter_config.json"
ADAPTERS = "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"
TENSORS = ".safetensors", ".sft", ".bin", ".pt", ".pth"

READ = "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"
FIXED = {
    "peft_type": "LORA",
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",  # of the base's own biases; ours on B are `lora_bias`
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),  # base untouched
}
HARMLESS = (  # which layers were meant, which are named by the tensors; training; where it is from
    "target_modules|exclude_modules|layers_to_transform|layers_pattern|lora_dropout|task_type|"
    "inference_mode|auto_mapping|base_model_name_or_path|revision|peft_version|megatron_core|"
    "qalora_group_size|eva_config|velora_config|runtime_config|ensure_weight_tying"
)


class LoraConfig(NamedTuple):
    """How strong each layer is; None where nothing is said."""

    source: str = "its header"  # in messages
    alpha: float | None = None
    rank: int | None = None
    alphas: dict = {}  # pattern of a module -> its own
    ranks: dict = {}
    use_rslora: bool = False
    lora_bias: bool = False

    def find_faults(self, ranks: dict[str, int], prefix: str, biased: bool) -> list[str]:
        """What it says that tensors of these ranks, {stem: rank}, which have a bias on B or none,
        are not."""
        faults = []
        for stem, rank in ranks.items():
            said = find_value(self.ranks, (stem, stem.removeprefix(prefix)), self.rank)
            if said not in (None, rank):
                faults.append(f"{stem} is of rank {rank}, but {self.source} says {said}")
        if self.lora_bias and not biased:
            faults.append(f"lora_bias is True in {self.source}, but no key ends in lora_B.bias")
        return faults

    def find_alpha(self, stem: str, prefix: str, rank: int, tensor=None) -> float:
        """The alpha of a layer whose scale is alpha / rank; `tensor` is what the file holds of it.
        PortError if the two disagree."""
        alpha = find_value(self.alphas, (stem, stem.removeprefix(prefix)), self.alpha)
        if tensor is not None:
            here = float(tensor.reshape(()))
            if alpha not in (None, here):
                raise PortError(f"{stem}.alpha is {here:g}, but {self.source} says {alpha:g}")
            alpha = here
        alpha = rank if alpha is None else alpha
        return alpha * rank**0.5 if self.use_rslora else alpha


def find_value(patterns: dict, names: tuple[str, ...], default):
    """The value of the first pattern that fits one of the names, as PEFT takes it."""
    fits = (v for key, v in patterns.items() if any(key.fullmatch(name) for name in names))
    return next(fits, default)


def find_adapter(path: Path) -> Path:
    """The adapter's file: `path`, or where that is a folder the one in it that PEFT or diffusers
    writes. PortError if there is none, or more than one."""
    if not path.is_dir():
        return path
    found = [path / name for name in ADAPTERS if (path / name).is_file()]
    if len(found) != 1:
        held = " and ".join(file.name for file in found) or f"none of {', '.join(ADAPTERS)}"
        raise PortError(f"a folder, not an adapter file, and holds {held}; name the file itself")
    return found[0]


def find_sidecar(file: Path) -> Path | None:
    """The adapter_config.json of an adapter's file: beside adapter_model.*, or beside a file of
    another name that lies there alone."""
    sidecar = file.with_name(SIDECAR)
    if not sidecar.is_file():
        return None
    rivals = [f for f in file.parent.iterdir() if f.suffix in TENSORS and f.name != file.name]
    return sidecar if file.stem == "adapter_model" or not rivals else None


def read_lora_config(source) -> LoraConfig:
    """The LoraConfig of an open adapter: of its header and of its sidecar, which must agree."""
    header = source.metadata.get(METADATA)
    sidecar = find_sidecar(source.path)
    configs = []
    if header is not None:
        configs.append(parse_lora_config(header, f"{METADATA} in its header"))
    if sidecar is not None:
        configs.append(parse_lora_config(sidecar.read_bytes(), SIDECAR))
        if configs[-1].alpha is None:
            raise PortError(
                f"{SIDECAR} says no lora_alpha, without which its strength is not known"
            )
    if len(configs) == 2:
        ours, theirs = configs
        for field in LoraConfig._fields[1:]:
            both = getattr(ours, field), getattr(theirs, field)
            if both[0] != both[1]:
                raise PortError(f"its header and {SIDECAR} disagree about {field}; remove one")
    return configs[-1] if configs else LoraConfig()


def describe_untold_strength(metadata: dict[str, str]) -> str:
    """What the header of kohya's sd-scripts says of a strength that no tensor says, as a remark; ""
    where that is full strength, too, or nothing. Loaders take the rank for an alpha that is absent
    (diffusers' _convert_kohya_flux_lora_to_diffusers, kohya's own), and so do we."""
    try:
        alpha, rank = (float(metadata[f"ss_network_{name}"]) for name in ("alpha", "dim"))
    except (KeyError, TypeError, ValueError):  # "None", and "Dynamic" of one that was resized
        return ""
    if not (alpha > 0 and rank > 0) or alpha == rank:  # kohya takes an alpha of 0 for the rank
        return ""
    scale = f"ss_network_alpha {alpha:g} of ss_network_dim {rank:g}, which FILE:{alpha / rank:g} is"
    return f"no tensor is an alpha, so alpha is the rank, scale 1; but its header says {scale}"


def parse_lora_config(text: str | bytes, source: str) -> LoraConfig:
    """A LoraConfig in JSON; PortError if it is none, or says what we cannot honour."""
    try:
        entries = json.loads(text).items()
        entries = {name.removeprefix("transformer."): value for name, value in entries}
        entries = {name: x for name, x in entries.items() if not name.startswith("text_encoder")}
        refuse_entries(entries, READ, FIXED, HARMLESS)
        patterns = [
            {
                re.compile(rf"(.*\.)?({key})"): kind(v)
                for key, v in (entries.get(name) or {}).items()
            }
            for name, kind in (("alpha_pattern", float), ("rank_pattern", int))
        ]
        alpha, rank = entries.get("lora_alpha"), entries.get("r")
        alpha = None if alpha is None else float(alpha)
        if not all(map(math.isfinite, [*patterns[0].values(), alpha or 0])):
            raise ValueError("an alpha is not finite")
        rank = None if rank is None else int(rank)
    except json.JSONDecodeError as error:
        raise PortError(
            f"{source} is no JSON from column {error.colno} of line {error.lineno} on; "
            "save it again"
        ) from error
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise PortError(f"{source} is not a LoraConfig ({error})") from error
    except PortError as error:
        raise PortError(f"{source}: {error}") from error
    flags = (entries.get(name) is True for name in ("use_rslora", "lora_bias"))
    return LoraConfig(source, alpha, rank, *patterns, *flags)


def unscale_bias(stem: str, difference: np.ndarray, scale: float) -> np.ndarray:
    """The bias on B, float32, that a branch of this scale makes to the difference of a bias."""
    if not scale and difference.any():
        raise PortError(f"{stem}{DIFFERENCE}: has no bias on B, as alpha is 0; remove this key")
    return difference.astype(np.float32) / np.float32(scale or 1)
