"""Training: a micro-batch on the devices, its masked loss, the optimizer's step, the loop.

What comes from files is handed in: models as trees, grids as examples, what writes as functions.
"""

import time
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vcloze_jax import conditioning, flow
from vcloze_jax.conditioning import Context, Models
from vcloze_jax.config import UserError, flag
from vcloze_jax.grid import Spec
from vcloze_jax.sharding import batch_sharding, compute_dtype, shardings

ENCODERS = ("vae", "t5", "clip")
PURPOSES = ("init", "draws", "validation")  # of a run's random numbers


class Batch(NamedTuple):
    """A micro-batch on the devices; all grids of one shape."""

    rows: tuple  # of (pixels uint8 [B, h, W, 3], mask bool [B, h, W] or None)
    t5_ids: jax.Array  # int32 [B, T]
    clip_ids: jax.Array  # int32 [B, 77]
    numbers: jax.Array  # int32 [B], of each grid in the run: what is drawn for it depends on that
    pe: tuple  # cos, sin float32 [1, T + S, 1, K/2]


class Question(NamedTuple):
    """A micro-batch as the MMDiT is asked: the noisy grids, what it reads, what it should say."""

    x_t: jax.Array  # float32 [B, S, 64]
    velocity: jax.Array  # float32 [B, S, 64]
    share: jax.Array  # float32 [B, S], of a token's pixels that are masked
    t: jax.Array  # float32 [B]
    context: Context  # txt and pooled are token ids where the text encoders are learnt


class State(NamedTuple):
    """All that a step changes, and a checkpoint holds."""

    trainable: dict  # float32 trees by model
    moments: tuple  # the optimizer's
    average: dict  # the trainable trees' exponential moving average; {} without --ema
    skipped: jax.Array  # int32: steps that were not finite and changed nothing
    failed: jax.Array  # bool: there was one more than may be skipped; nothing changes any more


def micro_size(recipe, mesh):
    """Grids of a micro-batch: at most --micro-batch, some on each device that splits the batch, and
    a part of a group, so that what a step is does not depend on it. Raises UserError."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for name in ("micro_batch", "group"):
        if getattr(recipe, name) % shards:
            raise UserError(f"{flag(name)} {getattr(recipe, name)}: a multiple of {shards}, please")
    sizes = [n for n in range(shards, recipe.group + 1, shards) if recipe.group % n == 0]
    return max(n for n in sizes if n <= max(shards, recipe.micro_batch))


def purpose_key(seed, purpose):
    """The key of a run's random numbers for one purpose, so that no two share a stream."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


def make_batch(examples, numbers, tokenizers, preset, mesh, masks_every_row=False):
    """Examples of one grid shape -> Batch. Rows that are never masked carry no mask at all."""
    grids = [example.grid for example in examples]
    rows = []
    for r, row in enumerate(zip(*(grid.rows for grid in grids), strict=True)):
        maskable = masks_every_row or r == len(grids[0].rows) - 1
        mask = np.stack([x.mask for x in row]) if maskable else None
        rows.append((np.stack([x.pixels for x in row]), mask))
    t5_ids, clip_ids, _ = tokenizers([example.prompt for example in examples])
    pe = conditioning.position_table(grids[:1], preset.flux, preset.t5.max_length, grids[0].tokens)
    arrays = tuple(rows), t5_ids, clip_ids, np.asarray(numbers, np.int32)
    return Batch(*jax.device_put(arrays, batch_sharding(mesh)), pe)


def ask(frozen, batch, key, *, graphdefs, preset, dtype):
    """Batch -> Question: encoded, and with times, noise and guidance, drawn for each grid alone.

    A program of its own: nothing of it is differentiated.
    """
    recipe, models = preset.recipe, merge_models(graphdefs, ENCODERS, frozen)
    keys = jax.vmap(partial(jax.random.fold_in, key))(batch.numbers)
    keys = jax.vmap(partial(jax.random.split, num=4))(keys)  # B 4
    for_vae, for_noise, for_time, for_guidance = (keys[:, i] for i in range(4))
    x, condition, share = conditioning.encode_training(
        models.vae, batch.rows, recipe.mask_fill, for_vae, dtype
    )
    x = x.astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(for_noise)
    t = flow.draw_time(for_time, recipe.time_mean)
    if recipe.time_shift:
        t = flow.shift_time(t, x.shape[1], preset.flow)
    guidance = flow.draw_guidance(for_guidance, recipe.guidance_range)
    text = batch.t5_ids, batch.clip_ids
    if models.t5:
        text = conditioning.encode_text(models.t5, models.clip, *text, dtype)
    x_t, velocity = flow.interpolate(x, noise, t)
    return Question(x_t, velocity, share, t, Context(condition, *text, guidance, batch.pe))


