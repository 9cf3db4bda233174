"""Grids -> latents -> pictures: shared by sample.py, previews, evaluation and the library.

Grids are grouped by token bucket and step count, padded on the right, and painted as batches; the
result of one does not depend on the others.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import flax
import jax
import numpy as np
from tqdm import tqdm

from vcloze_jax import __version__, conditioning, flow
from vcloze_jax.ops import unpack
from vcloze_jax.sharding import batch_sharding

MAX_BATCH = 32  # grids per device and call


@dataclass(frozen=True)
class Job:
    """One grid to paint. `noise` is float32 [S, 64] at t = 1; None draws it from the seed."""

    grid: object
    prompt: str
    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    noise: np.ndarray | None = None


@dataclass(frozen=True)
class Painted:
    """A painted query row and how it came about."""

    pixels: np.ndarray  # uint8 [h, C*w, 3]
    latents: np.ndarray  # float32 [S, 64] at t = 0
    record: dict  # tokens, dropped_tokens, seconds of its batch by part, compiles, versions


class Painter:
    """The models of a preset on a mesh, and the compiled parts of sampling."""

    def __init__(self, preset, models, tokenizers, mesh):
        self.preset, self.models, self.tokenizers = preset, models, tokenizers
        self.mesh = mesh
        self.dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.encode_text = jax.jit(conditioning.encode_text, static_argnums=4)
        self.encode_condition = jax.jit(conditioning.encode_condition, static_argnums=3)
        self.modulate = jax.jit(modulate_steps)
        self.step = jax.jit(euler_step, donate_argnums=1)
        self.decode = jax.jit(decode)

    @property
    def compiles(self):
        """Programs compiled so far."""
        jitted = (self.encode_text, self.encode_condition, self.modulate, self.step, self.decode)
        return sum(f._cache_size() for f in jitted)

    def __call__(self, jobs, progress=lambda steps, label: steps):
        """Paint every job -> list of Painted, in order.

        `progress(steps, label)` wraps the Euler steps of each batch. Raises FloatingPointError if
        a picture is not finite.
        """
        groups = defaultdict(list)
        for i, job in enumerate(jobs):
            groups[self.bucket(job.grid.tokens), job.num_inference_steps].append(i)
        painted = [None] * len(jobs)
        size = MAX_BATCH * self.shards
        for (bucket, steps), members in groups.items():
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                bar = progress(range(steps), f"{len(batch)} x {bucket} tokens")
                results = self.paint_batch([jobs[i] for i in batch], bucket, bar)
                for i, result in zip(batch, results, strict=True):
                    painted[i] = result
        return painted

    def bucket(self, tokens):
        """Tokens padded to: cells of the preset's resolution, by 2, 4, 6, then steps of a third."""
        unit = 2 * (self.preset.resolution // 16) ** 2
        size = 1
        while size * unit < tokens:
            size += max(1, size // 3)
        return size * unit

    def paint_batch(self, jobs, bucket, steps):
        """Jobs of one bucket and step count -> their Painted."""
        count, seconds, m = len(jobs), {}, self.models
        jobs = jobs + jobs[:1] * (-count % self.shards)  # copies fill the mesh and are dropped
        with timed(seconds, "encode"):
            t5_ids, clip_ids, dropped = self.tokenizers([job.prompt for job in jobs])
            condition = np.stack([pad(self.condition(job.grid), bucket) for job in jobs])
            inputs = (t5_ids, clip_ids, condition, *self.inputs(jobs, bucket))
            t5_ids, clip_ids, condition, x, times, guidance, pe, lengths = jax.device_put(
                inputs, batch_sharding(self.mesh)
            )
            txt, pooled = self.encode_text(m.t5, m.clip, t5_ids, clip_ids, self.dtype)
            mods = jax.block_until_ready(self.modulate(m.flux, times, guidance, pooled))
        with timed(seconds, "paint"):
            for i in steps:
                x = self.step(m.flux, x, condition, txt, mods, pe, lengths, times, i)
                x.block_until_ready()
            latents = np.asarray(x, np.float32)
        with timed(seconds, "decode"):
            rows = [self.pixels(job.grid, z) for job, z in zip(jobs[:count], latents, strict=False)]
        record = dict(seconds=seconds, compiles=self.compiles, versions=versions())
        text = self.preset.t5.max_length
        return [
            Painted(
                pixels=row,
                latents=z[: job.grid.tokens],
                record=dict(
                    tokens=dict(image=job.grid.tokens, text=text, bucket=bucket),
                    dropped_tokens=drop,
                    **record,
                ),
            )
            for row, z, job, drop in zip(rows, latents, jobs, dropped, strict=False)
        ]

    def condition(self, grid):
        """Condition tokens of one grid, row by row at exact width: [S, 320]."""
        rows = [
            self.encode_condition(self.models.vae, row.pixels[None], row.mask[None], self.dtype)[0]
            for row in grid.rows
        ]
        return np.concatenate([np.asarray(row) for row in rows])

    def inputs(self, jobs, bucket):
        """Noise, times, guidance, positions and lengths of a batch, on the host."""
        c = self.preset
        noise = [
            jax.random.normal(jax.random.key(job.seed), (job.grid.tokens, 64))
            if job.noise is None
            else job.noise
            for job in jobs
        ]
        times = [flow.schedule(j.num_inference_steps, j.grid.tokens, c.flow) for j in jobs]
        grids, T = [job.grid for job in jobs], c.t5.max_length
        return (
            np.stack([pad(np.asarray(x, np.float32), bucket) for x in noise]),  # B S 64
            np.stack(times),  # B N+1
            np.array([job.guidance_scale for job in jobs], np.float32),  # B
            conditioning.position_table(grids, c.flux, T, bucket),  # B L 1 K/2, twice
            np.array([T + grid.tokens for grid in grids], np.int32),  # B
        )

    def pixels(self, grid, z):
        """The query row of latents z [S, 64] as uint8 [h, C*w, 3]."""
        row = grid.query
        h, w = row.height // 8, row.width // 8
        start = grid.tokens - h * w // 4
        z = z[None, start : grid.tokens].astype(self.dtype)
        return conditioning.to_pixels(self.decode(self.models.vae, unpack(z, h, w))[0])


def modulate_steps(flux, times, guidance, pooled):
    """The modulations of all steps at once; leaves get a leading axis N."""
    at = lambda t: flux.modulation(t, guidance, pooled)  # noqa: E731
    return jax.vmap(at)(times[:, :-1].T)


def euler_step(flux, x, condition, txt, mods, pe, lengths, times, i):
    """Step i of x float32 [B, S, 64]."""
    mod = jax.tree.map(lambda leaf: leaf[i], mods)
    velocity = conditioning.velocity(flux, x, condition, txt, mod, pe, lengths)
    return flow.euler(x, velocity, times[:, i], times[:, i + 1])


def decode(vae, z):
    return vae.decode(z)


def versions():
    """What a picture's bytes depend on, beside the spec and the weights."""
    return {"vcloze_jax": __version__, "jax": jax.__version__, "flax": flax.__version__}


def bar(steps, label):
    """The Euler steps of one batch as a progress bar."""
    return tqdm(steps, desc=label, unit="step", dynamic_ncols=True)


def pad(x, bucket):
    """Rows of zeros after x [S, D] up to `bucket`."""
    return np.pad(x, ((0, bucket - len(x)), (0, 0)))


@contextmanager
def timed(seconds, part):
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 4)
