"""Grids -> latents -> pictures: shared by sample.py, previews, evaluation and the library.

All grids go through one stage before the next begins: texts, condition latents, Euler steps,
pictures; then through all but the first again where a second pass is asked for, which paints each
target once more, enlarged, from a start that is noise in part. For the steps, grids are grouped by
token bucket and number of steps, padded on the right, and painted as batches; the result of one
does not depend on the others. Of several hosts each encodes what its devices will hold.

All S tokens of a grid begin as noise, those of the examples too: what is given is read from the
condition beside them. In the end the last row is decoded; only its masked pixels are kept.
"""

import math
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import jax
import numpy as np
from jax.sharding import Mesh

from vcloze_jax import conditioning, flow, sharding
from vcloze_jax.grid import Spec, bucket
from vcloze_jax.model.ops import unpack
from vcloze_jax.placement import kind_of

BATCH_TOKENS = 2**13  # image tokens per device and call: enough to keep any accelerator busy


@dataclass(eq=False)
class Canvas:
    """A grid on its way from spec to picture; every stage adds what it made."""

    painter: "Painter"  # who decodes it
    spec: Spec
    txt: np.ndarray  # [T, text_width]
    pooled: np.ndarray  # [vec_width]
    unread: dict  # tokens and characters of the prompt, counted by encoder
    seconds: Counter  # by part
    times: np.ndarray  # float32 [N + 1], of the Euler steps
    condition: np.ndarray = None  # float32 [S, 320]; [S, 0] where a placement has none
    latents: np.ndarray = None  # float32 [S, 64]: noise; at t = 0 the picture
    second_passes: list["Canvas"] = field(default_factory=list)  # one a target, if asked for

    @cached_property
    def pixels(self):
        """The painted query row, uint8 [h, C*w, 3], decoded by the hosts that ask for it."""
        with self.painter.timed(self.seconds, "decode"):
            return self.painter.decode(self.spec.grid, self.latents)

    def cut(self):
        """The painted cells in column order, uint8 [h, w, 3] each."""
        return self.spec.grid.cut(self.pixels)

    @property
    def targets(self):
        """The same, of the second pass where one is asked for."""
        return [canvas.pixels for canvas in self.second_passes] or self.cut()