def loss_fn(trainable, frozen, question, *, graphdefs, region, dtype):
    """Masked flow-matching loss of a micro-batch (paper, section 3) -> the mean over its grids,
    and each grid's own by region, float32 [B]."""
    models, context = merge_models(graphdefs, graphdefs, trainable, frozen), question.context
    if "t5" in trainable:
        ids = context.txt, context.pooled
        txt, pooled = conditioning.encode_text(models.t5, models.clip, *ids, dtype)
        context = context._replace(txt=txt, pooled=pooled)
    mod = conditioning.modulation(models.flux, question.t, context)
    out = conditioning.velocity(models.flux, question.x_t, mod, context)
    share = question.share
    losses = {
        "target": flow.masked_loss(out, question.velocity, share),
        "grid": flow.masked_loss(out, question.velocity, jnp.ones_like(share)),
    }
    return losses[region].mean(), losses


def merge_models(graphdefs, names, *trees):
    """Some of the four networks, of trees by name; None for the others and for what no tree has."""
    models = dict.fromkeys(graphdefs)
    for name in names:
        if parts := [tree[name] for tree in trees if name in tree]:
            models[name] = nnx.merge(graphdefs[name], *parts)
    return Models(**models)


def learning_rate(recipe):
    """The rate of update number n, counted from 0: a linear warm-up, then constant, or falling by
    a cosine to a hundredth at step --decay-steps."""
    if recipe.decay_steps:
        span = recipe.warmup, recipe.decay_steps
        return optax.warmup_cosine_decay_schedule(0.0, recipe.lr, *span, recipe.lr / 100)
    return lambda n: recipe.lr * min((n + 1) / (recipe.warmup + 1), 1)


