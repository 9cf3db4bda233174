"""Grids -> latents -> pictures: shared by sample.py, previews, evaluation and the library.

All grids go through one stage before the next begins: texts, condition latents, Euler steps,
pictures; then through all but the first again where a second pass is asked for. For the steps,
grids are grouped by token bucket and number of steps, padded on the right, and painted as batches;
the result of one does not depend on the others.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import flax
import jax
import numpy as np
from tqdm import tqdm

from vcloze_jax import __version__, conditioning, flow
from vcloze_jax.grid import Grid, bucket
from vcloze_jax.model.ops import unpack
from vcloze_jax.programs import Programs
from vcloze_jax.sharding import batch_sharding, compute_dtype
from vcloze_jax.upsample import Upsampling

PARTS = ("load", "text", "vae", "compile", "paint", "decode")  # of the seconds in a record
BATCH_TOKENS = 2**13  # image tokens per device and call: enough to keep any accelerator busy


@dataclass(frozen=True, eq=False)
class Job:
    """One grid to paint. `noise` is float32 [S, 64] at t = 1; None draws it from the seed.

    With a `strength` it is a second pass: the masked pixels of its grid are what to start from.
    """

    grid: Grid
    prompt: str
    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    noise: np.ndarray | None = None
    upsampling: Upsampling | None = None
    content_prompt: str = ""  # bare; all that the second pass is told
    strength: float | None = None

    def times(self, c):
        """Times of its Euler steps, float32 [N + 1]."""
        return flow.schedule(self.num_inference_steps, self.grid.tokens, c, self.strength or 1.0)

    def draw(self):
        """Its noise, float32 [S, 64]: drawn without padding, so that no bucket changes it."""
        if self.noise is not None:
            return self.noise
        return np.asarray(jax.random.normal(jax.random.key(self.seed), (self.grid.tokens, 64)))

    def second_passes(self, targets):
        """The jobs of the second pass over its painted targets, if it asks for one."""
        up = self.upsampling
        if up is None:
            return []
        rest = (self.content_prompt, up.num_inference_steps, self.guidance_scale, self.seed)
        return [Job(up.grid(t), *rest, noise=up.noise, strength=up.strength) for t in targets]


@dataclass(frozen=True)
class Painted:
    """A painted query row and how it came about."""

    pixels: np.ndarray  # uint8 [h, C*w, 3]
    latents: np.ndarray  # float32 [S, 64] at t = 0
    targets: list[np.ndarray]  # uint8 [h, w, 3] each, in column order, upsampled if asked for
    record: dict  # tokens, dropped_tokens, seconds by part, compiles, versions


class Text(NamedTuple):
    """One prompt as the MMDiT reads it."""

    txt: np.ndarray  # [T, text_width]
    pooled: np.ndarray  # [vec_width]
    dropped: dict  # tokens lost, by encoder
    seconds: Counter


class Inputs(NamedTuple):
    """One grid as the MMDiT reads it."""

    condition: np.ndarray  # float32 [S, 320]
    x: np.ndarray  # float32 [S, 64] at the first time
    times: np.ndarray  # float32 [N + 1]
    seconds: Counter

    @property
    def steps(self):
        return len(self.times) - 1


class Painter:
    """The models of a preset on a mesh, and the compiled parts of sampling.

    `models` has the attributes flux, vae, t5 and clip; each is asked for where its stage begins,
    and the text encoders are let go at the end of theirs. `remember(encode, t5_ids, clip_ids)`
    may know what `encode(t5_ids, clip_ids)` would say.
    """

    def __init__(
        self, preset, models, tokenizers, mesh, remember=lambda encode, *ids: encode(*ids)
    ):
        self.preset, self.models, self.tokenizers = preset, models, tokenizers
        self.mesh, self.remember = mesh, remember
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.dtype = dtype = compute_dtype(mesh)
        self.programs = Programs()
        jit = self.programs.jit
        self.encode_text = jit(partial(conditioning.encode_text, dtype=dtype))
        self.encode_condition = jit(partial(conditioning.encode_condition, dtype=dtype))
        self.encode_picture = jit(partial(conditioning.encode_picture, dtype=dtype))
        self.modulate = jit(modulate_steps)
        self.at_step = jit(at_step)
        # The mesh's way of lying is said, or the second step would be another program.
        self.step = jit(euler_step, donate_argnums=1, out_shardings=batch_sharding(mesh))
        self.decode = jit(decode, static_argnums=(2, 3))

    @property
    def compiles(self):
        """Programs compiled so far."""
        return self.programs.count

    def __call__(self, jobs, progress=lambda steps, label: steps):
        """Paint every job -> list of Painted, in order.

        `progress(steps, label)` wraps the Euler steps of each batch. Raises FloatingPointError if
        a picture is not finite.
        """
        prompts = [job.prompt for job in jobs]
        texts = self.read(prompts + [job.content_prompt for job in jobs if job.upsampling])
        painted = self.paint(jobs, texts, progress)
        again = [job.second_passes(p.targets) for job, p in zip(jobs, painted, strict=True)]
        upsampled = iter(self.paint(sum(again, []), texts, progress))
        shared = {"compiles": self.compiles, "versions": versions()}
        return [
            joined(p, [next(upsampled) for _ in passes], shared)
            for p, passes in zip(painted, again, strict=True)
        ]

    def read(self, prompts):
        """Prompt -> Text, one at a time, so that none depends on the others."""
        prompts = list(dict.fromkeys(prompts))
        encoders, texts = [], {}

        def encode(*ids):
            if not encoders:
                with self.programs.timed(seconds, "load"):
                    encoders.extend([self.models.t5, self.models.clip])
            with self.programs.timed(seconds, "text"):
                return [np.asarray(x)[0] for x in self.encode_text(*encoders, *ids)]

        for prompt, t5, clip, lost in zip(prompts, *self.tokenizers(prompts), strict=True):
            seconds = Counter()
            texts[prompt] = Text(*self.remember(encode, t5[None], clip[None]), lost, seconds)
        return texts

    def paint(self, jobs, texts, progress):
        """One pass over all jobs -> list of Painted, in order."""
        texts = [texts[job.prompt] for job in jobs]
        inputs = [self.encode(job) for job in jobs]
        latents = [None] * len(jobs)
        for size, members, batch in self.batches(inputs):
            label = f"{len(members)} x {size} tokens" + ", upsampling" * bool(jobs[0].strength)
            bar = progress(range(inputs[batch[0]].steps), label)
            parts = ([items[i] for i in batch] for items in (jobs, texts, inputs))
            results, seconds = self.paint_batch(*parts, size, bar)
            for i, z in zip(members, results, strict=False):
                latents[i] = z[: jobs[i].grid.tokens]
                inputs[i].seconds.update(seconds)
        return list(map(self.finish, jobs, texts, inputs, latents))

    def encode(self, job):
        """What the MMDiT reads of one grid, whose rows are encoded one by one at exact width."""
        seconds, rows, second = Counter(), job.grid.rows, job.strength is not None
        with self.programs.timed(seconds, "load"):
            vae = self.models.vae
        with self.programs.timed(seconds, "vae"):
            fill = np.float32(conditioning.GREY if second else conditioning.BLACK)
            tokens = [self.encode_condition(vae, r.pixels[None], r.mask[None], fill) for r in rows]
            condition = np.concatenate([np.asarray(t[0], np.float32) for t in tokens])
            x, times = job.draw(), job.times(self.preset.flow)
            if second:
                (row,) = rows
                picture = np.asarray(self.encode_picture(vae, row.pixels[None])[0], np.float32)
                x = (1 - times[0]) * picture + times[0] * x
        return Inputs(condition, x, times, seconds)

    def batches(self, inputs):
        """(bucket, members, batch): indices of grids of one bucket and number of steps.

        All batches of a bucket have one size, so that one program serves it; copies fill those
        that are short, and what becomes of copies is dropped.
        """
        groups = defaultdict(lambda: defaultdict(list))
        for i, each in enumerate(inputs):
            groups[bucket(len(each.x), self.preset.resolution)][each.steps].append(i)
        for size, by_steps in groups.items():
            most = max(1, BATCH_TOKENS // size) * self.shards
            largest = max(map(len, by_steps.values()))
            full = -(-largest // -(-largest // most))  # split evenly
            full += -full % self.shards
            for group in by_steps.values():
                for start in range(0, len(group), full):
                    members = group[start : start + full]
                    yield size, members, members + members[:1] * (full - len(members))

    def paint_batch(self, jobs, texts, inputs, size, steps):
        """A batch padded to `size` tokens -> latents float32 [B, size, 64], seconds by part."""
        seconds, c = Counter(), self.preset
        with self.programs.timed(seconds, "load"):
            flux = self.models.flux
        with self.programs.timed(seconds, "paint"), jax.set_mesh(self.mesh):
            T, grids = c.t5.max_length, [job.grid for job in jobs]
            arrays = (
                np.stack([pad(each.x, size) for each in inputs]),  # B S 64
                np.stack([pad(each.condition, size) for each in inputs]).astype(self.dtype),
                np.stack([text.txt for text in texts]),  # B T D
                np.stack([text.pooled for text in texts]),  # B V
                np.stack([each.times for each in inputs]),  # B N+1
                np.array([job.guidance_scale for job in jobs], np.float32),  # B
                conditioning.position_table(grids, c.flux, T, size),  # B L 1 K/2, twice
                np.array([T + grid.tokens for grid in grids], np.int32),  # B
            )
            arrays = jax.device_put(arrays, batch_sharding(self.mesh))
            x, condition, txt, pooled, times, guidance, pe, lengths = arrays
            mods = self.modulate(flux, times, guidance, pooled)
            for i in steps:
                now = self.at_step(mods, times, i)
                x = self.step(flux, x, condition, txt, pe, lengths, *now).block_until_ready()
        return np.asarray(x), seconds

    def finish(self, job, text, inputs, z):
        """Latents z [S, 64] -> Painted. Pictures are decoded one by one, each in one piece: its
        norms and its attention see all of it, so that tiles would not give the same picture."""
        row, seconds = job.grid.query, text.seconds + inputs.seconds
        with self.programs.timed(seconds, "load"):
            vae = self.models.vae
        with self.programs.timed(seconds, "decode"):
            h, w = row.height // 8, row.width // 8
            last = z[None, len(z) - h * w // 4 :].astype(self.dtype)
            pixels = conditioning.to_pixels(self.decode(vae, last, h, w)[0])
        size = bucket(len(z), self.preset.resolution)
        record = dict(
            tokens=dict(image=len(z), text=len(text.txt), bucket=size),
            dropped_tokens=text.dropped,
            seconds={part: round(seconds[part], 4) for part in PARTS},
        )
        return Painted(pixels, z, job.grid.cut(pixels), record)


def joined(painted, passes, record):
    """A first pass whose targets are those of its second passes, if it had any."""
    record = painted.record | record
    if not passes:
        return replace(painted, record=record)
    record["upsampling"] = [second.record for second in passes]
    return replace(painted, targets=[second.pixels for second in passes], record=record)


def modulate_steps(flux, times, guidance, pooled):
    """The modulations of all steps at once; leaves get a leading axis N."""
    at = lambda t: flux.modulation(t, guidance, pooled)  # noqa: E731
    return jax.vmap(at)(times[:, :-1].T)


def at_step(mods, times, i):
    """Modulation, time and next time of step i: without N, so that one program serves every N."""
    return jax.tree.map(lambda leaf: leaf[i], mods), times[:, i], times[:, i + 1]


def euler_step(flux, x, condition, txt, pe, lengths, mod, t, t_next):
    """One step of x float32 [B, S, 64] from t to t_next, float32 [B]."""
    velocity = conditioning.velocity(flux, x, condition, txt, mod, pe, lengths)
    return flow.euler(x, velocity, t, t_next)


def decode(vae, z, h, w):
    """Latent tokens [B, S, 64] of one row of h x w latent pixels -> pictures [B, 8h, 8w, 3]."""
    return vae.decode(unpack(z, h, w))


def versions():
    """What a picture's bytes depend on, beside the spec, the weights and the mesh."""
    return {"vcloze_jax": __version__, "jax": jax.__version__, "flax": flax.__version__}


def bar(steps, label):
    """The Euler steps of one batch as a progress bar, with the seconds that each takes."""
    form = "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
    return tqdm(steps, label, unit="step", dynamic_ncols=True, bar_format=form)


def pad(x, size):
    """Rows of zeros after x [S, D] up to `size`."""
    return np.pad(x, ((0, size - len(x)), (0, 0)))