class Painter:
    """The models of a preset on a mesh, and the compiled parts of sampling.

    `models` has the attributes flux and vae, each asked for where its stage begins;
    `read_texts(prompts)` -> {prompt: its txt, pooled, unread, seconds}: what T5 says of each token,
    CLIP of the whole. What passes within `timed(seconds, part)` is added to that part.
    """

    def __init__(self, preset, models, read_texts, mesh, timed=lambda seconds, part: nullcontext()):
        self.preset, self.models, self.read_texts, self.mesh = preset, models, read_texts, mesh
        self.timed, self.shards = timed, sharding.count_shards(mesh)
        self.alone = Mesh(np.reshape(mesh.local_devices[0], (1, 1, 1, 1)), mesh.axis_names)
        self.dtype = dtype = sharding.compute_dtype(mesh)  # on CPUs float32
        self.encode_condition = jax.jit(partial(conditioning.encode_condition, dtype=dtype))
        self.encode_picture = jax.jit(partial(conditioning.encode_picture, dtype=dtype))
        self.modulate_steps = jax.jit(modulate_steps)
        self.select_step = jax.jit(select_step)
        # Where its result lies is said, or the second step would be another program.
        self.euler_step = jax.jit(euler_step, out_shardings=sharding.batch_sharding(mesh))
        self.decode_row = jax.jit(lambda vae, z, hw: vae.decode(unpack(z, *hw)), static_argnums=2)

    @property
    def vae(self):
        """The autoencoder, all of which each host has, on one device of this one."""
        return jax.tree.map(lambda x: x.addressable_data(0), self.models.vae)

    def __call__(self, specs, progress=lambda steps, label: steps, watch=None):
        """Paint every spec -> list of Canvas, in order.

        `progress(steps, label)` wraps the Euler steps of each batch; `watch(canvases, i, before,
        after)` is told of each, with a batch's latents [B, bucket, 64] at times[i] and [i + 1].
        Raises FloatingPointError if a picture is not finite.
        """
        prompts = [s.prompt for s in specs] + [s.content_prompt for s in specs if s.upsampling]
        start = partial(self.start, texts=self.read_texts(prompts))
        canvases = list(map(start, specs))
        self.run_pass(canvases, progress, watch)
        for canvas in canvases:
            if up := canvas.spec.upsampling:
                canvas.second_passes = list(map(start, up.specs(canvas.spec, canvas.cut)))
        self.run_pass([second for c in canvases for second in c.second_passes], progress, watch)
        return canvases

    def start(self, spec, texts):
        """What a spec begins as: a Canvas, whose times only tokens that are noisy shift."""
        text, placement = texts[spec.prompt], self.preset.flux.placement
        noisy = int((~np.array(placement.clean)[kind_of(spec.grid.segments(placement))]).sum())
        times = flow.schedule(spec.num_inference_steps, noisy, self.preset.flow, spec.strength or 1)
        return Canvas(self, spec, text.txt, text.pooled, text.unread, Counter(text.seconds), times)

    def run_pass(self, canvases, progress, watch):
        """One pass over all canvases."""
        batches = list(self.batches(canvases))
        ours = (b[i] for *_, b in batches for i in sharding.held_here(len(b), self.mesh))
        for canvas in dict.fromkeys(ours):
            self.encode(canvas)
        for size, members, batch in batches:
            label = f"{len(members)} x {size} tokens"
            label += ", upsampling" if members[0].spec.strength is not None else ""
            steps = progress(range(len(members[0].times) - 1), label)
            self.denoise(members, batch, size, steps, watch)

    def encode(self, canvas):
        """Condition and noise of one grid, whose rows are encoded at their exact width."""
        spec, seconds, times = canvas.spec, canvas.seconds, canvas.times
        placement, second = self.preset.flux.placement, spec.strength is not None
        # A second pass's are decoded now: those seconds are the first one's.
        pictures = [(p.pixels[None], p.mask[None]) for p in spec.grid.pictures(placement)]
        with self.timed(seconds, "load"):
            vae = self.vae
        with self.timed(seconds, "vae"):
            fill = np.float32(conditioning.GREY if second else conditioning.BLACK)
            tokens = [self.encode_condition(vae, *picture, fill) for picture in pictures]
            canvas.condition = np.concatenate([np.asarray(t, "f4")[0] for t in tokens])
            canvas.latents = initial_noise(spec)
            if second:
                picture = np.asarray(self.encode_picture(vae, pictures[0][0]), "f4")[0]
                canvas.latents = (1 - times[0]) * picture + times[0] * canvas.latents
            entering = canvas.latents, canvas.condition, spec.grid.segments(placement), placement
            canvas.latents, canvas.condition = conditioning.enter(*entering)

    def batches(self, canvases):
        """(bucket, members, batch): canvases of one bucket and number of steps.

        All batches of a bucket have one size, so that one program serves it; copies of the last
        member fill those that are short, and what becomes of copies is dropped.
        """
        groups = defaultdict(lambda: defaultdict(list))
        for canvas in canvases:
            size = bucket(canvas.spec.grid.tokens, self.preset.resolution)
            groups[size][len(canvas.times)].append(canvas)
        for size, by_steps in groups.items():
            most = max(1, BATCH_TOKENS // size) * self.shards
            largest = max(map(len, by_steps.values()))
            full = math.ceil(largest / math.ceil(largest / most))  # split evenly
            full = math.ceil(full / self.shards) * self.shards
            for group in by_steps.values():
                for start in range(0, len(group), full):
                    members = group[start : start + full]
                    yield size, members, members + members[-1:] * (full - len(members))

    def denoise(self, members, batch, size, steps, watch):
        """The Euler steps of a batch, padded to `size` tokens."""
        seconds = Counter()
        with self.timed(seconds, "load"):
            flux = self.models.flux  # adapters folded in
        with self.timed(seconds, "paint"), jax.set_mesh(self.mesh):
            x, times, context = self.stack(batch, size)
            mods = self.modulate_steps(flux, times, context.guidance, context.pooled)
            context = self.prepare(batch, flux, x, context)
            told = watch and sharding.on_host(x)
            for i in steps:
                mod, t, t_next = self.select_step(mods, times, i)
                before, x = x, self.euler_step(flux, x, mod, context, t, t_next)
                before.block_until_ready()  # the bar counts what is done, while the next runs
                if watch:
                    last, told = told, sharding.on_host(x)
                    watch(members, i, last, told)
            x.block_until_ready()
        for canvas, latents in zip(members, sharding.on_host(x), strict=False):
            canvas.latents = latents[: canvas.spec.grid.tokens]
            canvas.seconds.update(seconds)
            conditioning.check_painted(canvas.latents)  # all hosts know: each decodes its own

    def stack(self, batch, size):
        """Latents [B, size, 64], times [B, N + 1] and Context of a batch, on the mesh."""
        T, grids = self.preset.t5.max_length, [canvas.spec.grid for canvas in batch]
        context = conditioning.Context(
            [pad(canvas.condition, size, self.dtype) for canvas in batch],
            [canvas.txt for canvas in batch],
            [canvas.pooled for canvas in batch],
            np.array([canvas.spec.guidance_scale for canvas in batch], np.float32),
            conditioning.position_table(grids, self.preset.flux, T, size),
            np.array([T + grid.tokens for grid in grids], np.int32),
            conditioning.segment_table(grids, self.preset.flux.placement, size),
        )
        latents = [pad(canvas.latents, size, "f4") for canvas in batch]
        arrays = latents, [canvas.times for canvas in batch], context
        to_mesh, is_leaf = partial(sharding.spread, mesh=self.mesh), lambda x: isinstance(x, list)
        return jax.tree.map(to_mesh, arrays, is_leaf=is_leaf)

    def prepare(self, batch, flux, x, context):
        """What the steps of a batch read: its Context, as it is (references.py: not all of it)."""
        return context

    def decode(self, grid, latents):
        """Latents float32 [S, 64] of a grid -> its query row, uint8 [h, C*w, 3], in one piece:
        norms and attention see all of a picture, so that tiles would not give the same."""
        h, w = (side // 8 for side in grid.query.size)
        count = grid.columns if self.preset.flux.placement.apart else 1
        last = latents[-(h * w // 4) :].astype(self.dtype).reshape(count, -1, latents.shape[-1])
        with jax.set_mesh(self.alone):
            pictures = conditioning.to_pixels(self.decode_row(self.vae, last, (h, w // count)))
        return np.concatenate(list(pictures), 1)


def initial_noise(spec):
    """Noise of a spec, float32 [S, 64]: drawn without padding, so that no bucket changes it."""
    if spec.latents is not None:
        return spec.latents
    return np.asarray(jax.random.normal(jax.random.key(spec.seed), (spec.grid.tokens, 64), "f4"))


def modulate_steps(flux, times, guidance, pooled):
    """The modulations of all steps, times float32 [B, N + 1]; leaves get an axis N in front."""
    return jax.vmap(flux.modulation, (0, None, None))(times[:, :-1].T, guidance, pooled)


def select_step(mods, times, i):
    """Modulation, time and next time [B] of step i: without N, so that one program serves all."""
    return jax.tree.map(lambda leaf: leaf[i], mods), times[:, i], times[:, i + 1]


def euler_step(flux, x, mod, context, t, t_next):
    """flow.euler along the velocity that the MMDiT has at x, float32 [B, S, 64]."""
    return flow.euler(x, conditioning.velocity(flux, x, mod, context), t, t_next)


def pad(x, size, dtype):
    """Rows of zeros after x [S, D] up to `size`; None, of what another host encodes, stays None."""
    return x if x is None else np.pad(x, ((0, size - len(x)), (0, 0))).astype(dtype)
