"""What sampling or training will cost, before anything is loaded: tokens, FLOPs, bytes.

Weights and optimizer state are counted exactly, from shapes and the sharding table. Activations
are estimated: bytes per token and unit of width, counted at the peak of a block and checked against
XLA's own figures (tests/test_plan.py); a part that the tensor axis would split is counted whole.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vcloze_jax.grid import PATCH, bucket
from vcloze_jax.model.vae import VAE
from vcloze_jax.painter import BATCH_TOKENS
from vcloze_jax.sharding import compute_dtype, shardings
from vcloze_jax.storage import weights

# Values of one block that live at once, in widths of the MMDiT per token: in a forward pass those
# of a single block's joined MLP and attention; for a gradient all that autodiff keeps.
FORWARD, SAVED = 24, 56
MESH = "a larger --mesh: its fsdp axis splits weights and state"
REMEDIES = {
    "activations": "a larger --mesh, a smaller --micro-batch, a lower resolution or fewer cells",
    "its gradients": f"a lower --rank, or {MESH}",
    "its moments": f"a lower --rank, or {MESH}",
}
# Which tokens a kernel multiplies; those of modulations and embedders one row of a sample.
ROWS = {
    "img_in": "image",
    "txt_in": "text",
    "double/img": "image",
    "double/txt": "text",
    "single": "all",
    "final/linear": "image",
}


def on_device(tree, mesh, root, dtype):
    """Bytes of a tree of shapes on one device of the mesh."""
    places = jax.tree.leaves(shardings(tree, mesh, root))
    shards = zip(jax.tree.leaves(tree), places, strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) for x, s in shards) * jnp.dtype(dtype).itemsize


def shapes_of(preset, name):
    """Adapter and base of a model, as trees of shapes."""
    return weights.abstract(weights.MODULES[name], getattr(preset, name))[1:]


def kernels(tree, image, text):
    """Multiplications by all kernels of the MMDiT's base or adapter for one sample."""
    rows = {"image": image, "text": text, "all": image + text}
    total = 0
    for path, shape in weights.shapes(tree).items():
        if path.endswith(("/kernel", "/lora_a", "/lora_b")):
            kind = next((kind for start, kind in ROWS.items() if path.startswith(start)), None)
            total += math.prod(shape) * (1 if "/mod/" in path else rows.get(kind, 1))
    return total


def flux_flops(config, image, text):
    """(linear, attention) FLOPs of one forward of one sample of that many tokens."""
    base = weights.abstract(weights.MODULES["flux"], config)[2]
    blocks = config.double_blocks + config.single_blocks
    return 2 * kernels(base, image, text), 4 * (image + text) ** 2 * config.width * blocks


def text_flops(preset):
    """Of one prompt through both encoders; without attention, which is a hundredth of it."""
    trees = ((shapes_of(preset, name)[1], getattr(preset, name)) for name in ("t5", "clip"))
    return sum(2 * kernels(tree, 1, 1) * c.max_length for tree, c in trees)


