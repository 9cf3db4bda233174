"""Adapters of every naming, read: y = x W + b + alpha / r * ((x A) B + b_B).

Our own adapters share one A between the parts of a fused weight. A foreign one may have an A of
its own for q, k and v, ranks that differ, or a part of the layers: side by side in A, on the
diagonal in B and padded with zeros, it is one of ours all the same. namings.py says who calls what
how; exchange.py writes one naming as another.
Sources: huggingface/diffusers:src/diffusers/loaders/{peft,lora_pipeline}.py;
huggingface/peft:src/peft/utils/other.py (get_pattern_key).
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ports import flux, namings, read, torchfile
from ports.namings import Naming
from ports.read import DTYPES, PortError, brackets, misshapen
from ports.rows import Leaf, leaf

PEFT = flux.DIFFUSERS._replace(prefix="transformer.")  # of what training writes
METADATA = "lora_adapter_metadata"  # diffusers' entry of the header: LoraConfig as JSON
PICKLE = rb"PK\x03\x04|\x80[\x00-\x05]"
ALPHA = "lora_alpha", "alpha_pattern", "use_rslora", "use_dora"


class Factors(NamedTuple):
    """The adapter of one linear layer of the file: where it lies in our kernel, its tensors' keys
    (None: absent) in the order of Naming.suffixes."""

    stem: str
    rank: int
    index: tuple
    keys: tuple


class Branch(NamedTuple):
    """A linear layer's adapter, read: a [r, in], b [out, r] and bias [out] or None, in the dtype of
    the file and our order; `span` is its part of our fused outputs. Its scale is alpha / r."""

    stem: str
    span: slice
    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None
    alpha: float


class Adapter(NamedTuple):
    """An adapter file whose keys and shapes are as they must be; no tensor is read yet."""

    source: object
    naming: Naming
    alpha: Callable
    linear: list  # (kernel's Leaf, [Factors])
    norms: list  # Leaf: norms that the file replaces


def opened(path: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> Adapter:
    """Open an adapter file, safetensors or a pickle of torch, for a base; reads headers only.

    `shapes`: our path -> shape of the base's leaves; None: of whatever base it was made for.
    PortError if the file is no adapter, or if a key is unknown, lacks its other half or has another
    shape.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    pickled = re.match(PICKLE, start) and start[8:] != b"{"  # with which a JSON header begins
    return checked((torchfile if pickled else read).Source(path), shapes)


def checked(source, shapes=None) -> Adapter:
    """The adapter of an open source, as `opened` says."""
    naming = namings.recognise(source)
    shapes = told(source, naming) if shapes is None else shapes
    faults, used, linear = [], set(), []
    for ours, shape in shapes.items():
        if ours.endswith("/kernel"):
            kernel = leaf(naming.modules, ours, shape)
            factors = [found for p in kernel.pieces if (found := find(source, naming, p, faults))]
            used |= {key for one in factors for key in one.keys}
            linear += [(kernel, factors)] if factors else []
    norms = whole(source, naming, shapes, used, faults)
    rest = [key for key in source.header if key not in used]
    faults += [f"{k} {brackets(source.header[k][0])} is unknown{namings.strange(k)}" for k in rest]
    if faults:
        raise PortError(f"read as an adapter in {naming.title}: {read.several(faults)}")
    return Adapter(source, naming, alphas(source, naming), linear, norms)


