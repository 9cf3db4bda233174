"""Which files a model's folder is made of, and what their headers say.

diffusers and transformers write one file or shards with an index, and have put the name of a
variant ("fp16") in four places: NAME is one of them all.
Sources: huggingface/diffusers:src/diffusers/models/{modeling_utils,model_loading_utils}.py;
huggingface/transformers:src/transformers/modeling_utils.py (_add_variant).
"""

import json
import re
from collections import defaultdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vcloze_jax.ports.diagnose import PortError, describe_start, say_fetch

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' and of transformers' folders
NAME = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(\.(?P<first>\w+))?(-\d+-of-(?P<count>\d+))?(\.(?P<second>\w+))?"
    r"\.safetensors(?P<index>\.index(\.(?P<third>\w+))?\.json)?"
)


def list_variants(folder: Path) -> dict[str, list[re.Match]]:
    """{variant, "" for none: matches of NAME} of the files in a model's folder with the first stem
    that is there; nothing where there is no such file or no folder."""
    matches = [NAME.fullmatch(file.name) for file in sorted(folder.glob("*"))]
    for stem in STEMS:
        variants = defaultdict(list)
        for match in matches:
            if match and match["stem"] == stem:
                variants[match["first"] or match["second"] or match["third"] or ""].append(match)
        if variants:
            return dict(variants)
    return {}


def find_shards(folder: Path) -> tuple[list[Path], set[str] | None]:
    """-> the safetensors files of a model's folder, and the keys of its index, if it has one.

    Of variants the one without a name is taken, or the only one. PortError if there is none or more
    than one to take, or if a shard or what names it is not there.
    """
    variants = list_variants(folder)
    if not variants:
        raise PortError(f"holds no {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")
    if "" not in variants and len(variants) > 1:
        raise PortError(f"holds the variants {' and '.join(variants)}; leave one")
    matches = variants.get("") or next(iter(variants.values()))
    shards = [match for match in matches if match["count"] and not match["index"]]
    single = [match[0] for match in matches if match not in shards and not match["index"]]
    indices = [match[0] for match in matches if match["index"]]
    if len(single + indices) > 1:
        raise PortError(f"holds {' and '.join(single + indices)}; remove the one that is old")
    if single:
        return [folder / single[0]], None
    if indices:
        return read_index(folder / indices[0])
    count = shards[0]["count"]
    if len(shards) != int(count) or {match["count"] for match in shards} != {count}:
        found = f"holds {len(shards)} of {int(count)} shards and no index"
        raise PortError(f"{found}; fetch them all{say_fetch(folder)}")
    return [folder / match[0] for match in shards], None


def read_index(index: Path) -> tuple[list[Path], set[str]]:
    """-> the shards that an index names, and its keys. PortError if it is none, or one is gone."""
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        files = sorted({index.parent / Path(name).name for name in listed.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PortError(f"{index.name} is no index of shards; fetch it again") from error
    if gone := [file.name for file in files if not file.is_file()]:
        raise PortError(f"{index.name} names {gone[0]}, which is not there{say_fetch(index)}")
    return files, set(listed)


def read_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file that is whole, and where its tensors begin."""

    def refuse_twice(pairs):
        if len(dict(pairs)) < len(pairs):
            names = [key for key, _ in pairs]
            raise PortError(f"{path.name}: {max(names, key=names.count)} is there twice")
        return dict(pairs)

    if other := describe_start(path):
        raise PortError(f"{path.name} is {other}; take the model's safetensors")
    try:
        safe_open(path, "numpy")  # checks sizes, offsets and types
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size), object_pairs_hook=refuse_twice), 8 + size
    except (SafetensorError, ValueError) as error:
        reason = f"is not a whole safetensors file ({error}); fetch it again"
        raise PortError(f"{path.name} {reason}") from error
