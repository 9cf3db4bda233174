"""One training step: a micro-batch on the devices, its masked loss, the optimizer's update."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vcloze_jax import conditioning, flow
from vcloze_jax.sharding import batch_sharding


class Batch(NamedTuple):
    """A micro-batch on the devices; all grids of one shape."""

    rows: tuple  # of (pixels uint8 [B, h, W, 3], mask bool [B, h, W] or None)
    t5_ids: jax.Array  # int32 [B, T]
    clip_ids: jax.Array  # int32 [B, 77]
    pe: tuple  # cos, sin float32 [1, T + S, 1, K/2]


def make_batch(examples, tokenizers, preset, mesh, any_row):
    """Examples of one grid shape -> Batch. Rows that are never masked carry no mask at all."""
    grids = [example.grid for example in examples]
    rows = []
    for r, row in enumerate(zip(*(grid.rows for grid in grids), strict=True)):
        maskable = any_row or r == len(grids[0].rows) - 1
        mask = np.stack([x.mask for x in row]) if maskable else None
        rows.append((np.stack([x.pixels for x in row]), mask))
    t5_ids, clip_ids, _ = tokenizers([example.prompt for example in examples])
    T, S = preset.t5.max_length, grids[0].tokens
    pe = conditioning.position_table(grids[:1], preset.flux, T, S)
    batch = jax.device_put((tuple(rows), t5_ids, clip_ids), batch_sharding(mesh))
    return Batch(*batch, pe)


def loss_fn(trainable, frozen, graphdef, preset, region, dtype, batch, key):
    """Masked flow-matching loss of a micro-batch (paper, section 3; facts of train.py)."""
    models = nnx.merge(graphdef, trainable, frozen)
    for_vae, for_noise, for_time, for_guidance = jax.random.split(key, 4)
    txt, pooled = conditioning.encode_text(
        models.t5, models.clip, batch.t5_ids, batch.clip_ids, dtype
    )
    x, condition, share = conditioning.encode_training(
        models.vae, batch.rows, preset.flow.mask_fill, for_vae, dtype
    )
    x, condition = jax.lax.stop_gradient((x.astype(jnp.float32), condition))
    noise = jax.random.normal(for_noise, x.shape)
    t = flow.draw_time(for_time, len(x), preset.flow.time_mean)
    guidance = flow.draw_guidance(for_guidance, len(x), preset.flow.guidance_range)
    x_t, target = flow.interpolate(x, noise, t)
    mod = models.flux.modulation(t, guidance, pooled)
    out = conditioning.velocity(models.flux, x_t, condition, txt, mod, batch.pe)
    weight = share if region == "target" else jnp.ones_like(share)
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