@cache
def vae_flops(config, kind, height, width):
    """Of encoding, or decoding, one picture; XLA's count of the traced program."""
    vae = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    pixels = (1, height, width, 3)
    shape = pixels if kind == "encode" else (1, height // 8, width // 8, config.latent_channels)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = jax.jit(lambda vae, x: getattr(vae, kind)(x)).lower(vae, x)
    return lowered.cost_analysis()["flops"]


def activations(config, grids, length, itemsize, saved=False):
    """Bytes of the MMDiT's activations for `grids` sequences of `length` tokens on one device.

    Where no kernel fuses attention, as in float32, scores and their softmax are [H, L, L]. `saved`
    is what a gradient keeps: of every block, or with remat the input of each and all of one.
    """
    blocks = config.double_blocks + config.single_blocks
    unit = grids * length * config.width * itemsize
    scores = 2 * 4 * grids * config.heads * length * length * (itemsize == 4)
    if not saved:
        return FORWARD * unit + scores
    if config.remat:
        return blocks * unit + SAVED * unit + scores
    return blocks * (SAVED * unit + scores)


def picture_bytes(config, height, width, itemsize):
    """Bytes while one picture is encoded or decoded: three maps of the widest full-size level and
    its float32 norm, or the scores of the attention in the middle."""
    widest = height * width * max(config.channels[:2]) * (3 * itemsize + 4)
    return max(widest, 2 * 4 * (height * width // 64) ** 2)


def sampling(preset, specs, mesh):
    """What painting specs costs, as text."""
    dtype, shards = compute_dtype(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    size, text = jnp.dtype(dtype).itemsize, preset.t5.max_length
    lines, counts, pictures, total = [], Counter(), [], 0
    for name, tokens, steps, rows in passes(specs):
        padded = bucket(tokens, preset.resolution)
        forward = sum(flux_flops(preset.flux, padded, text))
        flops = text_flops(preset) + vae_flops(preset.vae, "decode", *rows[-1]) + steps * forward
        flops += sum(vae_flops(preset.vae, "encode", *row) for row in rows)
        size_of = f"{tokens} image + {text} text tokens, bucket {padded}"
        lines.append(f"{name}: {size_of}, {steps} steps of {si(forward, 'FLOP')}")
        total += flops
        counts[padded, steps] += 1
        pictures += rows
    lines.append(f"{si(total, 'FLOP')} in all, on {mesh.size} {dtype} devices; bytes on each:")
    held = {n: on_device(shapes_of(preset, n)[1], mesh, f"{n}/", dtype) for n in weights.MODULES}
    texts = {"t5": held.pop("t5"), "clip": held.pop("clip")}
    step = max(
        activations(
            preset.flux,
            min(-(-count // shards), max(1, BATCH_TOKENS // padded)),
            text + padded,
            size,
        )
        for (padded, _), count in counts.items()
    )
    picture = max(picture_bytes(preset.vae, *row, size) for row in pictures)
    stages = {
        "reading": texts,
        "painting": held | {"activations": step},
        "decoding": held | {"activations": picture},
    }
    return "\n".join(lines + verdict(stages, mesh))


def passes(specs):
    """(name, tokens, steps, (height, width) of the rows) of every pass over a grid."""
    for spec in specs:
        yield spec.name, spec.grid.tokens, spec.num_inference_steps, spec.grid.shape
        if up := spec.upsampling:
            steps = max(1, math.ceil(up.num_inference_steps * up.strength))
            for i in range(len(spec.grid.targets)):
                yield f"{spec.name}_target{i}", up.tokens, steps, ((up.height, up.width),)


def training(preset, settings, data, mesh):
    """What an optimizer step on the largest grid of the data costs, as text."""
    dtype, shards = compute_dtype(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    size, text, rank = jnp.dtype(dtype).itemsize, preset.t5.max_length, settings.rank
    rows = largest(data)
    tokens = sum(height * width for height, width in rows) // PATCH**2
    config = replace(preset.flux, rank=rank)
    adapter, base = shapes_of(replace(preset, flux=config), "flux")
    names = ("flux", "t5", "clip") if settings.from_scratch else ("flux",)
    learnt = {"flux": adapter} if rank else {n: shapes_of(preset, n)[1] for n in names}

    linear, attention = flux_flops(preset.flux, tokens, text)
    branch = 2 * kernels(adapter, tokens, text)
    # Forward and the gradients of all activations, with flash attention's two and a half; those of
    # what is learnt; and with remat one more forward.
    flops = 2 * linear + 3.5 * attention + (3 * branch if rank else linear)
    flops += (linear + attention + branch) * config.remat
    flops += text_flops(preset) * (3 if settings.from_scratch else 1)
    flops += sum(vae_flops(preset.vae, "encode", *row) for row in (*rows, rows[-1]))

    grids = settings.micro_batch // shards
    frozen = [n for n in weights.MODULES if rank or n not in learnt]
    stage = {n: on_device(shapes_of(preset, n)[1], mesh, f"{n}/", dtype) for n in frozen}
    exact = sum(on_device(tree, mesh, f"{n}/", "float32") for n, tree in learnt.items())
    stage |= {"learnt": exact, "its gradients": 2 * exact, "its moments": 2 * exact}
    pictures = grids * max(picture_bytes(preset.vae, *row, size) for row in rows)
    kept = activations(config, grids, text + tokens, size, saved=True)
    stage["activations"] = max(kept, pictures)
    sides = ", ".join(f"{width}x{height}" for height, width in rows)
    lines = [
        f"largest grid: rows of {sides}; {tokens} image + {text} text tokens, {si(flops, 'FLOP')}",
        f"{si(flops * settings.batch, 'FLOP')} in a step of {settings.batch}, {grids} at a time on "
        f"each of {mesh.size} {dtype} devices; bytes on each:",
    ]
    return "\n".join(lines + verdict({"a step": stage}, mesh))


def largest(data, draws=200):
    """Rows (height, width) of the largest of some grids of the data."""
    rngs = [np.random.default_rng(i) for i in range(draws)]
    shapes = {data.example(rng, data.shape(rng)).grid.shape for rng in rngs}
    return max(shapes, key=lambda rows: sum(height * width for height, width in rows))


def verdict(stages, mesh):
    """Lines: each stage's bytes by part, and whether the largest fits, or what to change."""
    lines = []
    for name, parts in stages.items():
        each = ", ".join(f"{part} {si(count, 'B')}" for part, count in parts.items())
        lines.append(f"  {name}: {si(sum(parts.values()), 'B')} ({each})")
    peak = max(stages.values(), key=lambda parts: sum(parts.values()))
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return [*lines, "this device does not say how much memory it has"]
    if sum(peak.values()) <= limit:
        return [*lines, f"it fits into {si(limit, 'B')}"]
    part = max(peak, key=peak.get)
    return [*lines, f"it does not fit into {si(limit, 'B')}: try {REMEDIES.get(part, MESH)}"]


def si(count, unit):
    """12_345_678, "B" -> "12.3 MB"."""
    prefixes = iter(" kMGTP")
    while (prefix := next(prefixes, "E")) != "E" and count >= 999.5:
        count /= 1000
    return f"{count:.3g} {prefix.strip()}{unit}"
