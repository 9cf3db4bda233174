"""What sampling or training will cost, before anything is loaded: tokens, FLOPs, bytes.

No model is described here a second time. FLOPs are XLA's count of the lowered programs, activations
the temporaries of the compiled ones on the devices of the mesh; weights and optimizer state are
counted to the byte, from shapes and the sharding table. Left out are the activations of the text
encoders, those of a prompt, and what Muon needs while it updates; lists (by_layer) take less.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx

from vcloze_jax import flow
from vcloze_jax.devices import make_mesh, micro_size, parse_mesh, waits
from vcloze_jax.grid import bucket
from vcloze_jax.inputs.cli import fetch_weights
from vcloze_jax.inputs.terminal import si
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.vae import VAE
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.painter import BATCH_TOKENS
from vcloze_jax.pipeline import Pipeline
from vcloze_jax.placement import TARGET
from vcloze_jax.references import kept_bytes, part_sizes, parts_flops
from vcloze_jax.sharding import batch_sharding, compute_dtype, count_shards, shardings
from vcloze_jax.storage.weights import MODULES, abstract

MESH = "a larger --mesh: its fsdp axis splits weights and state"
REMEDIES = dict.fromkeys(("its gradients", "its moments"), f"a lower --rank, or {MESH}") | {
    "activations": "a larger --mesh, a lower resolution, fewer cells, in training --remat full",
}

# Dense bfloat16 FLOP/s by device_kind, summed in float32, from the vendors' data sheets. Of cards
# whose kind is not exactly one of these (PCIe or MIG variants, say) no peak is known.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
}


def describe_sampling(args, preset, specs):
    """What sample.py --plan prints: of its weights and adapters, or of a --preset alone."""
    if args.preset and preset.name != "mini":  # that is here, and says some of its sizes itself
        mesh = make_mesh(parse_mesh(args.mesh) if args.mesh else None)
        return sampling(preset, specs, mesh, args.device, args.offload)
    pipeline = Pipeline.load(fetch_weights(args), args.lora, args.mesh)
    painter = pipeline.painter
    told = sampling(painter.preset, specs, painter.mesh, args.device, args.offload)
    return f"{pipeline.summary()}\n{told}"


def sampling(preset, specs, mesh, device=None, offload=False):
    """What painting specs costs, as text; on accelerators of `device` bytes, which need not be
    here, or on those that are; with `offload` the MMDiT's blocks wait in host memory."""
    dtype, compiled, share = precision(mesh, device)
    shards = count_shards(mesh)
    lines, counts, pictures, total, given = [], Counter(), set(), 0, 0
    for name, tokens, steps, rows, parts in passes(preset, specs):
        padded = bucket(tokens, preset.resolution)
        once, forward = 0, flux_flops(preset, padded)
        if parts[1]:
            once, forward = parts_flops(preset, padded, parts)
            given = max(given, parts[1])
        size = f"{tokens} image + {preset.t5.max_length} text tokens, bucket {padded}"
        first = f"{si(once, 'FLOP')} once, " if once else ""
        lines.append(f"{name}: {size}, {first}{steps} steps of {si(forward, 'FLOP')}")
        calls = [*((VAE.encode, row) for row in rows), (VAE.decode, rows[-1])]
        total += once + steps * forward + text_flops(preset)
        total += sum(flops(lower_vae(preset, *call)) for call in calls)
        pictures.update(calls)
        counts[padded, steps] += 1
    lines.append(f"{si(total, 'FLOP')} in all, on {mesh.size} {dtype} devices; bytes on each:")

    batches = {
        (min(-(-count // shards), max(1, BATCH_TOKENS // padded)) * shards, padded)
        for (padded, _), count in counts.items()
    }
    # The most tokens need the most memory, or else the longest grids, where scores are kept.
    batches = {max(batches, key=math.prod), max(batches, key=lambda batch: batch[1])}
    step = max(flux_temporaries(preset, *batch, mesh, compiled) for batch in batches)
    picture = max(temporaries(lower_vae(preset, *call, compiled)) for call in pictures)
    weights = weights_on_device(preset, MODULES, mesh, dtype)
    kept = max(size for size, _ in batches) // shards * kept_bytes(preset, given, dtype)
    less = weights["flux"] - offloaded_on_device("flux", preset, mesh, dtype)
    if offload:
        weights["flux"], less = weights["flux"] - less, 0
    texts = {name: weights.pop(name) for name in ("t5", "clip")}
    stages = {
        "reading": texts,
        "painting": weights | {"activations": step // share + kept},
        "decoding": weights | {"activations": picture // share},
    }
    return "\n".join(lines + verdict(stages, mesh, device, dict(painting=less, decoding=less)))


def precision(mesh, device):
    """The dtype that is computed in; that in which programs are compiled to count temporaries; by
    what their bytes are to be divided. For a device that is not here they are compiled for a CPU,
    in float32, and halved: in bfloat16 a CPU's would hold float32 copies of all weights."""
    if device:
        return "bfloat16", "float32", 2
    return compute_dtype(mesh), compute_dtype(mesh), 1


def passes(preset, specs):
    """(name, tokens, steps, (height, width) of rows as encoded, `part_sizes`) of every pass."""
    for spec in specs:
        tokens, parts = spec.grid.tokens, part_sizes(spec.grid, preset)
        yield spec.name, tokens, spec.num_inference_steps, spec.grid.shape, parts
        if up := spec.upsampling:
            times = flow.schedule(up.num_inference_steps, up.tokens, preset.flow, up.strength)
            rows = ((up.height, up.width),) * 2  # what it starts from, and the condition
            for i in range(len(spec.grid.targets)):
                yield f"{spec.name}_target{i}", up.tokens, len(times) - 1, rows, (up.tokens, 0)


def training(preset, data, mesh, device=None):
    """What an optimizer step on the largest grid of the data costs, as text; see `sampling`."""
    dtype, compiled, share = precision(mesh, device)
    preset, settings, shards = preset.learning, preset.recipe, count_shards(mesh)
    shape = max(data.shapes(), key=lambda shape: shape.tokens)
    rows, tokens = shape.sizes, shape.tokens
    grids = micro_size(settings, mesh) // shards
    encoded = Counter(() if settings.cache else (*rows, rows[-1]))  # the query also blanked
    _, total = gradient_flops(preset, tokens)
    # A gradient of all weights takes twice the work of what it is the gradient of.
    texts_read = 0 if settings.cache else 3 if settings.from_scratch else 1
    total += text_flops(preset) * texts_read
    total += sum(n * flops(lower_vae(preset, VAE.moments, row)) for row, n in encoded.items())

    trained = ("flux", "t5", "clip") if settings.from_scratch else ("flux",)
    frozen = ("flux",) * (settings.rank > 0) + ("vae",) + ("t5", "clip") * (texts_read == 1)
    trees = {name: abstract(MODULES[name], getattr(preset, name))[1:] for name in trained}
    trees = {name: adapter or base for name, (adapter, base) in trees.items()}
    exact = sum(on_device(tree, mesh, name, "float32") for name, tree in trees.items())
    init = make_optimizer(settings.clip, name=settings.optimizer).init
    moments = on_device(jax.eval_shape(init, trees), mesh, "moments", "float32")
    # Rows of one size are encoded at once, for all grids.
    vae = {row: temporaries(lower_vae(preset, VAE.moments, row, compiled)) for row in encoded}
    activations = [grids * n * vae[row] for row, n in encoded.items()]
    activations += [flux_temporaries(preset, grids * shards, tokens, mesh, compiled, learning=True)]
    stage = weights_on_device(preset, frozen, mesh, dtype)
    read = ("t5", "clip") if texts_read == 1 else ()
    offloaded = {name: offloaded_on_device(name, preset, mesh, dtype) for name in read}
    spared = sum(stage[name] - offloaded[name] for name in read)
    if settings.offload:
        stage, spared = stage | offloaded, 0
    stage |= {"learnt": exact, "its gradients": 2 * exact, "its moments": moments}
    stage |= {"its average": exact * (settings.ema > 0), "activations": max(activations) // share}
    sides = ", ".join(f"{width}x{height}" for height, width in rows)
    size = f"{tokens} image + {preset.t5.max_length} text tokens"
    lines = [
        f"largest grid: rows of {sides}; {size}, {si(total, 'FLOP')}",
        f"{si(total * settings.batch, 'FLOP')} in a step of {settings.batch}, {grids} at a time on "
        f"each of {mesh.size} {dtype} devices; bytes on each:",
    ]
    return "\n".join(lines + verdict({"a step": stage}, mesh, device, {"a step": spared}))


def weights_on_device(preset, names, mesh, dtype):
    """Bytes of some models, without adapters, on one device of the mesh, by name."""
    bases = {name: abstract(MODULES[name], getattr(preset, name))[2] for name in names}
    return {name: on_device(tree, mesh, name, dtype) for name, tree in bases.items()}


def offloaded_on_device(name, preset, mesh, dtype):
    """Bytes of a model on one device where its blocks wait in host memory: of the rest, and of what
    all of them make modulations with, at once; of the MMDiT a block that computes, and the next,
    are less, and encoders have done before the peak."""

    def stays(path, x):
        modulates = {entry.key for entry in path} & {*preset.flux.placement.branch}
        return x if modulates or not waits(path, x) else None

    _, _, base = abstract(MODULES[name], getattr(preset, name))
    tree = jax.tree_util.tree_map_with_path(stays, base)
    return on_device(tree, mesh, name, dtype)


def on_device(tree, mesh, root, dtype):
    """Bytes of a tree of shapes on one device of the mesh."""
    leaves = jax.tree.leaves(tree)
    layout = jax.tree.leaves(shardings(tree, mesh, f"{root}/"))
    counts = (math.prod(s.shard_shape(x.shape)) for x, s in zip(leaves, layout, strict=True))
    return sum(counts) * jnp.dtype(dtype).itemsize


def flops(lowered):
    """XLA's count for a lowered program, of all its devices; of a loop it counts one turn."""
    return lowered.cost_analysis()["flops"]


def temporaries(lowered):
    """Bytes on each device that the compiled program needs beside its arguments and results."""
    # What machine code a CPU would run does not matter, and takes half of the time.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return lowered.compile(quick).memory_analysis().temp_size_in_bytes


@cache
def flux_flops(preset, tokens, learning=False):
    """Of `flux_program` for one grid. Without remat, or blocks would be a loop; in float32, or a
    kernel of an accelerator would hide the attention."""
    preset = replace(preset, flux=replace(preset.flux, remat="none"))
    program, *shapes = flux_program(preset, 1, tokens, learning)
    return flops(jax.jit(program).lower(*shapes))


def gradient_flops(preset, tokens):
    """Of the MMDiT in a training step, for one grid: what its gradient needs, and what is done for
    it, which is more where full remat runs each block once more."""
    needed = flux_flops(preset, tokens, learning=True)
    return needed, needed + (flux_flops(preset, tokens) if preset.flux.remat == "full" else 0)


def training_speed(preset, tokens, seconds, mesh):
    """TFLOP/s of all devices in a step over grids of so many tokens each and, where their peak is
    known, the share of it that the gradient needs: MFU as PaLM has it (Chowdhery et al. 2022,
    appendix B), which leaves out what remat does again. Both count the MMDiT alone."""
    counts = [gradient_flops(preset, count) for count in tokens]
    needed, done = (sum(flops) / seconds for flops in zip(*counts, strict=True))
    speed = {"tflops": float(f"{done / 1e12:.4g}")}
    if peak := PEAKS.get(mesh.devices.flat[0].device_kind):
        speed["mfu"] = round(needed / (peak * mesh.size), 4)
    return speed


def flux_temporaries(preset, grids, tokens, mesh, dtype, *, learning=False):
    """Of `flux_program` for so many grids at once, as the mesh runs it."""

    def place(tree, dtype, layout):
        return jax.tree.map(lambda x, s: x.update(dtype=dtype, sharding=s), tree, layout)

    program, learnt, frozen, inputs = flux_program(preset, grids, tokens, learning)
    learnt = place(learnt, "float32", shardings(learnt, mesh, "flux/"))
    frozen = place(frozen, dtype, shardings(frozen, mesh, "flux/"))
    inputs = place(inputs, dtype, [batch_sharding(mesh)] * len(inputs))
    with jax.set_mesh(mesh):
        return temporaries(jax.jit(program).lower(learnt, frozen, inputs))


def flux_program(preset, grids, tokens, learning):
    """The MMDiT's velocity of grids or, where it is learning, the gradient of a loss of it: a
    function of what is learnt, what is frozen, and inputs; with these three as shapes."""
    c, length = preset.flux, preset.t5.max_length
    graphdef, adapter, base = abstract(Flux, c)
    trees = (base, adapter) if learning and not c.rank else (adapter, base)

    def velocity(learnt, frozen, inputs):
        t, img, txt, pooled, *pe = inputs
        flux = nnx.merge(graphdef, learnt, frozen)
        segments = jnp.full((grids, tokens), TARGET) if c.placement.by_segment else None
        return flux(img, txt, flux.modulation(t, t, pooled), pe, None, segments)

    def loss(*args):
        return jnp.square(velocity(*args).astype("float32")).mean()

    sizes = (), (tokens, c.in_channels), (length, c.text_width), (c.vec_width,)
    angles = (length + tokens, 1, c.head_dim // 2)
    inputs = [jax.ShapeDtypeStruct((grids, *size), "float32") for size in (*sizes, angles, angles)]
    return jax.grad(loss) if learning else velocity, *trees, inputs


@cache
def text_flops(preset):
    """Of one prompt through both encoders, whose blocks are a loop: as many turns as layers."""
    total = 0
    for name in ("t5", "clip"):
        module, config = MODULES[name], getattr(preset, name)
        ids = jax.ShapeDtypeStruct((1, config.max_length), "int32")
        encoder = nnx.merge(*abstract(module, config))
        total += config.layers * flops(jax.jit(module.__call__).lower(encoder, ids))
    return total


@cache
def lower_vae(preset, method, size, dtype="float32"):
    """`VAE.encode`, `VAE.moments` or `VAE.decode`, lowered for one picture of (height, width)."""
    vae = jax.tree.map(lambda x: x.update(dtype=dtype), nnx.merge(*abstract(VAE, preset.vae)))
    height, width = size
    picture, latent = (height, width, 3), (height // 8, width // 8, preset.vae.latent_channels)
    shape = latent if method is VAE.decode else picture
    return jax.jit(method).lower(vae, jax.ShapeDtypeStruct((1, *shape), dtype))


def verdict(stages, mesh, device, spared):
    """Lines: each stage's bytes by part, and whether the largest fits, or what to change; --offload
    would take so many bytes off some, {stage: spared}."""
    lines = []
    for name, parts in stages.items():
        each = ", ".join(f"{part} {si(count, 'B')}" for part, count in parts.items() if count)
        lines.append(f"  {name}: {si(sum(parts.values()), 'B')} ({each})")
    peak = max(stages.values(), key=lambda parts: sum(parts.values()))
    limit = device or (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    if device:
        lines.append("activations are estimated from above: half of a CPU's, which has float32")
    if limit is None:
        return [*lines, "this device does not say how much memory it has"]
    if sum(peak.values()) <= limit:
        return [*lines, f"it fits into {si(limit, 'B')}"]
    remedy = REMEDIES.get(max(peak, key=peak.get), MESH)
    left = [sum(parts.values()) - spared.get(name, 0) for name, parts in stages.items()]
    if max(left) <= limit:
        remedy = f"--offload, or {remedy}"
    return [*lines, f"it does not fit into {si(limit, 'B')}: try {remedy}"]
