"""The training run: models and state on the mesh, the loop, resume, previews, the result."""

import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from vcloze_jax.conditioning import Models
from vcloze_jax.config import UserError
from vcloze_jax.data.sources import micro_batch, micro_batches
from vcloze_jax.inputs.pictures import save_png
from vcloze_jax.inputs.runfolder import Log, Stop, create
from vcloze_jax.model.text import Tokenizers
from vcloze_jax.painter import Job, Painter
from vcloze_jax.sharding import compute_dtype, put, shardings
from vcloze_jax.storage import adapters, checkpoint, weights
from vcloze_jax.trainer import learning_rate, loss_fn, make_batch, make_optimizer, make_step

PREVIEWS = 4  # held-out grids


def build(settings, preset, folder, mesh, dtype):
    """All models on the mesh: graphdef, trainable and frozen trees (pure dicts by model).

    Trainable, in float32: the adapter; with rank 0 the MMDiT; from scratch the text encoders too.
    The rest is frozen, in the compute dtype, and comes from the weights folder.
    """
    if settings.lora:  # first, since it may be refused
        adapter = adapters.load(Path(settings.lora), preset.flux)
        rank = adapters.fit(Path(settings.lora), adapter, preset.flux).rank
        if rank != settings.rank:
            raise UserError(f"{settings.lora}: its rank is {rank}, not {settings.rank}; set --rank")
    scratch = ("flux", "t5", "clip") if settings.from_scratch else ()
    ranked = replace(preset, flux=replace(preset.flux, rank=settings.rank))
    chosen = nnx.LoRAParam if settings.rank else lambda path, _: path[0] in (scratch or ("flux",))

    def born(key):
        _, trainable, _ = nnx.split(Models(ranked, rngs=nnx.Rngs(params=key)), chosen, ...)
        return nnx.to_pure_dict(trainable)

    models = jax.eval_shape(lambda: Models(ranked, rngs=nnx.Rngs(0)))
    graphdef, _, _ = nnx.split(models, chosen, ...)
    key = jax.random.key(settings.seed)
    trainable = jax.eval_shape(born, key)
    frozen = {}
    for name, (module, _) in weights.MODELS.items():
        if name not in scratch:
            exact = "float32" if name in trainable and not settings.rank else dtype
            place = partial(shardings, mesh=mesh, root=f"{name}/")
            model = weights.load(module, getattr(preset, name), folder, exact, place)
            frozen[name] = nnx.to_pure_dict(nnx.state(model))
    if settings.lora:
        trainable = put({"flux": adapter}, mesh)
    elif settings.rank or scratch:
        trainable = jax.jit(born, out_shardings=shardings(trainable, mesh))(key)
    else:
        trainable = {"flux": frozen.pop("flux")}
    return graphdef, trainable, frozen


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


