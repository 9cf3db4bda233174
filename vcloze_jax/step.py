"""One training step: a micro-batch on the devices, its masked loss, the optimizer's update."""

from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vcloze_jax import conditioning, flow
from vcloze_jax.conditioning import Context, Models, Posteriors
from vcloze_jax.placement import FILL
from vcloze_jax.sharding import spread

ENCODERS = ("vae", "t5", "clip")
KEY_PURPOSES = ("init", "draws", "validation")  # of a run's random numbers in JAX
KIND = 48  # bytes of a kind of task's name


class Batch(NamedTuple):
    """A micro-batch on the devices; all grids of one shape."""

    rows: tuple  # a pair a row: pixels uint8 [B, h, W, 3], mask bool [B, h, W] or None. Or, encoded
    # before (by rowmemory.py on one CPU, or for --cache), the Posteriors of all rows
    t5_ids: jax.Array  # int32 [B, T]; or what the encoder made of them, [B, T, text_width]
    clip_ids: jax.Array  # int32 [B, 77]; or [B, vec_width]
    numbers: jax.Array  # int32 [B], of each grid in the run: what is drawn for it depends on that
    pe: tuple  # cos, sin float32 [1 or B, T + S, 1, K/2]; one is on the host
    kinds: jax.Array | None = None  # uint8 [B, KIND], of their tasks, as UTF-8
    segments: jax.Array | None = None  # int32 [B, S], of a Placement by segments


class NoisyBatch(NamedTuple):
    """A micro-batch as the MMDiT is asked: the noisy grids, what it reads, what it should say."""

    x_t: jax.Array  # float32 [B, S, 64]
    velocity: jax.Array  # float32 [B, S, 64]
    share: jax.Array  # float32 [B, S], of a token's pixels that are masked
    t: jax.Array  # float32 [B]
    context: Context  # txt and pooled are token ids where the text encoders are learnt
    kinds: jax.Array | None = None  # uint8 [B, KIND]


class State(NamedTuple):
    """All that a step changes, and a checkpoint holds."""

    trainable: dict  # float32 trees by model
    moments: tuple  # the optimizer's
    average: dict  # the trainable trees' exponential moving average; {} without --ema
    skipped: jax.Array  # int32: steps that were not finite and changed nothing
    failed: jax.Array  # bool: there was one more than may be skipped; nothing changes any more


def purpose_key(seed, purpose):
    """The key of a run's random numbers for one purpose, so that no two share a stream."""
    return jax.random.fold_in(jax.random.key(seed), KEY_PURPOSES.index(purpose))


def make_batch(examples, numbers, read_rows, read_prompts, preset, mesh):
    """Examples (data/sources.py: grid with its whole truth, prompt, kind) of one shape, None for
    another host's -> Batch, by what reads rows and prompts:
    `read_prompts(prompts)` -> T5 ids int32 [B, T] and CLIP ids int32 [B, 77], or what the encoders
    made of them, and what was not read."""
    to_mesh = lambda read: spread([x and read(x) for x in examples], mesh)  # noqa: E731
    first, placement = next(filter(None, examples)).grid, preset.flux.placement
    *texts, _ = read_prompts([x.prompt if x else "" for x in examples])
    kinds = to_mesh(lambda x: np.frombuffer(x.kind.encode()[:KIND].ljust(KIND), np.uint8))
    sizes = preset.flux, preset.t5.max_length, first.tokens
    table = lambda grid: conditioning.position_table([grid], *sizes)  # noqa: E731
    pe = table(first)
    if placement.axis0 == "reference":  # which depends on what is masked
        pe = tuple(to_mesh(lambda x, i=i: table(x.grid)[i][0]) for i in (0, 1))
    segments = to_mesh(lambda x: x.grid.segments(placement)) if placement.by_segment else None
    arrays = (spread(x, mesh) for x in (*texts, np.asarray(numbers, np.int32)))
    return Batch(read_rows(examples), *arrays, pe, kinds, segments)


def spread_rows(examples, mesh, masks_every_row=False, placement=FILL):
    """Examples -> the rows of a Batch, as pixels. Rows that are never masked carry no mask."""
    read = [x and x.grid.pictures(placement) for x in examples]
    count = next(x.grid.columns for x in examples if x) if placement.apart else 1  # of a row
    rows = []
    for r in range(total := len(next(filter(None, read)))):
        pixels = spread([x and x[r].pixels for x in read], mesh)
        masks = [x and x[r].mask for x in read]
        maskable = masks_every_row or r >= total - count
        rows.append((pixels, spread(masks, mesh) if maskable else None))
    return tuple(rows)


def encode_batch(frozen, batch, key, *, graphdefs, preset, dtype):
    """Pictures and text encoded, noise added at times that are drawn for each grid alone; a program
    of its own, of which nothing is differentiated."""
    recipe, models = preset.recipe, merge_models(graphdefs, frozen, names=ENCODERS)
    # Of a grid's number alone: neither batch nor mesh changes what is drawn for it.
    keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n), 4), out_axes=1)
    for_vae, for_noise, for_time, for_guidance = keys(batch.numbers)  # B each
    rows = batch.rows
    if not isinstance(rows, Posteriors):
        rows = conditioning.encode_rows(models.vae, rows, recipe.mask_fill, dtype)
    x, condition, share = conditioning.draw_training(rows, for_vae)
    x = x.astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], "f4"))(for_noise)
    t = flow.draw_time(for_time, recipe.time_mean)
    if recipe.time_shift:
        t = flow.shift_time(t, x.shape[1], preset.flow)
    guidance = flow.draw_guidance(for_guidance, recipe.guidance_range)
    text = batch.t5_ids, batch.clip_ids
    if models.t5:  # where the encoders are learnt, `predict_velocity` encodes
        text = conditioning.encode_text(models.t5, models.clip, *text, dtype)
    x_t, velocity = flow.interpolate(x, noise, t)
    x_t, condition = conditioning.enter(x_t, condition, batch.segments, preset.flux.placement)
    context = Context(condition, *text, guidance, batch.pe, segments=batch.segments)
    return NoisyBatch(x_t, velocity, share, t, context, batch.kinds)


