"""Adapters in the naming of PEFT and diffusers: y = x W + b + alpha / r * ((x A) B + b_B).

Our own adapters share one A between the parts of a fused weight, and go out and in by the table.
A foreign one may have an A of its own for q, k and v, ranks that differ, or a part of the layers:
side by side in A, on the diagonal in B and padded with zeros, it is one of ours all the same.
Sources: huggingface/diffusers:src/diffusers/loaders/{peft,lora_pipeline}.py;
huggingface/peft:src/peft/utils/other.py (get_pattern_key).
"""

import json
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from ports import flux
from ports.read import DTYPES, PortError, Source, brackets, misshapen, refuse, spelled, unknown
from ports.rows import Leaf, leaf

PEFT = flux.DIFFUSERS._replace(prefix="transformer.")
SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".alpha")
METADATA = "lora_adapter_metadata"  # diffusers' entry of the header: LoraConfig as JSON
ALPHA = "lora_alpha", "alpha_pattern", "use_rslora", "use_dora"


class Factors(NamedTuple):
    """The adapter of one linear layer of the file: key stem, rank, and which tensors it has."""

    stem: str
    rank: int
    index: tuple  # of its output in our fused weight
    keys: tuple[str, ...]


def plan_adapter(kernels: dict[str, tuple[int, ...]], source: Source):
    """Join an adapter file to the model's linear layers (our path -> kernel shape), from headers.

    -> [(kernel's Leaf, [Factors])] of the layers that it changes. PortError if a key is unknown,
    lacks its other half or has another shape, or if the file is no adapter of this model.
    """
    scales(source)  # refuses a header that it cannot read
    table = spelled(PEFT, source)
    faults, used, found = [], set(), []
    for path, shape in kernels.items():
        kernel = leaf(table, f"{path}/kernel", shape)
        factors = []
        for piece in kernel.pieces:
            stem = piece.key.removesuffix(".weight")
            keys = [stem + suffix for suffix in SUFFIXES]
            keys = [key for key in keys if key in source.header]
            if keys:
                used |= set(keys)
                rank, wrong = check(table, source, stem, *piece.shape)
                faults += wrong
                factors.append(Factors(stem, rank, piece.index, tuple(keys)))
        if factors:
            found.append((kernel, factors))
    refuse(faults + unknown(table, source, used))
    if not found:
        raise PortError("holds no tensor of an adapter (….lora_A.weight)")
    return found


def check(table, source, stem, fan_out, fan_in):
    """-> rank, faults of the tensors of one linear layer."""
    shapes = [source.header.get(stem + suffix, (None, None)) for suffix in SUFFIXES]
    faults, rank = [], "rank"
    for (shape, _), suffix in zip(shapes[:2], SUFFIXES, strict=False):
        if shape is None:
            faults.append(f"{stem}{suffix} is missing, its other half is there")
        elif len(shape) == 2:
            rank = shape[0 if suffix == SUFFIXES[0] else 1] or "rank"
    expected = ((rank, fan_in), (fan_out, rank), (fan_out,), ())
    for (shape, dtype), right, suffix in zip(shapes, expected, SUFFIXES, strict=True):
        if shape is None:
            continue
        if shape != right and not (suffix == ".alpha" and shape == (1,)):
            faults.append(misshapen(table, stem + suffix, shape, brackets(right)))
        elif dtype not in DTYPES:
            faults.append(f"{stem}{suffix} is of type {dtype}, not {' or '.join(DTYPES)}")
    return rank, faults


def fetch_adapter(planned, source: Source):
    """Yield (our path, float32 array): lora_a, lora_b, lora_bias of each planned layer, with
    alpha / r already in lora_b and lora_bias, so that the scale of what we return is 1."""
    scale = scales(source)
    for kernel, factors in planned:
        layers = [[] for _ in range(kernel.shape[0] if len(kernel.shape) == 3 else 1)]
        for one in factors:
            layer = one.index[0] if len(one.index) == 3 else 0
            read = {key.removeprefix(one.stem): source.read(key) for key in one.keys}
            read = {suffix: tensor.astype(np.float32) for suffix, tensor in read.items()}
            a, b = read[".lora_A.weight"].T, read[".lora_B.weight"].T
            factor = np.float32(scale(one.stem, one.rank, read.get(".alpha")))
            bias = read.get(".lora_B.bias", np.zeros(b.shape[1], np.float32))
            layers[layer].append((a, b * factor, bias * factor, one.index[-1]))
        yield from joined(kernel, layers)


def joined(kernel: Leaf, layers):
    """The adapters of a weight's layers and parts as ours: one A, one B and one bias."""
    fan_in, fan_out = kernel.shape[-2:]
    shared = [all(np.array_equal(part[0], layer[0][0]) for part in layer) for layer in layers]
    ranks = [
        [part[0].shape[1] for part in (layer[:1] if same else layer)]
        for layer, same in zip(layers, shared, strict=True)
    ]
    rank = max(map(sum, ranks))
    a = np.zeros((len(layers), fan_in, rank), np.float32)
    b = np.zeros((len(layers), rank, fan_out), np.float32)
    bias = np.zeros((len(layers), fan_out), np.float32)
    for i, layer in enumerate(layers):
        start = 0
        for a_part, b_part, bias_part, span in layer:
            rows = slice(start, start + a_part.shape[1])
            a[i, :, rows], b[i, rows, span], bias[i, span] = a_part, b_part, bias_part
            start = 0 if shared[i] else rows.stop
    if kernel.swapped:
        b, bias = np.roll(b, fan_out // 2, -1), np.roll(bias, fan_out // 2, -1)
    module = kernel.path.removesuffix("kernel")
    for name, array in (("lora_a", a), ("lora_b", b), ("lora_bias", bias)):
        yield module + name, array if len(kernel.shape) == 3 else array[0]


def scales(source: Source):
    """-> function of (key stem, rank, alpha tensor or None): what multiplies B and its bias."""
    prefix = spelled(PEFT, source).prefix
    try:
        config = json.loads(source.metadata.get(METADATA, "{}"))
        config = {name: config.get(prefix + name) for name in ALPHA}
        patterns = config["alpha_pattern"] or {}
        patterns = {re.compile(rf"(.*\.)?({key})"): float(v) for key, v in patterns.items()}
        default = config["lora_alpha"]
        default = None if default is None else float(default)
        if not np.isfinite([*patterns.values(), default or 0]).all():
            raise ValueError("an alpha is not finite")
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise PortError(f"{METADATA} in its header is not a LoraConfig ({error})") from error
    if config["use_dora"]:
        raise PortError("is a DoRA, whose norms are not a sum of W and B A; fold it with PEFT")

    def scale(stem, rank, tensor):
        if tensor is not None:
            return float(tensor.reshape(())) / rank
        name = stem.removeprefix(prefix)
        alpha = next((v for key, v in patterns.items() if key.fullmatch(name)), default)
        alpha = rank if alpha is None else alpha
        return alpha / (rank**0.5 if config["use_rslora"] else rank)

    return scale


def metadata(keys_and_ranks: dict[str, int]) -> dict[str, str]:
    """The header of an adapter of ours, {module: rank}: alpha = rank everywhere, biases on B.

    diffusers before 0.42 takes one alpha for all ranks where this is missing.
    """
    common = Counter(keys_and_ranks.values()).most_common(1)[0][0]
    other = {f"^{name}": rank for name, rank in keys_and_ranks.items() if rank != common}
    config = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(keys_and_ranks),
        "lora_bias": True,
    }
    config = {f"{PEFT.prefix}{name}": value for name, value in config.items()}
    return {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