def make_optimizer(clip, weight_decay=0.0):
    """AdamW behind a clip of the global norm, of rate 1 (lzyhha/VisualCloze:train.py)."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=0.9, b2=0.999),
        optax.add_decayed_weights(weight_decay),
    )


def init_state(trainable, tx, ema):
    """The State of a run that begins."""
    average = jax.tree.map(jnp.copy, trainable) if ema else {}
    return State(trainable, tx.init(trainable), average, jnp.int32(0), jnp.bool_(False))


def make_step(tx, loss, places, ema=0.0, skip=0):
    """Two jitted functions: add a micro-batch's gradient; apply the mean of the sum so far.

    The frozen weights are an argument, never state. `places` is the State of shardings: all stays
    where it is, losses everywhere. A step whose loss or gradient is not finite changes nothing; after `skip` of them
    nothing changes any more, until the loop reads it.
    """

    @partial(jax.jit, donate_argnums=2, out_shardings=(places.skipped, places.trainable))
    def accumulate(trainable, frozen, grads, question):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (_, losses), new = gradient(trainable, frozen, question)
        return losses, jax.tree.map(jnp.add, grads, new)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(places, places.trainable, None))
    def update(state, grads, losses, rate):
        mean = jax.tree.map(lambda g: g / len(losses), grads)
        norms = group_norms(mean)
        finite = jnp.isfinite(norms["all"]) & jnp.isfinite(jnp.concatenate(losses)).all()
        updates, moments = tx.update(mean, state.moments, state.trainable)
        trainable = jax.tree.map(lambda w, u: w - rate * u, state.trainable, updates)
        average = jax.tree.map(
            lambda a, w: ema * a + (1 - ema) * w, state.average, trainable if ema else {}
        )
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
    squares = {"all": 0.0}
    for path, leaf in jax.tree.leaves_with_path(grads):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        group = next((g for g in ("double/img", "double/txt", "single") if g in path), "rest")
        square = jnp.square(leaf).sum()
        squares["all"] += square
        squares[group] = squares.get(group, 0.0) + square
    return {group: jnp.sqrt(square) for group, square in squares.items()}


class Sent(NamedTuple):
    """A step that the devices work on: what its metrics will be made of."""

    step: int
    start: float  # when it was sent, in seconds of time.perf_counter
    lr: float
    kinds: list[tuple[str, int]]  # of every grid: its task's kind, its number of rows
    times: list[jax.Array]  # float32 [B] of every micro-batch
    losses: list[dict[str, jax.Array]]  # by region, float32 [B]
    norms: dict[str, jax.Array]  # of the gradient, by kind of block
    skipped: jax.Array
    failed: jax.Array


class Trainer:
    """What is learnt: its State on the mesh, and the programs that change it.

    `parts` is (graphdefs, trainable, frozen) by model, the trees pure dicts; only the trainable
    ones change. `step` counts the steps sent.
    """

    def __init__(self, parts, preset, tokenizers, mesh, masks_every_row=False):
        self.graphdefs, trainable, self.frozen = parts
        self.preset, self.recipe, self.mesh = preset, preset.recipe, mesh
        self.make_batch = partial(
            make_batch,
            tokenizers=tokenizers,
            preset=preset,
            mesh=mesh,
            masks_every_row=masks_every_row,
        )
        recipe = preset.recipe
        statics = dict(graphdefs=self.graphdefs, dtype=compute_dtype(mesh))
        loss = partial(loss_fn, region=recipe.loss_region, **statics)
        tx = make_optimizer(recipe.clip, recipe.weight_decay)
        init = partial(init_state, tx=tx, ema=recipe.ema)
        places = shardings(jax.eval_shape(init, trainable), mesh)
        accumulate, update = make_step(tx, loss, places, recipe.ema, recipe.skip_nonfinite)
        self.jitted = {
            "ask": jax.jit(partial(ask, preset=preset, **statics)),
            "accumulate": accumulate,
            "update": update,
            "validate": jax.jit(lambda *args: loss(*args)[0]),
        }
        self.programs, self.rate, self.micro = {}, learning_rate(recipe), micro_size(recipe, mesh)
        self.state = jax.jit(init, out_shardings=places)(trainable)
        self.grads = jax.jit(zeros_like, out_shardings=places.trainable)(trainable)
        self.step, self.ended = 0, 0.0

    @property
    def learnt(self):
        """What training is for: the trainable trees, or their average where there is one."""
        return self.state.average or self.state.trainable

    def models(self):
        """The four networks as they are now."""
        return merge_models(self.graphdefs, self.graphdefs, self.learnt, self.frozen)

    def program(self, name, shape, *args):
        """The program of some inputs' shape, compiled when it is first asked for."""
        if (name, shape) not in self.programs:
            with jax.set_mesh(self.mesh):
                self.programs[name, shape] = self.jitted[name].lower(*args).compile()
        return self.programs[name, shape]

    def compile(self, examples):
        """Compile all that steps over grids of these shapes need, so that nothing is compiled
        later; returns the bytes that the largest program takes beside its inputs."""
        key, largest = purpose_key(0, "validation"), 0
        for example in examples:
            question = self.ask([example] * self.micro, range(self.micro), key)
            args = self.state.trainable, self.frozen, self.grads, question
            program = self.program("accumulate", question.x_t.shape, *args)
            largest = max(largest, program.memory_analysis().temp_size_in_bytes)
        everywhere = self.state.skipped.sharding
        losses = [jax.device_put(np.zeros(self.micro, np.float32), everywhere)]
        losses *= self.recipe.batch // self.micro
        self.program("update", (), self.state, self.grads, losses, np.float32(0))
        return largest

    def ask(self, examples, numbers, key):
        """Grids of one shape, by their numbers in the run -> Question on the mesh."""
        batch = self.make_batch(examples, numbers)
        args = self.frozen, batch, key
        return self.program("ask", tuple(pixels.shape for pixels, _ in batch.rows), *args)(*args)

    def send(self, groups, stopped=lambda: False):
        """Send the next optimizer step to the devices -> Sent; None if `stopped()` between two
        micro-batches: the part that was done is dropped."""
        start, recipe = time.perf_counter(), self.recipe
        key, kinds, times, losses = purpose_key(recipe.seed, "draws"), [], [], []
        for first in range(self.step * recipe.batch, (self.step + 1) * recipe.batch, recipe.group):
            group = next(groups)
            kinds += [(example.kind, len(example.grid.rows)) for example in group]
            for i in range(0, recipe.group, self.micro):
                if stopped():
                    return None
                numbers = range(first + i, first + i + self.micro)
                question = self.ask(group[i : i + self.micro], numbers, key)
                args = self.state.trainable, self.frozen, self.grads, question
                program = self.program("accumulate", question.x_t.shape, *args)
                loss, self.grads = program(*args)
                losses.append(loss)
                times.append(question.t)
        rate = np.float32(self.rate(self.step))
        args = self.state, self.grads, [loss[recipe.loss_region] for loss in losses], rate
        self.state, self.grads, norms = self.program("update", (), *args)(*args)
        self.step += 1
        counts = jnp.copy(self.state.skipped), jnp.copy(self.state.failed)  # the state is donated
        return Sent(self.step, start, float(rate), kinds, times, losses, norms, *counts)

    def measure(self, sent):
        """Wait for a step -> what is known of it, on the host. FloatingPointError if it was one
        more that is not finite than may be skipped."""
        regions = sent.losses[0]
        losses = {r: np.concatenate([np.asarray(x[r]) for x in sent.losses]) for r in regions}
        norms = {group: float(norm) for group, norm in sent.norms.items()}
        if sent.failed:  # since when nothing changes: this is the state before that step
            self.step, self.state = sent.step - 1, self.state._replace(failed=np.bool_(False))
            raise FloatingPointError(
                f"step {sent.step}: loss {losses[self.recipe.loss_region].mean()}, gradient norm "
                f"{norms['all']}; the state before it is saved: go on with a lower --lr or with "
                "--skip-nonfinite 1, or look at the data of that step"
            )
        # It was sent while the step before it ran: its own time begins where that ended.
        start, self.ended = max(sent.start, self.ended), time.perf_counter()
        known = dict(step=sent.step, lr=sent.lr, seconds=self.ended - start, kinds=sent.kinds)
        times = np.concatenate([np.asarray(t) for t in sent.times])
        return known | dict(losses=losses, times=times, norms=norms, skipped=int(sent.skipped))

    def validate(self, questions):
        """Mean loss over questions that are always the same."""
        trees = self.learnt, self.frozen
        values = [self.program("validate", q.x_t.shape, *trees, q)(*trees, q) for q in questions]
        return float(np.mean([np.asarray(value) for value in values]))


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def train(trainer, groups, write, preview, save, stopped):
    """The loop: send a step to the devices, write what is known of the one before it while they
    work; preview, save and stop where that is due.

    `write(measured)`, `preview()` and `save()` are the run folder's; `stopped()` is asked before
    every micro-batch. All steps that were sent are written and saved when it returns. Where a step
    is not finite, the trainer is left as it was before that step.
    """
    recipe, sent, saved, saved_at = trainer.recipe, None, trainer.step, time.monotonic()
    while trainer.step < recipe.steps and not stopped():
        before, sent = sent, trainer.send(groups, stopped)
        if before:
            write(trainer.measure(before))
        if sent is None:
            break
        last, minutes = sent.step == recipe.steps, (time.monotonic() - saved_at) / 60
        preview_is_due = last or sent.step == 1 or sent.step % recipe.preview_every == 0
        save_is_due = last or sent.step % recipe.save_every == 0
        save_is_due |= 0 < recipe.save_minutes < minutes
        if preview_is_due or save_is_due:
            write(trainer.measure(sent))
            sent = None
        if preview_is_due:
            preview()
        if save_is_due:
            save()
            saved, saved_at = trainer.step, time.monotonic()
    if sent:
        write(trainer.measure(sent))
    if saved < trainer.step:
        save()


def preview_sheet(painter, examples, stopped=lambda: False):
    """Examples painted from always the same noise, each beside its truth: uint8 [H, W, 3]. Where it
    is `stopped`, what was painted so far is no picture."""
    preset = painter.preset
    how = preset.num_inference_steps, preset.guidance_scale
    specs = [Spec(e.grid, e.prompt, *how, seed) for seed, e in enumerate(examples)]
    canvases = painter(specs, lambda steps, label: takewhile(lambda _: not stopped(), steps))
    pairs = [
        np.concatenate([canvas.spec.grid.compose(canvas.pixels), canvas.spec.grid.compose()], 1)
        for canvas in canvases
    ]
    return np.concatenate(pairs)
