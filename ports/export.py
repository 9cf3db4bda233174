"""An adapter, read from a file or our own, written in a naming, without a base and without JAX.

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

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from vcloze_jax.ports import torchfile
from vcloze_jax.ports.adapters import (
    Branch,
    Tuned,
    merge_branches,
    open_adapter,
    read_branches,
    read_norms,
)
from vcloze_jax.ports.diagnose import PortError
from vcloze_jax.ports.engine import export_arrays, stream_tensors
from vcloze_jax.ports.loraconfig import METADATA
from vcloze_jax.ports.tables import is_stacked, lay_out, mmdit
from vcloze_jax.ports.tables.namings import DIFFERENCE, NAMINGS, Naming

NOTES = "step", "weights", "placement"  # what a header of ours tells of a run


def convert_adapter(file: Path, naming: Naming, out: Path) -> int:
    """Write the adapter of `file` as `out`, as `write_adapter` says, with what its header tells of
    ours; PortError if it is none."""
    adapter = open_adapter(file)
    note = {key: text for key, text in adapter.source.metadata.items() if key in NOTES}
    return write_adapter(out, naming, partial(read_branches, adapter), read_norms(adapter), note)


def write_adapter(
    out: Path,
    naming: Naming,
    read: Callable[[], Iterable[Tuned]],
    norms: dict,
    note: dict | None = None,
) -> int:
    """Write kernels' adapters and whole norms, {our path: array}, in a naming; returns how many
    linear layers it has there. VisualCloze's is a state dict for torch.load, as the authors' code
    wants it (lzyhha/VisualCloze:visualcloze.py); the others are safetensors, whose header may hold
    a note, {name: text}.

    `read()` gives the adapters, kernel by kernel: once to know what will lie where, and once to
    write it, so that no more than two kernels' are in memory, but for a .pth.
    """
    if naming.ending == ".pth" and "placement" in (note or ()):
        reason = f"holds an adapter of placement {note['placement']}, which a .pth cannot say"
        raise PortError(f"{reason}; choose --to diffusers")
    norms, layout, modules = spell_norms(norms, naming), {}, {}
    for branch in fit_branches(read(), naming):
        tensors = spell_branch(branch, naming)
        layout |= {key: (x.dtype, x.shape) for key, x in tensors.items()}
        modules[branch.stem.removeprefix(naming.prefixes[0])] = len(branch.a), branch.alpha
    layout |= {key: (x.dtype, x.shape) for key, x in norms.items()}
    spelled = (spell_branch(branch, naming).items() for branch in fit_branches(read(), naming))
    tensors = chain(chain.from_iterable(spelled), norms.items())
    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if naming.ending == ".pth":
            torchfile.save(part, dict(tensors))
        else:
            biased = any(key.endswith(".bias") for key in layout)
            header = describe_alphas(modules, biased) if naming.alpha == "header" else {}
            stream_tensors(part, layout, tensors, {"format": "pt"} | header | (note or {}))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return len(modules)


def spell_branch(branch: Branch, naming: Naming) -> dict[str, np.ndarray]:
    """The tensors of a branch under the keys of a naming; PortError if it cannot hold them."""
    key_a, key_b, key_bias, key_alpha = (branch.stem + (s or "") for s in naming.suffixes)
    if naming.alpha == "B":
        branch = fold_alpha(branch)
    tensors = {key_a: branch.a, key_b: branch.b}
    if branch.bias is not None:
        if naming.suffixes[2] in (None, DIFFERENCE):
            title = f"{naming.title} naming"
            raise PortError(f"{branch.stem} has a bias on B, which {title} has not: --to diffusers")
        tensors[key_bias] = branch.bias
    if naming.alpha == "tensor":
        tensors[key_alpha] = round_alpha(branch)
    return tensors


def to_branches(paths: Iterable[str], fetch: Callable[[str], np.ndarray]) -> Iterator[Tuned]:
    """An adapter of ours, whose arrays `fetch` gives by our path, as `read_branches` gives one of a
    file: alpha = r."""
    for path in paths:
        if path.endswith("/lora_a"):
            module = path.removesuffix("lora_a")
            a, b, bias = (fetch(module + name) for name in ("lora_a", "lora_b", "lora_bias"))
            stack = a.shape[: is_stacked(mmdit.DIFFUSERS, f"{module}kernel")]
            a, b = a.reshape(*stack, -1, a.shape[-1]), b.reshape(*stack, a.shape[-1], -1)
            bias, (fan_in, rank) = bias.reshape(*stack, -1), a.shape[-2:]
            span, layers = slice(0, b.shape[-1]), {}
            for layer in range(*stack) if stack else [None]:
                at = () if layer is None else layer
                layers[layer] = [Branch(module, span, a[at].T, b[at].T, bias[at], rank)]
            yield Tuned(f"{module}kernel", (*stack, fan_in, span.stop), layers)


def fit_branches(tuned: Iterable[Tuned], naming: Naming) -> Iterator[Branch]:
    """Branches as the naming has them: its stems, its parts, its order of halves."""
    for path, shape, layers in tuned:
        leaf, fan_out = lay_out(naming.modules, path, shape), shape[-1]
        for layer, branches in layers.items():
            pieces = [piece for piece in leaf.pieces if piece.layer == layer]
            spans = [piece.place[-1] for piece in pieces]
            if spans[-1].stop != fan_out or (leaf.swapped and fan_out % 2):
                stem = branches[0].stem
                raise PortError(f"{stem}: {fan_out} outputs cannot be divided as they must")
            for branch in fit_spans(branches, spans):
                branch = branch.swap_halves() if leaf.swapped else branch
                key = pieces[spans.index(branch.span)].key
                yield branch._replace(stem=naming.spell(key.removesuffix(".weight")))


def fit_spans(branches: list[Branch], spans: list[slice]) -> list[Branch]:
    """Branches of one weight, made to lie in `spans`, which divide its outputs."""
    if all(branch.span in spans for branch in branches):
        return branches
    if len(spans) > 1:
        return split_branch(branches[0], spans)
    slopes = {branch.alpha / len(branch.a) for branch in branches}
    if len(slopes) > 1:
        branches = [fold_alpha(branch) for branch in branches]
    return [merge_branches(branches, spans[0].stop)]


def split_branch(branch: Branch, spans: list[slice]) -> list[Branch]:
    """A fused branch as one for each span: of its own rows of A if B is block-diagonal."""

    def take(span, columns, alpha):
        bias = None if branch.bias is None else branch.bias[span]
        return Branch(branch.stem, span, branch.a[columns], branch.b[span, columns], bias, alpha)

    used = [np.flatnonzero((branch.b[span] != 0).any(0)) for span in spans]
    filled = [(span, columns) for span, columns in zip(spans, used, strict=True) if len(columns)]
    bare = [span for span, columns in zip(spans, used, strict=True) if not len(columns)]
    diagonal = len(filled) > 1 and all(c[-1] < d[0] for (_, c), (_, d) in pairwise(filled))
    if not diagonal or any(branch.bias is not None and branch.bias[span].any() for span in bare):
        return [take(span, slice(None), branch.alpha) for span in spans]
    scale = branch.alpha / len(branch.a)
    cuts = pairwise([0, *(columns[0] for _, columns in filled[1:]), len(branch.a)])
    return [
        take(span, slice(*cut), scale * (cut[1] - cut[0]))
        for (span, _), cut in zip(filled, cuts, strict=True)
    ]


def fold_alpha(branch: Branch) -> Branch:
    """The branch with alpha = r, or PortError if no float holds B alpha / r exactly."""
    scale = branch.alpha / len(branch.a)
    if scale == 1:
        return branch
    b, bias = multiply_exactly(branch.b, scale), None
    if branch.bias is not None:
        bias = multiply_exactly(branch.bias, scale)
    if np.float32(scale) != scale or b is None or (bias is None) != (branch.bias is None):
        raise PortError(
            f"{branch.stem} has alpha / rank {branch.alpha:g} / {len(branch.a)}, which cannot be "
            "multiplied into B without rounding; diffusers' and kohya's naming hold an alpha"
        )
    return branch._replace(b=b, bias=bias, alpha=len(branch.a))


def multiply_exactly(x: np.ndarray, scale: float) -> np.ndarray | None:
    """x * scale in the dtype of x, or else in float32; None if both would round."""
    product = x.astype(np.float64) * scale
    kinds = x.dtype, np.float32
    return next((y for kind in kinds if ((y := product.astype(kind)) == product).all()), None)


def round_alpha(branch: Branch) -> np.ndarray:
    """alpha as a float32 tensor, or PortError if that would give another scale in float32."""
    alpha, rank = np.array(branch.alpha, np.float32), len(branch.a)
    if np.float32(float(alpha) / rank) != np.float32(branch.alpha / rank):
        raise PortError(f"{branch.stem}: alpha {branch.alpha!r} does not fit in a float32")
    return alpha


def spell_norms(norms: dict[str, np.ndarray], naming: Naming) -> dict[str, np.ndarray]:
    """Whole norms, {our path: array}, under the keys of a naming; PortError if it has none."""
    tensors = dict(export_arrays(naming.modules, norms.items()))
    if tensors and not naming.norms:
        title = f"{naming.title} naming"
        raise PortError(f"{next(iter(tensors))} is a whole norm, which {title} has not")
    return {naming.prefixes[0] + key: x for key, x in tensors.items()}


def describe_alphas(modules: dict[str, tuple[int, float]], bias: bool) -> dict[str, str]:
    """The header of an adapter for diffusers, {module: (rank, alpha)}; `bias`: on B.

    diffusers before 0.42 takes one alpha for all ranks where this is missing.
    """
    ranks, alphas = ({name: pair[i] for name, pair in modules.items()} for i in (0, 1))
    config = {"target_modules": sorted(modules), "lora_bias": bias}
    for name, pattern, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", alphas),
    ):
        common = Counter(values.values()).most_common(1)[0][0]
        config[name] = common
        config[pattern] = {f"^{name}": v for name, v in values.items() if v != common}
    prefix = NAMINGS["diffusers"].prefixes[0]
    config = {f"{prefix}{name}": value for name, value in config.items()}
    return {METADATA: json.dumps(config, sort_keys=True)}