def told(source, naming):
    """The shapes of our leaves that an adapter changes, as its own tensors tell them."""
    shapes, (prefix,) = {}, naming.prefixes
    for ours, parts in namings.linear(naming):
        layers, fan_in, fan_out = 0, 0, 0
        for part, width in parts:
            a, b = (re.escape(suffix) for suffix in naming.suffixes[:2])
            sign = re.compile(f"{namings.pattern(naming, prefix, part)}(?:({a})|{b})")
            for key, (shape, _) in source.header.items():
                if (match := sign.fullmatch(key)) and len(shape) == 2:
                    layers = max(layers, 1 + int(match[1]) if "{i}" in part else 1)
                    total = sum(width for _, width in parts)
                    if match[match.re.groups]:
                        fan_in = fan_in or shape[1]
                    else:
                        fan_out = fan_out or shape[0] // width * total
        if layers:
            stacked = (layers,) if "{i}" in parts[0][0] else ()
            shapes[f"{ours}/kernel"] = (*stacked, fan_in, fan_out)
    for ours, [(key, _)] in namings.norms(naming):
        found = [re.fullmatch(namings.pattern(naming, prefix, key), k) for k in source.header]
        found = [match for match in found if match]
        if found:
            layers = 1 + max(int(match[1]) for match in found)
            shapes[ours] = (layers, *source.header[found[0][0]][0])
    return shapes


def find(source, naming, piece, faults):
    """-> the Factors of one linear layer, or None; appends what is wrong with them to `faults`."""
    stem = naming.prefixes[0] + piece.key.removesuffix(".weight").replace(".", naming.dot)
    keys = [stem + suffix if suffix else None for suffix in naming.suffixes]
    if not any(key in source.header for key in keys):
        return None
    (fan_out, fan_in), rank = piece.shape, "rank"
    for key, axis in zip(keys[:2], (0, 1), strict=True):
        shape, _ = source.header.get(key, (None, None))
        if shape is None:
            faults.append(f"{key} is missing, its other half is there")
        elif len(shape) == 2:
            rank = shape[axis] or "rank"
    expected = ((rank, fan_in), (fan_out, rank), (fan_out,), ())
    for key, right, kind in zip(keys, expected, ("A", "B", "bias", "alpha"), strict=True):
        if key not in source.header:
            continue
        shape, dtype = source.header[key]
        if shape != right and not (kind == "alpha" and shape == (1,)):
            faults.append(misshapen(naming.modules, key, shape, brackets(right)))
        elif dtype not in DTYPES:
            faults.append(f"{key} is of type {dtype}, not {' or '.join(DTYPES)}")
    keys = tuple(key if key in source.header else None for key in keys)
    return Factors(stem, rank, piece.index, keys)


def whole(source, naming, shapes, used, faults):
    """-> the Leaves of norms that the file gives in full; each is there for all layers or none."""
    table, leaves = naming.modules._replace(prefix=naming.prefixes[0]), []
    for path in (ours for ours, _ in namings.norms(naming) if ours in shapes):
        norm = leaf(table, path, shapes[path])
        there = [piece for piece in norm.pieces if piece.key in source.header]
        for piece in norm.pieces if there else ():
            shape, dtype = source.header.get(piece.key, (None, None))
            if shape is None:
                faults.append(f"{piece.key} is missing, {there[0].key} is there")
            elif shape != piece.shape or dtype not in DTYPES:
                faults.append(misshapen(table, piece.key, shape, brackets(piece.shape)))
        used |= {piece.key for piece in there}
        leaves += [norm] if there else []
    return leaves


def layers(adapter: Adapter, kernel: Leaf, factors):
    """Read one kernel's adapter: {layer of the stack, or None: [Branch]}."""
    out = {}
    for one in factors:
        a, b, bias, alpha = (key and adapter.source.read(key) for key in one.keys)
        alpha = adapter.alpha(one.stem, one.rank, alpha)
        branch = Branch(one.stem, one.index[-1], a, b, bias, alpha)
        layer = one.index[0] if len(one.index) == 3 else None
        out.setdefault(layer, []).append(swapped(branch) if kernel.swapped else branch)
    return out


def swapped(branch: Branch) -> Branch:
    """The branch with the halves of its outputs swapped: rows of B and its bias, nothing of A."""
    half, bias = len(branch.b) // 2, branch.bias
    bias = None if bias is None else np.roll(bias, half)
    return branch._replace(b=np.roll(branch.b, half, 0), bias=bias)


