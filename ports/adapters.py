"""Adapters of every naming, read: y = x W + b + alpha / r * ((x A) B + b_B). ComfyUI's files hold,
in place of b_B, what is added to b: alpha / r b_B in all (comfyanonymous/ComfyUI:comfy/lora.py).

A file becomes Branches, those of a layer of ours in a list, exactly as it holds them: a foreign
adapter may have an A of its own for q, k and v, ranks that differ, or a part of the layers. From
there it is written in another naming (export.py), or becomes one of ours: side by side in A, on the
diagonal in B and padded with zeros.
A LoRA of FLUX.1-dev reads the noisy latent only, which is the first of what Fill reads: there its A
has zeros for the rest, as diffusers has it (lora_pipeline.py, _maybe_expand_lora_state_dict).
Sources: huggingface/diffusers:src/diffusers/loaders/{peft,lora_pipeline}.py.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vcloze_jax.ports import engine, torchfile
from vcloze_jax.ports.diagnose import (
    PortError,
    describe_header,
    describe_holder,
    describe_key,
    list_faults,
    read_start,
    with_shape,
)
from vcloze_jax.ports.loraconfig import (
    LoraConfig,
    describe_untold_strength,
    find_adapter,
    read_lora_config,
    unscale_bias,
)
from vcloze_jax.ports.tables import Leaf, Piece, lay_out, mmdit, split_name
from vcloze_jax.ports.tables.namings import DIFFERENCE, DOTS, NAMINGS, Naming

FLOAT32_MAX = float(np.finfo(np.float32).max)
PICKLE = rb"PK\x03\x04|\x80[\x00-\x05]"


class Factors(NamedTuple):
    """The adapter of one linear layer of the file: the weight that it changes, and the keys that A,
    B, a bias on B and alpha have if they are there, None where the naming has none."""

    stem: str
    piece: Piece
    keys: list[str | None]


class Branch(NamedTuple):
    """A linear layer's adapter, read: a [r, in], b [out, r] and bias [out] or None, in the dtype of
    the file and our order; `span` is its part of our fused outputs. Its scale is alpha / r."""

    stem: str  # in messages
    span: slice
    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray | None
    alpha: float

    def swap_halves(self):
        """The branch with the halves of its outputs swapped: of B and its bias, not of A."""
        half = len(self.b) // 2
        bias = None if self.bias is None else np.roll(self.bias, half)
        return self._replace(b=np.roll(self.b, half, 0), bias=bias)


class Tuned(NamedTuple):
    """One kernel of ours and what adapts it: {layer of its stack, or None: [Branch]}."""

    path: str
    shape: tuple[int, ...]
    layers: dict[int | None, list[Branch]]


class Adapter(NamedTuple):
    """An adapter file whose keys and shapes are as they must be; no tensor is read yet."""

    source: object
    naming: Naming
    config: LoraConfig
    linear: list[tuple[Leaf, list[Factors]]]  # a kernel each
    norms: list[Leaf]  # that the file replaces

    @property
    def narrow(self) -> bool:
        """Whether it is of FLUX.1-dev, on a base that reads more than the noisy latent."""
        pairs = ((kernel, factors) for kernel, found in self.linear for factors in found)
        return any(factors.piece.shape[1] < kernel.shape[-2] for kernel, factors in pairs)

    @property
    def doubt(self) -> str:
        """What speaks against the strength that it is read with, or ""."""
        told = self.config.alpha or any(key.endswith(".alpha") for key in self.source.header)
        return "" if told else describe_untold_strength(self.source.metadata)


def open_adapter(path: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> Adapter:
    """Open an adapter file, safetensors or a pickle of torch, or the folder of one, for a base;
    reads headers and configs only.

    `shapes`: our path -> shape of the base's leaves; None: of whatever base it was made for.
    PortError if the file is no adapter, if a key is unknown, lacks its other half or has another
    shape, or if its config says what cannot be honoured.
    """
    path = find_adapter(path)
    start = read_start(path)
    pickled = re.match(PICKLE, start) and start[8:9] != b"{"  # with which a JSON header begins
    return check_adapter((torchfile.TorchFile if pickled else engine.SafetensorsFile)(path), shapes)


def check_adapter(source, shapes=None) -> Adapter:
    """The adapter of an open source, as `open_adapter` says."""
    naming = recognise_naming(source)
    shapes = infer_shapes(source, naming) if shapes is None else shapes
    kernels = [lay_out(naming.modules, p, x) for p, x in shapes.items() if p.endswith("/kernel")]
    kernels = [lay_out(naming.modules, kernel.path, kernel.matrix) for kernel in kernels]
    linear = [(kernel, find_factors(source, naming, kernel)) for kernel in kernels]
    norms, config = find_norms(source, naming, shapes), read_lora_config(source)
    faults, used, every = [], set(), [one for _, found in linear for one in found]
    for factors in every:
        faults += check_factors(source, factors)
        used |= set(factors.keys)
    for norm in norms:
        expected = {piece.key: piece.shape for piece in norm.pieces}
        there = next(key for key in expected if key in source.header)
        faults += find_faults(source, expected, there)
        used |= set(expected)
    for key, (shape, _) in source.header.items():
        if key not in used:
            faults.append(f"{with_shape(key, shape)} is unknown{describe_key(key)}")
    if not faults:
        ranks = {factors.stem: source.header[factors.keys[0]][0][0] for factors in every}
        biased = any(factors.keys[2] in source.header for factors in every)
        faults = config.find_faults(ranks, naming.prefixes[0], biased)
    if faults:
        raise PortError(f"read as an adapter in {naming.title} naming: {list_faults(faults)}")
    linear = [pair for pair in linear if pair[1]]
    return Adapter(source, naming, config, linear, norms)


def recognise_naming(source) -> Naming:
    """The naming, with the one prefix of this file, that explains most keys of a source.

    PortError if none explains any: then the file is no adapter of FLUX.
    """
    namings = [(naming, prefix) for naming in NAMINGS.values() for prefix in naming.prefixes]
    namings = [naming._replace(prefixes=(prefix,)) for naming, prefix in namings]
    counts = [count_keys(source, naming) for naming in namings]
    if not max(counts):
        telling = list(filter(describe_key, source.header)) or source.header
        keys = list_faults([f"{key}{describe_key(key)}" for key in telling]) or "none"
        kind = describe_header(source.header)
        other = f", seems to be {kind}" if kind and "adapter" not in kind else ""
        other += describe_holder(source.header, DOTS)
        raise PortError(f"is no adapter of FLUX in a naming that is known{other}; it holds {keys}")
    return namings[counts.index(max(counts))]


def count_keys(source, naming: Naming) -> int:
    """How many keys are A or B of a module as the naming spells it."""
    parts = [part for _, foreign in naming.linear for part, _ in split_name(foreign)]
    modules = "|".join(naming.pattern(part) for part in parts)
    halves = "|".join(re.escape(suffix) for suffix in naming.suffixes[:2])
    sign = re.compile(f"(?:{modules})(?:{halves})")
    return sum(sign.fullmatch(key) is not None for key in source.header)


def infer_shapes(source, naming: Naming) -> dict[str, tuple[int, ...]]:
    """The shapes of our leaves that an adapter changes, as its own tensors tell them."""

    def match_keys(name, suffix=""):
        """[(layer, shape)] of the tensors that have this name in some layer."""
        sign = re.compile(naming.pattern(name, suffix))
        pairs = [(sign.fullmatch(key), shape) for key, (shape, _) in source.header.items()]
        return [(int(m[1]) if sign.groups else 0, shape) for m, shape in pairs if m]

    shapes, (suffix_a, suffix_b, *_) = {}, naming.suffixes
    for ours, foreign in naming.linear:
        parts = split_name(foreign)
        a = [pair for part, _ in parts for pair in match_keys(part, suffix_a)]
        b = [(i, s, w) for part, w in parts for i, s in match_keys(part, suffix_b)]
        fan_in = next((s[1] for _, s in a if len(s) == 2), 0)
        unit = next((s[0] // width for _, s, width in b if len(s) == 2), 0)
        if a or b:
            stack = (1 + max(i for i, *_ in a + b),) if "{i}" in foreign else ()
            shapes[f"{ours}/kernel"] = (*stack, fan_in, unit * sum(width for _, width in parts))
    for ours, foreign in naming.norms:
        if found := match_keys(foreign):
            shapes[ours] = (1 + max(i for i, _ in found), *found[0][1])
    return shapes


def find_factors(source, naming: Naming, kernel: Leaf) -> list[Factors]:
    """What the file holds of each weight that a kernel of ours is made of."""
    found = []
    for piece in kernel.pieces:
        stem = naming.spell(piece.key.removesuffix(".weight"))
        keys = [suffix and stem + suffix for suffix in naming.suffixes]
        if any(key in source.header for key in keys):
            fan_out, fan_in = piece.shape
            there, _ = source.header.get(keys[0], ((), None))
            if kernel.path == "img_in/kernel" and there[1:] == (mmdit.LATENT,):
                piece = piece._replace(shape=(fan_out, min(fan_in, mmdit.LATENT)))
            found.append(Factors(stem, piece, keys))
    return found


def find_norms(source, naming: Naming, shapes) -> list[Leaf]:
    """The norms that the file gives in full, if only in some layers."""
    table = naming.modules._replace(prefix=naming.prefixes[0])
    paths = [path for path, _ in naming.norms if path in shapes]
    norms = [lay_out(table, path, shapes[path]) for path in paths]
    return [norm for norm in norms if any(p.key in source.header for p in norm.pieces)]


def check_factors(source, factors: Factors) -> list[str]:
    """What is wrong with the adapter of one linear layer."""
    key_a, key_b, key_bias, key_alpha = factors.keys
    (fan_out, fan_in), rank = factors.piece.shape, "rank"
    for key, axis in ((key_a, 0), (key_b, 1)):
        shape, _ = source.header.get(key, ((), None))
        if len(shape) == 2:
            rank = shape[axis] or "rank"
    one, _ = source.header.get(key_alpha, ((), None))
    expected = {key_a: (rank, fan_in), key_b: (fan_out, rank)}
    optional = {key_bias: (fan_out,), key_alpha: one if math.prod(one) == 1 else ()}
    expected |= {key: shape for key, shape in optional.items() if key in source.header}
    return find_faults(source, expected, "its other half", {key_alpha})


def find_faults(source, expected: dict, there: str, scalars=()) -> list[str]:
    """What is wrong with tensors, {key: shape}, all of which must be there because `there` is;
    those of `scalars` may be of any type of numbers."""
    faults = [
        engine.find_fault(source, key, shape, engine.NUMBERS if key in scalars else engine.DTYPES)
        if key in source.header
        else f"{key} is missing, {there} is there"
        for key, shape in expected.items()
    ]
    return [fault for fault in faults if fault]


def read_branches(adapter: Adapter) -> Iterator[Tuned]:
    """Read an adapter, a kernel of ours at a time; PortError for NaN and infinity."""
    for kernel, factors in adapter.linear:
        layers = {}
        for stem, piece, keys in factors:
            tensors = [adapter.source.read(k) if k in adapter.source.header else None for k in keys]
            a, b, bias, alpha = tensors
            alpha = adapter.config.find_alpha(stem, adapter.naming.prefixes[0], len(a), alpha)
            if not abs(alpha) <= FLOAT32_MAX:
                raise PortError(f"{stem}: alpha {alpha} is beyond float32; train it again")
            if bias is not None and adapter.naming.suffixes[2] == DIFFERENCE:
                bias = unscale_bias(stem, bias, alpha / len(a))
            branch = Branch(stem, piece.place[-1], a, b, bias, alpha)
            branch = branch.swap_halves() if kernel.swapped else branch
            layers.setdefault(piece.layer, []).append(branch)
        yield Tuned(kernel.path, kernel.shape, layers)


def read_norms(adapter: Adapter, dtype=None) -> dict[str, np.ndarray]:
    """{our path: array} of the norms that the file replaces, by default in its own dtype."""
    return {norm.path: engine.fetch(norm, adapter.source, dtype) for norm in adapter.norms}


def read_arrays(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (our path, float32 array): lora_a, lora_b, lora_bias of each layer that the file
    changes, with alpha / r already in lora_b and lora_bias, so that the scale of what we return is
    1; and the norms that it replaces. Inputs are one axis, and outputs."""
    for path, shape, layers in read_branches(adapter):
        *stack, fan_in, fan_out = shape
        merged = {
            layer: merge_branches([round_branch(branch) for branch in branches], fan_out)
            for layer, branches in layers.items()
        }
        rank = max(len(branch.a) for branch in merged.values())
        a = np.zeros((*stack, fan_in, rank), np.float32)
        b = np.zeros((*stack, rank, fan_out), np.float32)
        bias = np.zeros((*stack, fan_out), np.float32)
        for layer, branch in merged.items():
            at = () if layer is None else layer
            r, width = branch.a.shape  # below fan_in where the adapter is narrow
            a[at][:width, :r], b[at][:r] = branch.a.T, branch.b.T
            bias[at] = 0 if branch.bias is None else branch.bias
        module = path.removesuffix("kernel")
        yield from ((f"{module}lora_a", a), (f"{module}lora_b", b), (f"{module}lora_bias", bias))
    yield from read_norms(adapter, "float32").items()


def round_branch(branch: Branch) -> Branch:
    """The branch in float32 with alpha = r, its scale multiplied into B and its bias."""
    scale = np.float32(branch.alpha / len(branch.a))
    a, b = branch.a.astype(np.float32), branch.b.astype(np.float32) * scale
    bias = None if branch.bias is None else branch.bias.astype(np.float32) * scale
    return branch._replace(a=a, b=b, bias=bias, alpha=len(a))


def merge_branches(branches: list[Branch], fan_out: int) -> Branch:
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
