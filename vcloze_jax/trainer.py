"""Training: a micro-batch on the devices, its masked loss, the optimizer's step, the loop.

What comes from files is handed in: models as trees, grids as examples, what writes as functions.
"""

import math
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vcloze_jax import conditioning, flow
from vcloze_jax.conditioning import Context
from vcloze_jax.grid import Spec
from vcloze_jax.sharding import batch_sharding, compute_dtype, shardings


class Batch(NamedTuple):
    """A micro-batch on the devices; all grids of one shape."""

    rows: tuple  # of (pixels uint8 [B, h, W, 3], mask bool [B, h, W] or None)
    t5_ids: jax.Array  # int32 [B, T]
    clip_ids: jax.Array  # int32 [B, 77]
    pe: tuple  # cos, sin float32 [1, T + S, 1, K/2]


def make_batch(examples, tokenizers, preset, mesh, masks_every_row=False):
    """Examples of one grid shape -> Batch. Rows that are never masked carry no mask at all."""
    grids = [example.grid for example in examples]
    rows = []
    for r, row in enumerate(zip(*(grid.rows for grid in grids), strict=True)):
        maskable = masks_every_row or r == len(grids[0].rows) - 1
        mask = np.stack([x.mask for x in row]) if maskable else None
        rows.append((np.stack([x.pixels for x in row]), mask))
    t5_ids, clip_ids, _ = tokenizers([example.prompt for example in examples])
    T, S = preset.t5.max_length, grids[0].tokens
    pe = conditioning.position_table(grids[:1], preset.flux, T, S)
    batch = jax.device_put((tuple(rows), t5_ids, clip_ids), batch_sharding(mesh))
    return Batch(*batch, pe)


def loss_fn(trainable, frozen, batch, key, *, graphdef, recipe, dtype):
    """Masked flow-matching loss of a micro-batch (paper, section 3)."""
    models = nnx.merge(graphdef, trainable, frozen)
    for_vae, for_noise, for_time, for_guidance = jax.random.split(key, 4)
    ids = batch.t5_ids, batch.clip_ids
    txt, pooled = conditioning.encode_text(models.t5, models.clip, *ids, dtype)
    x, condition, share = conditioning.encode_training(
        models.vae, batch.rows, recipe.mask_fill, for_vae, dtype
    )
    x, condition = jax.lax.stop_gradient((x.astype(jnp.float32), condition))
    noise = jax.random.normal(for_noise, x.shape)
    t = flow.draw_time(for_time, len(x), recipe.time_mean)
    guidance = flow.draw_guidance(for_guidance, len(x), recipe.guidance_range)
    x_t, target = flow.interpolate(x, noise, t)
    context = Context(condition, txt, pooled, guidance, batch.pe)
    mod = conditioning.modulation(models.flux, t, context)
    out = conditioning.velocity(models.flux, x_t, mod, context)
    weight = share if recipe.loss_region == "target" else jnp.ones_like(share)
    return flow.masked_loss(out, target, weight)


def learning_rate(lr, warmup):
    """The rate of update number n, counted from 0: a linear warm-up, then constant."""
    return lambda n: lr * jnp.minimum((n + 1) / (warmup + 1), 1)