def arrays(adapter: Adapter):
    """Yield (our path, float32 array): lora_a, lora_b, lora_bias of each layer that the file
    changes, with alpha / r already in lora_b and lora_bias, so that the scale of what we return is
    1; and the norms that it replaces."""
    for kernel, factors in adapter.linear:
        fan_in, fan_out = kernel.shape[-2:]
        found = {
            layer: joined([rounded(branch) for branch in branches], fan_out)
            for layer, branches in layers(adapter, kernel, factors).items()
        }
        rank = max(len(branch.a) for branch in found.values())
        a = np.zeros((*kernel.shape[:-2], fan_in, rank), np.float32)
        b = np.zeros((*kernel.shape[:-2], rank, fan_out), np.float32)
        bias = np.zeros((*kernel.shape[:-2], fan_out), np.float32)
        for layer, branch in found.items():
            at = () if layer is None else layer
            a[at][:, : len(branch.a)], b[at][: len(branch.a)] = branch.a.T, branch.b.T
            bias[at] = 0 if branch.bias is None else branch.bias
        module = kernel.path.removesuffix("kernel")
        yield from ((f"{module}lora_a", a), (f"{module}lora_b", b), (f"{module}lora_bias", bias))
    for norm in adapter.norms:
        yield norm.path, read.fetch(norm, adapter.source, "float32")


def rounded(branch: Branch) -> Branch:
    """The branch in float32 with alpha = r, its scale multiplied into B and its bias."""
    scale = np.float32(branch.alpha / len(branch.a))
    a, b = branch.a.astype(np.float32), branch.b.astype(np.float32) * scale
    bias = None if branch.bias is None else branch.bias.astype(np.float32) * scale
    return branch._replace(a=a, b=b, bias=bias, alpha=len(a))


def joined(branches: list[Branch], fan_out: int) -> Branch:
    """Branches of one scale alpha / r as the one of the fused weight of `fan_out` outputs: if all
    have the same A, it is A; else they lie side by side in A and on the diagonal of B."""
    first = branches[0]
    shared = all(np.array_equal(one.a, first.a) for one in branches)
    blocks = [first] if shared else branches
    a = np.concatenate([one.a for one in blocks])
    b = np.zeros((fan_out, len(a)), np.result_type(*(one.b for one in branches)))
    biases = [one.bias for one in branches if one.bias is not None]
    bias = np.zeros(fan_out, np.result_type(*biases)) if biases else None
    start = 0
    for one in branches:
        columns = slice(start, start + len(one.a))
        b[one.span, columns] = one.b
        if one.bias is not None:
            bias[one.span] = one.bias
        start = 0 if shared else columns.stop
    return Branch(first.stem, slice(0, fan_out), a, b, bias, sum(one.alpha for one in blocks))


def alphas(source, naming):
    """-> function of (key stem, rank, alpha tensor or None): the alpha of that layer."""
    prefix = naming.prefixes[0]
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

    def alpha(stem, rank, tensor):
        if tensor is not None:
            return float(tensor.reshape(()))
        name = stem.removeprefix(prefix)
        alpha = next((v for key, v in patterns.items() if key.fullmatch(name)), default)
        alpha = rank if alpha is None else alpha
        return alpha * rank**0.5 if config["use_rslora"] else alpha

    return alpha


def metadata(modules: dict[str, tuple[int, float]], bias: bool = True) -> dict[str, str]:
    """The header of an adapter for diffusers, {module: (rank, alpha)}; `bias`: on B.

    diffusers before 0.42 takes one alpha for all ranks where this is missing.
    """
    ranks, scales = ({name: pair[i] for name, pair in modules.items()} for i in (0, 1))
    config = {"target_modules": sorted(modules), "lora_bias": bias}
    for name, pattern, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", scales),
    ):
        common = Counter(values.values()).most_common(1)[0][0]
        config[name] = common
        config[pattern] = {f"^{name}": v for name, v in values.items() if v != common}
    config = {f"{PEFT.prefix}{name}": value for name, value in config.items()}
    return {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
