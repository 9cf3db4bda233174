"""The FLUX transformer on one screen: embed, scan the double blocks, scan the single, project.

FLUX has 19 double and 38 single blocks, 24 heads, D = 3072; mini 2 and 4, 4 heads, D = 192.
Source: black-forest-labs/flux:src/flux/model.py. Blocks of a kind are one module whose weights
carry a leading layer axis, or are lists: where it is large, depth costs no compile time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vcloze_jax.model.layers import Dense, DoubleBlock, LastLayer, MLPEmbedder, SingleBlock, stack
from vcloze_jax.model.ops import attention, keep_products, timestep_embedding
from vcloze_jax.placement import TEXT, kind_of
from vcloze_jax.sharding import by_batch, fetched, gathered


class Modulation(NamedTuple):
    """What time, guidance and pooled text say to every layer; a function of one vector alone. Where
    a Placement has K vectors, all but txt have an axis of them, K, before the last."""

    img: jax.Array  # [double, B, 6D]
    txt: jax.Array  # [double, B, 6D]
    single: jax.Array  # [single, B, 3D]
    final: jax.Array  # [B, 2D]


class Flux(nnx.Module):
    """The velocity (flow.py) of packed latents, given condition, mask and text."""

    def __init__(self, c, *, rngs):
        dense = dict(rank=c.rank, rngs=rngs)
        self.config = c
        self.img_in = Dense(c.in_channels, c.width, **dense)
        self.txt_in = Dense(c.text_width, c.width, **dense)
        self.time_in = MLPEmbedder(256, c.width, **dense)
        self.vector_in = MLPEmbedder(c.vec_width, c.width, **dense)
        if c.guidance_embed:
            self.guidance_in = MLPEmbedder(256, c.width, **dense)
        if c.placement.embeds:
            self.cond_in = Dense(1, c.width, std=0.0, **dense)
        self.double = stack(lambda rngs: DoubleBlock(c, rngs=rngs), c.double_blocks, rngs)
        self.single = stack(lambda rngs: SingleBlock(c, rngs=rngs), c.single_blocks, rngs)
        self.final = LastLayer(c, rngs=rngs)

    def modulation(self, t, guidance, pooled):
        """t, guidance float32 [B], pooled text [B, V] -> Modulation in the dtype of `pooled`.

        Split from the rest, so that a sampler computes all its steps' modulations at once. The
        paper's placement has one vector, "mod" at time t: a layer's is then its Dense of that. A
        vector is float32 up to one last rounding: every layer multiplies by what it says, and in
        bfloat16 it would be the largest error of the model.
        """

        def vector(t):
            vec = self.time_in(timestep_embedding(t)) + self.vector_in(pooled.astype(jnp.float32))
            if self.config.guidance_embed:
                vec = vec + self.guidance_in(timestep_embedding(guidance))  # B D
            # The vector is gathered and no kernel is, of which all layers' are used at once.
            return gathered(jax.nn.silu(vec).astype(pooled.dtype))

        def of_vectors(say):
            said = [say(branch, vec_at[time]) for branch, time in placement.vectors]
            return said[0] if len(said) == 1 else jnp.stack(said, -2)

        placement, double = self.config.placement, self.double
        at = {"t": t, "0": jnp.zeros_like(t)}
        vec_at = {time: vector(at[time]) for time in dict.fromkeys(placement.time)}
        one = lambda layer, vec: by_batch(gathered(fetched(layer)(vec)))  # noqa: E731
        each = jax.vmap(one, (0, None))
        if isinstance(self.double.txt.mod.kernel.get_value(), list):  # `scan`
            told = lambda vec, layer: (vec, one(layer, vec))  # noqa: E731
            each = lambda layers, vec: self.scan(told, vec, layers)[1]  # noqa: E731
        return Modulation(
            of_vectors(lambda branch, vec: each(getattr(double.img, branch), vec)),
            each(double.txt.mod, vec_at[placement.time[TEXT]]),
            of_vectors(lambda branch, vec: each(getattr(self.single, branch), vec)),
            of_vectors(lambda _, vec: one(self.final.mod, vec)),
        )

    def __call__(self, img, txt, mod, pe, lengths=None, segments=None):
        """img [B, S, in_channels], txt [B, T, text_width], pe of T + S tokens -> [B, S, out].

        `mod` is a `modulation`; `lengths` int32 [B] counts the real tokens, text included, where
        img is padded; `segments` int32 [B, S] is what img shows, where the config's Placement asks.
        """
        img = self.img_in(img)  # B S D
        txt = self.txt_in(txt)  # B T D
        T, placement, seen = txt.shape[1], self.config.placement, (lengths,)  # FILL asks no more
        if placement.by_segment:
            kinds = jnp.pad(kind_of(segments), ((0, 0), (T, 0)), constant_values=TEXT)  # B L
        if placement.embeds:
            clean = jnp.asarray(placement.clean)[kinds[:, T:]]  # B S
            img = img + clean[..., None] * self.cond_in(jnp.ones((1, 1), img.dtype))
        if placement.masked:
            seen += jnp.asarray(placement.sees)[:, kinds].swapaxes(0, 1), kinds  # B 5 L

        def own(mod, first=0):  # of tokens from the first on
            if len(placement.vectors) == 1:
                return mod
            which = jnp.asarray(placement.vector_of)[kinds[:, first:]]
            return jnp.take_along_axis(mod, which[..., None], 1)

        attend = lambda *qkv: (attention(*qkv, *seen), None)  # noqa: E731
        x, _ = self.run_blocks(img, txt, mod, pe, attend, own=own)
        return self.final(x[:, T:], own(mod.final, T))

    def run_blocks(self, img, txt, mod, pe, attend, *, own=lambda mod, first=0: mod, kept=((), ())):
        """img [B, S, D], txt [B, T, D] -> both after all blocks, [B, T + S, D], and what `attend`
        tells of the double blocks, and of the single: it is handed q, k, v and what is `kept` for
        the block. `own(mod, first)` is the modulation of the tokens from the first on."""
        T, remat = txt.shape[1], self.config.remat

        def double(x, layer):
            block, img_mod, txt_mod, kept = fetched(layer)
            return block(*x, own(img_mod, T), txt_mod, pe, lambda *qkv: attend(*qkv, *kept))

        def single(x, layer):
            block, mod, kept = fetched(layer)
            return block(x, own(mod), pe, lambda *qkv: attend(*qkv, *kept))

        if remat != "none":
            policy = keep_products if remat == "light" else None
            double, single = (jax.checkpoint(block, policy=policy) for block in (double, single))
        layers = self.double, mod.img, mod.txt, kept[0]
        (img, txt), first = self.scan(double, (img, txt), layers)
        x = jnp.concatenate([txt, img], 1)  # B L D
        x, rest = self.scan(single, x, (self.single, mod.single, kept[1]))
        return x, (first, rest)

    def scan(self, block, x, layers):
        """A loop over layers; unrolled where remat is "none", as in models that are small enough to
        compile so: a loop copies all that the backward pass needs into stacks, a third of mini's
        step on a CPU. Unrolled, lists of layers spare slices' copies (weights.py, `by_layer`)."""
        listed, unroll = lambda x: isinstance(x, list), self.config.remat == "none"
        layers = jax.tree.map(lambda x: jnp.stack(x) if listed(x) else x, layers, is_leaf=listed)
        return jax.lax.scan(block, x, layers, unroll=unroll)