class Run:
    """A training run in its folder: models, state, and everything that it writes.

    `source` and `held_out` give grids (data/sources.py); `folder` holds weights and tokenizers.
    """

    def __init__(self, out, settings, preset, folder, mesh, source, held_out):
        self.out, self.settings, self.preset = Path(out), settings, preset
        self.folder, self.mesh, self.source = folder, mesh, source
        self.dtype = compute_dtype(mesh)
        self.tokenizers = Tokenizers(folder, preset.t5, preset.clip)
        self.graphdef, trainable, self.frozen = build(settings, preset, folder, mesh, self.dtype)
        self.rate = learning_rate(settings.lr, preset.train.warmup)
        tx = make_optimizer(self.rate, preset.train.clip)
        loss = partial(
            loss_fn,
            graphdef=self.graphdef,
            preset=preset,
            region=settings.loss_region,
            dtype=self.dtype,
        )
        places = shardings((trainable, jax.eval_shape(tx.init, trainable)), mesh)
        self.accumulate, self.update = make_step(tx, loss, places)
        self.state = trainable, jax.jit(tx.init, out_shardings=places[1])(trainable)
        self.grads = jax.jit(zeros, out_shardings=places[0])(trainable)
        create(self.out, settings)  # after all that the user may have to correct
        self.step, self.pending = self.resume(), None
        self.saved, self.reported = self.step, time.perf_counter()
        self.log = Log(self.out / "metrics.jsonl", self.step)
        self.examples = micro_batch(held_out, seed=0, index=0, size=PREVIEWS)
        self.painter = Painter(preset, None, self.tokenizers, mesh)

    def resume(self):
        """Take up the newest intact checkpoint, if there is one; returns its step."""
        folder = self.out / "checkpoints"
        checkpoint.check_space(folder, self.state)
        checkpoint.clean(folder)
        if checkpoint.latest(folder) is None:
            return 0
        step, self.state = checkpoint.restore(folder, self.state)
        return step

    def train(self):
        """Train to the last step; returns the exit code."""
        s = self.settings
        if self.step == s.steps:
            print(f"{self.out}: finished at step {self.step}; a larger --steps goes on")
            return 0
        bar = tqdm(total=s.steps, initial=self.step, unit="step", dynamic_ncols=True)
        with Stop() as stop, bar as self.bar:
            if self.step == 0:
                self.preview()
            self.loop(stop)
            if self.step == s.steps:
                self.finish()
            self.save()  # after all else: a run whose last step is saved is complete
        if self.step == s.steps:
            print(f"{self.out}: finished, {'lora.safetensors' if s.rank else 'weights'} written")
            return 0
        print(f"{self.out}: stopped at step {self.step}, saved; the same command resumes")
        return stop.code

    def loop(self, stop):
        """Steps, previews and saves, to the last step or the next after a signal."""
        s = self.settings
        first, last = (step * s.batch // s.micro_batch for step in (self.step, s.steps))
        batches = micro_batches(self.source, s.seed, s.micro_batch, first, last)
        while self.step < s.steps and stop.code is None:
            before, self.pending = self.pending, self.advance(batches)
            self.report(before)  # while the devices work on the step just sent
            if self.step % s.preview_every == 0 or self.step == s.steps:
                self.preview()
            if self.step % s.save_every == 0 and self.step < s.steps:
                self.save()
        self.flush()

    def advance(self, batches):
        """Send one optimizer step to the devices; returns what `report` needs of it."""
        start, losses = time.perf_counter(), []
        micro = self.settings.batch // self.settings.micro_batch
        for i in range(self.step * micro, (self.step + 1) * micro):
            key = jax.random.fold_in(jax.random.key(self.settings.seed), i)
            batch = self.to_devices(next(batches))
            args = self.state[0], self.frozen, self.grads, batch, key
            with jax.set_mesh(self.mesh):
                loss, self.grads = self.accumulate(*args)
            losses.append(loss)
        trainable, opt, self.grads, loss, norm = self.update(*self.state, self.grads, losses)
        self.state, self.step = (trainable, opt), self.step + 1
        return self.step, loss, norm, start

    def to_devices(self, examples):
        any_row = self.source.masks_every_row
        return make_batch(examples, self.tokenizers, self.preset, self.mesh, any_row)

    def flush(self):
        """Wait for the step just sent and write its metrics."""
        self.report(self.pending)
        self.pending = None

    def save(self):
        """Write a checkpoint, of a step whose metrics are written, unless that is done."""
        self.flush()
        if self.saved < self.step:
            checkpoint.save(self.out / "checkpoints", self.step, self.state)
            self.saved = self.step

    def report(self, pending):
        """Write one step's metrics; stop the run if they are not finite."""
        if pending is None:
            return
        step, loss, norm, start = pending
        loss, norm = float(loss), float(norm)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"{self.out}: step {step}: loss {loss}, gradient norm {norm}; nothing of this "
                "step was kept: lower --lr, or look at the data of that step"
            )
        # The step was sent while the one before it ran: its own time begins where that ended.
        start, self.reported = max(start, self.reported), time.perf_counter()
        record = dict(step=step, loss=loss, grad_norm=norm, lr=float(self.rate(step - 1)))
        self.log.write(record | dict(seconds=round(self.reported - start, 4)))
        self.bar.set_postfix(loss=f"{loss:.4f}", grad=f"{norm:.3f}", refresh=False)
        self.bar.update()

    def models(self):
        return nnx.merge(self.graphdef, self.state[0], self.frozen)

    def preview(self):
        """Paint the same held-out grids from the same noise: painted left, truth right."""
        self.flush()
        self.painter.models = self.models()
        c = self.preset
        jobs = [
            Job(grid, prompt, c.num_inference_steps, c.guidance_scale, seed)
            for seed, (grid, prompt) in enumerate(self.examples)
        ]
        painted = self.painter(jobs)
        sheets = [
            np.concatenate([job.grid.compose(result.pixels), job.grid.compose()], 1)
            for job, result in zip(jobs, painted, strict=True)
        ]
        save_png(self.out / "previews" / f"{self.step:06d}.png", np.concatenate(sheets))

    def finish(self):
        """Write what was trained: the adapter, or the models as a weights folder."""
        if self.settings.rank:
            adapters.save(self.out / "lora.safetensors", self.state[0]["flux"])
            return
        models = self.models()
        parts = {name: getattr(models, name) for name in weights.MODELS}
        weights.save_pipeline(self.out / "weights", self.preset, parts)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(self.folder / name, self.out / "weights" / name, dirs_exist_ok=True)
