"""An adapter of one naming written in another, layer by layer, without a base and without JAX.

Nothing is rounded: what a naming cannot hold is refused by name. The cases, all about what is
fused in one naming and apart in another:

* fused -> apart: every part takes a copy of A and its rows of B. If B is block-diagonal, so that
  no column serves two parts, every part takes its own rows of A instead.
* apart -> fused: one A if the parts share it, else A side by side and B block-diagonal, which is
  the same sum to the last bit: the products that come in are with zeros.
* alpha: ranks add up where A lies side by side, and alpha with them, so alpha / r stays. Parts of
  different alpha / r, and all of VisualCloze's naming, which has no alpha, take it into B, where
  that is exact (alpha / r is a power of two, say).
* a bias on B is of VisualCloze's and of diffusers' naming, whole norms likewise: kohya's has none.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ports import lora, torchfile
from ports.lora import Branch
from ports.namings import NAMINGS
from ports.read import PortError
from ports.rows import leaf


def convert(file: Path, to: str, out: Path) -> int:
    """Write the adapter of `file` as `out` in the naming `to`, one of namings.TARGETS; returns how
    many linear layers it has there. VisualCloze's is a state dict for torch.load, as the authors'
    code wants it (lzyhha/VisualCloze:visualcloze.py); the others are safetensors.

    PortError if the file is no adapter, or the naming cannot hold it.
    """
    adapter, target = lora.opened(file), NAMINGS[to]
    tensors, modules = {}, {}
    for branch in branches(adapter, target):
        a, b, bias, alpha = (branch.stem + (suffix or "") for suffix in target.suffixes)
        if to == "visualcloze":
            branch = unscaled(branch)
        if branch.bias is not None and to == "kohya":
            raise PortError(f"{branch.stem} has a bias on B, which {target.title} has not")
        tensors |= {a: branch.a, b: branch.b}
        tensors |= {} if branch.bias is None else {bias: branch.bias}
        if to == "kohya":
            tensors[alpha] = np.array(branch.alpha, np.float32)
            same_scale(branch, float(tensors[alpha]))
        modules[branch.stem.removeprefix(target.prefixes[0])] = len(branch.a), branch.alpha
    tensors |= norms(adapter, target)
    part = out.with_name(out.name + ".part")
    if to == "visualcloze":
        torchfile.save(part, tensors)
    else:
        biased = any(key.endswith(".bias") for key in tensors)
        header = lora.metadata(modules, biased) if to == "diffusers" else {"format": "pt"}
        tensors = {key: np.asarray(x, order="C") for key, x in tensors.items()}
        save_file(tensors, part, metadata=header)
    os.replace(part, out)
    return len(modules)


def branches(adapter, target) -> Iterator[Branch]:
    """The adapter's branches as the target has them: its stems, its parts, its order of halves."""
    for kernel, factors in adapter.linear:
        there, fan_out = leaf(target.modules, kernel.path, kernel.shape), kernel.shape[-1]
        stems = {}  # layer -> {where a part begins: its stem}
        for piece in there.pieces:
            layer = piece.index[0] if len(piece.index) == 3 else None
            stem = piece.key.removesuffix(".weight").replace(".", target.dot)
            stems.setdefault(layer, {})[piece.index[-1].start] = target.prefixes[0] + stem
        first = next(iter(stems.values()))
        spans = [slice(*pair) for pair in pairwise([*first, piece.index[-1].stop])]
        if spans[-1].stop != fan_out or (there.swapped and fan_out % 2):
            raise PortError(f"{factors[0].stem}: {fan_out} outputs cannot be divided as they must")
        for layer, found in lora.layers(adapter, kernel, factors).items():
            for branch in fitted(found, spans, fan_out):
                if there.swapped:
                    branch = lora.swapped(branch)
                yield branch._replace(stem=stems[layer][branch.span.start])


def fitted(found: list[Branch], spans: list[slice], fan_out: int) -> list[Branch]:
    """Branches of one weight of `fan_out` outputs, made to lie in `spans`."""
    if all(branch.span in spans for branch in found):
        return found
    if len(spans) > 1:
        return apart(found[0], spans)
    slopes = {branch.alpha / len(branch.a) for branch in found}
    return [lora.joined(found if len(slopes) == 1 else list(map(unscaled, found)), fan_out)]


def apart(branch: Branch, spans: list[slice]) -> list[Branch]:
    """A fused branch as one for each span: of its own rows of A if B is block-diagonal."""
    used = [np.flatnonzero((branch.b[span] != 0).any(0)) for span in spans]
    blocks = [columns for columns in used if len(columns)]
    cuts = [0, *(columns[0] for columns in blocks[1:]), len(branch.a)]
    diagonal = len(blocks) > 1 and all(l[-1] < r[0] for l, r in pairwise(blocks))  # noqa: E741
    bare = [span for span, columns in zip(spans, used, strict=True) if not len(columns)]
    if not diagonal or any(branch.bias is not None and branch.bias[span].any() for span in bare):
        return [part(branch, span, slice(None), branch.alpha) for span in spans]
    filled, ranks = [span for span in spans if span not in bare], map(slice, cuts, cuts[1:])
    scale = branch.alpha / len(branch.a)
    return [
        part(branch, span, columns, scale * (columns.stop - columns.start))
        for span, columns in zip(filled, ranks, strict=False)
    ]


def part(branch, span, columns, alpha):
    bias = None if branch.bias is None else branch.bias[span]
    return Branch(branch.stem, span, branch.a[columns], branch.b[span, columns], bias, alpha)


def unscaled(branch: Branch) -> Branch:
    """The branch with alpha = r, or PortError if no float holds B alpha / r exactly."""
    scale = branch.alpha / len(branch.a)
    if scale == 1:
        return branch
    exact = np.float32(scale) == scale
    scaled = []
    for x in (branch.b, branch.bias):
        product = None if x is None else x.astype(np.float64) * scale
        kinds = () if x is None else (x.dtype, np.dtype(np.float32))
        fits = [product.astype(kind) for kind in kinds if (product.astype(kind) == product).all()]
        exact &= x is None or bool(fits)
        scaled.append(fits[0] if fits else None)
    if not exact:
        raise PortError(
            f"{branch.stem} has alpha / rank {branch.alpha:g} / {len(branch.a)}, which cannot be "
            "multiplied into B without rounding; diffusers' and kohya's naming hold an alpha"
        )
    return branch._replace(b=scaled[0], bias=scaled[1], alpha=len(branch.a))


def same_scale(branch, alpha):
    """PortError if alpha, as it is written, would give another scale in float32."""
    if np.float32(alpha / len(branch.a)) != np.float32(branch.alpha / len(branch.a)):
        raise PortError(f"{branch.stem}: alpha {branch.alpha!r} does not fit in a float32")


def norms(adapter, target) -> dict[str, np.ndarray]:
    """The norms that the adapter replaces, in the target's naming."""
    if adapter.norms and target.dot != ".":
        key = adapter.norms[0].pieces[0].key
        raise PortError(f"{key} is a whole norm, which {target.title} has not")
    table = target.modules._replace(prefix=target.prefixes[0])
    return {
        there.key: adapter.source.read(here.key)
        for norm in adapter.norms
        for here, there in zip(norm.pieces, leaf(table, norm.path, norm.shape).pieces, strict=True)
    }
