"""Our model of random weights on one device, and what benchmarks/gpu.py times of it."""

import json
import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from case import GUIDANCE, LATENT, STEPS, measure, tell
from flax import nnx
from programs import Programs

from vcloze_jax import flow
from vcloze_jax.devices import make_mesh
from vcloze_jax.grid import Grid
from vcloze_jax.model.ops import attention
from vcloze_jax.painter import Canvas, Painter
from vcloze_jax.storage.models import move_offloaded


class Ours:
    """A model of random weights on the first device, and what is timed of it."""

    def __init__(self, case, args, remat="light"):
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        self.case, self.repeats, self.remat = case, args.repeats, remat
        self.mesh = make_mesh(dict(data=1, fsdp=1, tensor=1))
        shape = case.rows, case.columns, case.batch
        self.programs = Programs(case.preset(remat).learning, self.mesh, *shape)
        self.programs.frozen = {"flux": self.programs.frozen["flux"]}

    def draw(self, shapes, scale):
        """Normal numbers in the places of some shapes, made on the device, leaf by leaf."""

        def one(path, x):
            key = jax.random.key(sum(map(ord, jax.tree_util.keystr(path))))
            return jax.device_put(normal(key, scale, x.shape, x.dtype), x.sharding)

        return jax.tree_util.tree_map_with_path(one, shapes)

    def compile(self, what, program, args):
        """A program compiled for arguments, its seconds told."""
        with jax.set_mesh(self.mesh):
            lowered, start = program.lower(*args), time.perf_counter()
            compiled = lowered.compile()
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
        print(json.dumps({"who": "ours", "what": f"compile {what}", "seconds": round(seconds, 2)}))
        return compiled, round(memory, 2)

    def time(self, what, call, flops=None, **more):
        times = measure(lambda: jax.block_until_ready(call()), self.repeats)
        stats = self.mesh.devices.flat[0].memory_stats() or {}
        peak = round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)
        tell("ours", what, times, flops, peak_gib=peak, **more)

    def ceilings(self, size):
        case, dtype = self.case, self.programs.dtype
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        multiply = jax.jit(jnp.matmul)
        self.time(f"product {size}²", lambda: multiply(a, a), 2 * size**3)
        tokens, head = case.image + case.text, case.width // case.heads
        q = jax.random.normal(jax.random.key(1), (case.batch, tokens, case.heads, head), dtype)
        flops = 4 * case.batch * tokens**2 * case.width
        forward = jax.jit(attention)
        self.time("attention", lambda: forward(q, q, q), flops)
        loss = lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()  # noqa: E731
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        self.time("attention and gradient", lambda: gradient(q, q, q), 3.5 * flops)

    def forward(self, compile_only=False, offload=False):
        """One Euler step, modulation given, adapter folded in; its blocks in host memory, if they
        are to be offloaded."""
        program, (flux, *inputs) = self.programs.euler()
        what = "forward, offloaded" if offload else "forward"
        if offload:
            graphdef, tree = nnx.split(self.draw(flux, 0.02))
            flux = nnx.merge(graphdef, move_offloaded(nnx.to_pure_dict(tree), self.mesh))
        compiled, temporary = self.compile(what, program, (flux, *inputs))
        if compile_only:
            return None
        flux, inputs = flux if offload else self.draw(flux, 0.02), self.draw(inputs, 1.0)
        call = lambda: compiled(flux, *inputs)  # noqa: E731
        self.time(what, call, self.case.flops, temporary_gib=temporary)
        return flux

    def loop(self, flux):
        """All steps of a grid, from the host's arrays to the host's arrays."""
        case, preset = self.case, self.programs.preset
        cells = np.zeros((case.rows, case.columns, case.side, case.side, 3), np.uint8)
        img, txt, pooled, _ = case.inputs()
        spec = SimpleNamespace(grid=Grid.from_cells(cells, np.bool_(True)), guidance_scale=GUIDANCE)
        txt, pooled = (x[0].astype(self.programs.dtype) for x in (txt, pooled))  # as texts are read
        painter = Painter(preset, SimpleNamespace(flux=flux), None, self.mesh)
        times = flow.schedule(STEPS, case.image, preset.flow)
        canvas = Canvas(painter, spec, txt, pooled, {}, {}, times)
        canvas.condition, canvas.latents = img[0, :, LATENT:], img[0, :, :LATENT]
        canvas.seconds = {"load": 0, "paint": 0, "compile": 0}

        def call():
            canvas.latents = img[0, :, :LATENT]
            painter.denoise([canvas], [canvas], case.image, range(STEPS), watch=None)

        times = measure(call, max(2, self.repeats // 5))
        tell("ours", f"{STEPS} steps", times, STEPS * case.flops)

    def train(self, compile_only):
        """A step of one micro-batch: its gradient, then the update."""
        add, shapes = self.programs.accumulate()
        update, others = self.programs.update()
        what = f"adapter step, remat {self.remat}"
        compiled, temporary = self.compile(what, add, shapes)
        finish, _ = self.compile("update", update, others)
        if compile_only:
            return
        trainable, frozen, _, noisy = shapes
        frozen, noisy = self.draw(frozen, 0.02), self.draw(noisy, 1.0)
        state = self.draw(self.programs.state._replace(moments=(), average={}), 0.02)
        moments = self.draw(self.programs.state.moments, 0.0)
        state = state._replace(moments=moments)
        box = [state, self.draw(trainable, 0.0)]

        def call():
            loss, grads = compiled(box[0].trainable, frozen, box[1], noisy)
            *box[:], norms = finish(box[0], grads, [loss["target"]], np.float32(1e-4))
            return norms

        self.time(what, call, temporary_gib=temporary)


@partial(jax.jit, static_argnums=(2, 3))
def normal(key, scale, shape, dtype):
    """Numbers of that deviation; of what is no number, zeros."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return (scale * jax.random.normal(key, shape)).astype(dtype)
