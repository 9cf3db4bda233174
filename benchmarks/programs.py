"""The programs of training and sampling, with the shapes of what they are given."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vcloze_jax import painter, step
from vcloze_jax.conditioning import Context
from vcloze_jax.optimizers import make_optimizer
from vcloze_jax.sharding import BATCH, batch_sharding, compute_dtype, shardings
from vcloze_jax.storage.weights import MODULES, abstract


def place(tree, layout, dtype=None):
    """Shapes with their shardings, cast."""
    return jax.tree.map(lambda x, s: x.update(dtype=dtype or x.dtype, sharding=s), tree, layout)


class Programs:
    """The programs of a preset on a mesh, for `grids` of equal rows at a time.

    Each method gives a jitted function of step.py or painter.py, and the shapes of its arguments
    with their places.
    """

    def __init__(self, preset, mesh, rows, columns, grids):
        self.preset, self.mesh, self.grids, self.dtype = preset, mesh, grids, compute_dtype(mesh)
        side = preset.resolution
        self.shape = (rows, side, columns * side)
        self.tokens = rows * columns * (side // 16) ** 2
        parts = {name: abstract(module, getattr(preset, name)) for name, module in MODULES.items()}
        self.graphdefs = {name: graphdef for name, (graphdef, _, _) in parts.items()}
        frozen = {name: base for name, (_, _, base) in parts.items()}
        self.frozen = place(frozen, shardings(frozen, mesh), self.dtype)
        trainable = {"flux": parts["flux"][1]}
        self.tx = make_optimizer(preset.recipe.clip)
        state = jax.eval_shape(partial(step.init_state, tx=self.tx, ema=0.0), trainable)
        self.layout = shardings(state, mesh)
        self.state = place(state, self.layout)

    def batched(self, *shape, dtype=jnp.float32):
        shape = (self.grids, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def angles(self):
        """Of the positions: a table for all grids, made on the host."""
        length, half = self.preset.t5.max_length + self.tokens, self.preset.flux.head_dim // 2
        return (jax.ShapeDtypeStruct((1, length, 1, half), jnp.float32),) * 2

    def noisy(self):
        """A micro-batch, as `encode` gives it."""
        c, text = self.preset.flux, self.preset.t5.max_length
        tokens = self.batched(self.tokens, 64)
        context = Context(
            self.batched(self.tokens, 320, dtype=self.dtype),
            self.batched(text, c.text_width, dtype=self.dtype),
            self.batched(c.vec_width, dtype=self.dtype),
            self.batched(),
            self.angles(),
        )
        return step.NoisyBatch(tokens, tokens, self.batched(self.tokens), self.batched(), context)

    def steps(self):
        statics = dict(graphdefs=self.graphdefs, dtype=self.dtype)
        return step.make_step(
            self.tx, partial(step.loss_fn, region="target", **statics), self.layout
        )

    def encode(self):
        rows, height, width = self.shape
        pixels = self.batched(height, width, 3, dtype=jnp.uint8)
        mask = self.batched(height, width, dtype=jnp.bool_)
        ids = (self.preset.t5.max_length,), (self.preset.clip.max_length,), ()
        ids = (self.batched(*shape, dtype=jnp.int32) for shape in ids)
        grids = tuple((pixels, mask if i == rows - 1 else None) for i in range(rows))
        batch = step.Batch(grids, *ids, self.angles())
        options = dict(graphdefs=self.graphdefs, preset=self.preset, dtype=self.dtype)
        key = jax.eval_shape(jax.random.key, 0)
        return jax.jit(partial(step.encode_batch, **options)), (self.frozen, batch, key)

    def accumulate(self):
        trainable = self.state.trainable
        return self.steps()[0], (trainable, self.frozen, trainable, self.noisy())

    def update(self):
        everywhere = NamedSharding(self.mesh, P())
        losses = jax.ShapeDtypeStruct((self.grids,), jnp.float32, sharding=everywhere)
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        return self.steps()[1], (self.state, self.state.trainable, [losses], rate)

    def euler(self):
        """A step of sampling, the adapter folded in."""
        graphdef, _, base = abstract(MODULES["flux"], replace(self.preset.flux, rank=0))
        base = place(base, shardings(base, self.mesh, "flux/"), self.dtype)
        flux, noisy, t = nnx.merge(graphdef, base), self.noisy(), self.batched()
        mod = jax.eval_shape(type(flux).modulation, flux, t, t, noisy.context.pooled)
        by_batch = [NamedSharding(self.mesh, P(*(None,) * (m.ndim - 2), *BATCH)) for m in mod]
        mod = place(mod, type(mod)(*by_batch))
        program = jax.jit(painter.euler_step, out_shardings=batch_sharding(self.mesh))
        return program, (flux, noisy.x_t, mod, noisy.context, t, t)
