"""The training loop, and what it trains. Models come as trees, grids as examples; others write."""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vcloze_jax import step
from vcloze_jax.sharding import compute_dtype, shardings


class Sent(NamedTuple):
    """A step that the devices work on: what its metrics will be made of."""

    step: int
    start: float  # when it was sent, in seconds of time.perf_counter
    lr: float
    shapes: list[tuple[int, int]]  # of each grid, how many rows and tokens
    told: list[dict[str, jax.Array]]  # of every micro-batch, [B]: losses by region, time, kind
    norms: dict[str, jax.Array]  # of the gradient, by kind of block
    skipped: jax.Array
    failed: jax.Array


class Trainer:
    """What is learnt: its State on the mesh, and the programs that change it.

    `parts` is (graphdefs, trainable, frozen) by model, the trees dicts (weights.by_layer). With a
    rank only flux is trainable, its lora_a, lora_b and lora_bias; the base, flux too, is frozen,
    with no other adapter in it. What is trainable is given away. `step` counts the steps sent.
    """

    def __init__(self, parts, preset, tokenizers, mesh, tx, masks_every_row=False):
        self.graphdefs, trainable, self.frozen = parts
        self.preset, self.mesh, self.dtype = preset, mesh, compute_dtype(mesh)
        # rowmemory.choose_readers may put others in place of both readers; on one CPU, of rows.
        self.tokenizers = self.read_prompts = tokenizers
        how = dict(masks_every_row=masks_every_row, placement=preset.flux.placement)
        self.read_rows = partial(step.spread_rows, mesh=mesh, **how)
        self.recipe = recipe = preset.recipe
        statics = dict(graphdefs=self.graphdefs, dtype=self.dtype)
        loss = partial(step.loss_fn, region=recipe.loss_region, **statics)
        init = partial(step.init_state, tx=tx, ema=recipe.ema)
        layout = shardings(jax.eval_shape(init, trainable), mesh)
        accumulate, update = step.make_step(tx, loss, layout, recipe.ema, recipe.skip_nonfinite)
        encode = jax.jit(partial(step.encode_batch, preset=preset, **statics))
        self.jitted = {"encode": encode, "accumulate": accumulate, "update": update}
        self.programs, self.micro = {}, recipe.micro_batch
        self.state = jax.jit(init, out_shardings=layout, donate_argnums=0)(trainable)
        self.grads = jax.tree.map(jnp.zeros_like, self.state.trainable)
        self.step, self.ended = 0, 0.0

    @property
    def learnt(self):
        """What training is for: the trainable trees, or their average where there is one."""
        return self.state.average or self.state.trainable

    def models(self):
        """The four networks as they are now."""
        return step.merge_models(self.graphdefs, self.learnt, self.frozen)

    def program(self, name, shape, *args):
        """The program of some inputs' shape, compiled when it is first asked for."""
        if (name, shape) not in self.programs:
            with jax.set_mesh(self.mesh):
                self.programs[name, shape] = self.jitted[name].lower(*args).compile()
        return self.programs[name, shape]

    def encode(self, examples, numbers, key):
        """Grids of one shape, by their numbers in the run -> NoisyBatch on the mesh."""
        how = self.read_rows, self.read_prompts, self.preset, self.mesh
        args = self.frozen, step.make_batch(examples, numbers, *how), key
        shape = next((x.grid.shape, x.grid.columns) for x in examples if x)
        return self.program("encode", shape, *args)(*args)

    def send(self, groups, stopped=lambda: False):
        """Send the next optimizer step to devices -> Sent: groups of grids, of one shape each, in
        micro-batches. None if `stopped()` between two: what was done is lost, no more is sent."""
        start, recipe = time.perf_counter(), self.recipe
        key, shapes, told = step.purpose_key(recipe.seed, "draws"), [], []
        for first in range(self.step * recipe.batch, (self.step + 1) * recipe.batch, recipe.group):
            group = next(groups)
            shapes += [next((len(x.grid.rows), x.grid.tokens) for x in group if x)] * recipe.group
            for i in range(0, recipe.group, self.micro):
                if stopped():
                    return None
                numbers = range(first + i, first + i + self.micro)
                noisy = self.encode(group[i : i + self.micro], numbers, key)
                args = self.state.trainable, self.frozen, self.grads, noisy
                of_grids, self.grads = self.program("accumulate", noisy.x_t.shape, *args)(*args)
                told.append(of_grids)
        rate = np.float32(step.learning_rate(recipe, self.step))
        args = self.state, self.grads, [each[recipe.loss_region] for each in told], rate
        self.state, self.grads, norms = self.program("update", (), *args)(*args)
        self.step += 1
        counts = jnp.copy(self.state.skipped), jnp.copy(self.state.failed)  # the state is donated
        return Sent(self.step, start, float(rate), shapes, told, norms, *counts)

    def wait(self, sent):
        """Wait for a step -> the seconds that it took. FloatingPointError if it is one more that is
        not finite than may be skipped: the trainer is then as it was before that step."""
        if sent.failed:  # to read it is to wait
            loss = np.mean([np.asarray(each[self.recipe.loss_region]) for each in sent.told])
            self.step, self.state = sent.step - 1, self.state._replace(failed=np.bool_(False))
            remedy = "the state before it is saved: go on" if self.step else "begin again"
            raise FloatingPointError(
                f"step {sent.step}: loss {loss}, gradient norm {sent.norms['all']}; {remedy} with "
                "a lower --lr or with --skip-nonfinite 1, or look at the data of that step"
            )
        # It was sent while the step before it ran: its own time begins where that ended.
        start, self.ended = max(sent.start, self.ended), time.perf_counter()
        return self.ended - start


def train(trainer, groups, writer):
    """The loop: send a step to the devices, write what is known of the one before it while they
    work; preview, save and stop where that is due.

    `writer` does what has to do with files: write(sent, seconds), preview(), save(); stopped() is
    asked before every micro-batch, annotate(step) is around its sending; any_host(flag) is whether
    it holds on one of them. All steps that were sent are written and saved in the end.
    """
    recipe, sent, saved, saved_at = trainer.recipe, None, trainer.step, time.monotonic()
    while trainer.step < recipe.steps and not writer.stopped():
        with writer.annotate(trainer.step + 1):
            before, sent = sent, trainer.send(groups, writer.stopped)
        if before:
            writer.write(before, trainer.wait(before))
        if sent is None:
            break
        last, minutes = sent.step == recipe.steps, (time.monotonic() - saved_at) / 60
        preview_is_due = last or sent.step == 1 or sent.step % recipe.preview_every == 0
        save_is_due = last or sent.step % recipe.save_every == 0
        save_is_due |= recipe.save_minutes > 0 and writer.any_host(minutes > recipe.save_minutes)
        if preview_is_due or save_is_due:
            writer.write(sent, trainer.wait(sent))
            sent = None
        if preview_is_due:
            writer.preview()
        if save_is_due:
            writer.save()
            saved, saved_at = trainer.step, time.monotonic()
    if sent:
        writer.write(sent, trainer.wait(sent))
    if saved < trainer.step:
        writer.save()