def predict_velocity(trainable, frozen, noisy, *, graphdefs, dtype):
    """The forward pass of a training step: the MMDiT's velocity [B, S, 64]."""
    models, context = merge_models(graphdefs, trainable, frozen), noisy.context
    if "t5" in trainable:
        ids = context.txt, context.pooled
        txt, pooled = conditioning.encode_text(models.t5, models.clip, *ids, dtype)
        context = context._replace(txt=txt, pooled=pooled)
    mod = models.flux.modulation(noisy.t, context.guidance, context.pooled)
    return conditioning.velocity(models.flux, noisy.x_t, mod, context)


def loss_fn(trainable, frozen, noisy, *, region, **statics):
    """Masked flow-matching loss of a micro-batch (paper, section 3) -> the mean over its grids,
    and what is told of each: its loss by region, float32 [B], its time and kind."""
    losses = losses_by_region(predict_velocity(trainable, frozen, noisy, **statics), noisy)
    return losses[region].mean(), losses | {"time": noisy.t, "kind": noisy.kinds}


def losses_by_region(out, noisy):
    """Masked loss of the velocity `out`, of what is masked and of all rows: float32 [B] each."""
    shares = {"target": noisy.share, "grid": jnp.ones_like(noisy.share)}
    return {name: flow.masked_loss(out, noisy.velocity, s) for name, s in shares.items()}


def merge_models(graphdefs, *trees, names=("flux", *ENCODERS)):
    """The four networks, or some, of graphdefs and trees by name; None for one that no tree has."""
    parts = {name: [tree[name] for tree in trees if name in tree] for name in names}
    merged = {name: merge_model(graphdefs[name], *of) for name, of in parts.items() if of}
    return Models(**dict.fromkeys(graphdefs) | merged)


def merge_model(graphdef, *trees):
    """A module of its trees, which are free once it is dropped: `nnx.merge` would leave what it is
    given, here numbers, in a cycle, until Python collects garbage."""
    leaves, treedef = jax.tree.flatten(trees)
    numbered = nnx.merge(graphdef, *jax.tree.unflatten(treedef, range(len(leaves))))
    return jax.tree.map(leaves.__getitem__, numbered)


def learning_rate(recipe, n):
    """The rate of update number n, counted from 0: a linear warm-up, then constant, or falling by a
    cosine to a hundredth at step --decay-steps. On the host, which waits for no device."""
    risen = min((n + 1) / (recipe.warmup + 1), 1)
    falls = np.interp(n, (recipe.warmup, recipe.decay_steps), (0, np.pi))
    return recipe.lr * risen * (0.505 + 0.495 * np.cos(falls if recipe.decay_steps else 0))


def init_state(trainable, tx, ema):
    """The State of a run that begins."""
    average = jax.tree.map(jnp.copy, trainable) if ema else {}
    return State(trainable, tx.init(trainable), average, jnp.int32(0), jnp.bool_(False))


def make_step(tx, loss, layout, ema=0.0, skip=0):
    """`accumulate`, which adds a micro-batch's gradient to a sum, and `update`, which applies its
    mean, both jitted: norms to tell, `tx` (optimizers.py), w - rate * u, average. `losses`, float32
    [B] of each micro-batch, say how many there were, and whether all are finite.

    The frozen weights are an argument, never state. `layout` is the State of shardings: all stays
    where it is, and what is told is everywhere, as a count is. A step whose loss or gradient is not
    finite changes nothing; after `skip` of them nothing changes any more, until the loop reads it.
    """

    @partial(jax.jit, donate_argnums=2, out_shardings=(layout.skipped, layout.trainable))
    def accumulate(trainable, frozen, grads, noisy):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (_, told), new = gradient(trainable, frozen, noisy)
        return told, jax.tree.map(jnp.add, grads, new)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(layout, layout.trainable, None))
    def update(state, grads, losses, rate):
        mean = jax.tree.map(lambda g: g / len(losses), grads)  # of as many micro-batches
        norms = group_norms(mean)
        finite = jnp.isfinite(norms["all"]) & jnp.isfinite(jnp.concatenate(losses)).all()
        updates, moments = tx.update(mean, state.moments, state.trainable)
        trainable = jax.tree.map(lambda w, u: w - rate * u, state.trainable, updates)
        average = optax.incremental_update(trainable, state.average, 1 - ema) if ema else {}
        may_skip = state.skipped < skip
        skipped = state.skipped + (~finite & may_skip & ~state.failed)
        failed = state.failed | (~finite & ~may_skip)
        new = State(trainable, moments, average, skipped, failed)
        kept = state._replace(skipped=skipped, failed=failed)
        state = jax.tree.map(partial(jnp.where, finite & ~failed), new, kept)
        return state, jax.tree.map(jnp.zeros_like, grads), norms

    return accumulate, update


def group_norms(grads):
    """Norm of a gradient, of all and by kind of block."""
    squares = Counter()
    for path, leaf in jax.tree.leaves_with_path(grads):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        group = next((g for g in ("double/img", "double/txt", "single") if g in path), "rest")
        squares.update(dict.fromkeys(("all", group), jnp.square(leaf).sum()))
    return {group: jnp.sqrt(square) for group, square in squares.items()}