def make_optimizer(rate, clip):
    """Adam without decay behind a clip of the global norm (lzyhha/VisualCloze:train.py)."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate, b1=0.9, b2=0.999))


def make_step(tx, loss, places):
    """Two jitted functions: add a micro-batch's gradient; apply the mean of the sum so far.

    The frozen weights are an argument, never state. `places` are the shardings of (trainable,
    optimizer state): they stay as they are. A loss or gradient that is not finite changes nothing:
    the loop stops when it reads the metrics.
    """
    weights, moments = places

    @partial(jax.jit, donate_argnums=2, out_shardings=(None, weights))
    def accumulate(trainable, frozen, grads, batch, key):
        value, new = jax.value_and_grad(loss)(trainable, frozen, batch=batch, key=key)
        return value, jax.tree.map(jnp.add, grads, new)

    @partial(
        jax.jit, donate_argnums=(0, 1, 2), out_shardings=(weights, moments, weights, None, None)
    )
    def update(trainable, opt, grads, losses):
        mean = jax.tree.map(lambda g: g / len(losses), grads)
        norm, value = optax.tree.norm(mean), jnp.stack(losses).mean()
        updates, new = tx.update(mean, opt, trainable)
        new = optax.apply_updates(trainable, updates), new
        fine = jnp.isfinite(norm) & jnp.isfinite(value)
        trainable, opt = jax.tree.map(partial(jnp.where, fine), new, (trainable, opt))
        return trainable, opt, jax.tree.map(jnp.zeros_like, grads), value, norm

    return accumulate, update


class Sent(NamedTuple):
    """A step that the devices work on: what its metrics will be."""

    step: int
    loss: jax.Array
    grad_norm: jax.Array
    start: float  # when it was sent, in seconds of time.perf_counter


class Trainer:
    """What is learnt: its state on the mesh, and the step that changes it.

    `parts` is (graphdef, trainable, frozen), the trees pure dicts by model. Only the trainable one
    and the optimizer's state change.
    """

    def __init__(self, parts, preset, tokenizers, mesh, masks_every_row=False):
        self.graphdef, trainable, self.frozen = parts
        self.preset, self.recipe = preset, preset.recipe
        self.rate = learning_rate(self.recipe.lr, self.recipe.warmup)
        self.mesh, self.ended = mesh, 0.0
        self.make_batch = partial(
            make_batch,
            tokenizers=tokenizers,
            preset=preset,
            mesh=mesh,
            masks_every_row=masks_every_row,
        )
        tx = make_optimizer(self.rate, self.recipe.clip)
        loss = partial(
            loss_fn, graphdef=self.graphdef, recipe=self.recipe, dtype=compute_dtype(mesh)
        )
        places = shardings((trainable, jax.eval_shape(tx.init, trainable)), mesh)
        self.accumulate, self.update = make_step(tx, loss, places)
        self.step = 0
        self.state = trainable, jax.jit(tx.init, out_shardings=places[1])(trainable)
        self.grads = jax.jit(zeros_like, out_shardings=places[0])(trainable)

    def models(self):
        """The four networks as they are now."""
        return nnx.merge(self.graphdef, self.state[0], self.frozen)

    def send(self, micro_batches):
        """Send the next optimizer step to the devices -> Sent."""
        start, losses, recipe = time.perf_counter(), [], self.recipe
        micro = recipe.batch // recipe.micro_batch
        for i in range(self.step * micro, (self.step + 1) * micro):
            key = jax.random.fold_in(jax.random.key(recipe.seed), i)
            args = self.state[0], self.frozen, self.grads, self.make_batch(next(micro_batches)), key
            with jax.set_mesh(self.mesh):
                loss, self.grads = self.accumulate(*args)
            losses.append(loss)
        trainable, opt, self.grads, loss, norm = self.update(*self.state, self.grads, losses)
        self.state, self.step = (trainable, opt), self.step + 1
        return Sent(self.step, loss, norm, start)

    def measure(self, sent):
        """Wait for a step -> its metrics. FloatingPointError if they are not finite."""
        loss, norm = float(sent.loss), float(sent.grad_norm)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"step {sent.step}: loss {loss}, gradient norm {norm}; nothing of this step was "
                "kept: lower --lr, or look at the data of that step"
            )
        # It was sent while the step before it ran: its own time begins where that ended.
        start, self.ended = max(sent.start, self.ended), time.perf_counter()
        seconds, lr = round(self.ended - start, 4), float(self.rate(sent.step - 1))
        return dict(step=sent.step, loss=loss, grad_norm=norm, lr=lr, seconds=seconds)


def train(trainer, micro_batches, write, preview, save, stopped):
    """The loop: send a step to the devices, write the metrics of the one before it while they
    work; preview, save and stop where that is due.

    `write(metrics)`, `preview()` and `save()` are the run folder's; `stopped()` is asked before
    every step. All steps that were sent are written and saved when it returns.
    """
    recipe, sent, saved = trainer.recipe, None, trainer.step
    if trainer.step == 0:
        preview()
    while trainer.step < recipe.steps and not stopped():
        before, sent = sent, trainer.send(micro_batches)
        if before:
            write(trainer.measure(before))
        preview_is_due = trainer.step % recipe.preview_every == 0 or trainer.step == recipe.steps
        save_is_due = trainer.step % recipe.save_every == 0 or trainer.step == recipe.steps
        if preview_is_due or save_is_due:
            write(trainer.measure(sent))
            sent = None
        if preview_is_due:
            preview()
        if save_is_due:
            save()
            saved = trainer.step
    if sent:
        write(trainer.measure(sent))
    if saved < trainer.step:
        save()


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def preview_sheet(painter, examples):
    """Examples painted from always the same noise, each beside its truth: uint8 [H, W, 3]."""
    preset = painter.preset
    how = preset.num_inference_steps, preset.guidance_scale
    specs = [Spec(*example, *how, seed) for seed, example in enumerate(examples)]
    pairs = [
        np.concatenate([canvas.spec.grid.compose(canvas.pixels), canvas.spec.grid.compose()], 1)
        for canvas in painter(specs)
    ]
    return np.concatenate(pairs)
