# %% [markdown]
# # One grid, from its spec to the painted cell, and one training step
#
# What `sample.py` and `train.py` do, done by hand, a stage a cell: this file is a notebook (VS Code
# and PyCharm open it as one, Jupyter by jupytext) and a script, `python examples/walk.py`, which
# leaves its pictures in `outputs/walk/`. Beside it, `grid`, `conditioning`, `flow` and `model/`'s
# `ops`, `mmdit`, `layers` and `vae` are all that paints, and `step` what trains: the other rooms
# read files, and do this for many grids on many devices.

# %%
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from vcloze_jax import Pipeline, conditioning, flow, optimizers, step
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.sheet import compose
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.model import ops
from vcloze_jax.storage import models
from vcloze_jax.storage.places import MINI_FOLDER
from vcloze_jax.study import draw

SPEC = Path(globals().get("__file__", "examples/walk.py")).with_name("3_two_examples.json")
FOLDER = Path("outputs/walk")


def show(name, pixels, times=1):
    """Keep uint8 [h, w, 3], larger, as a file, and give it to the notebook."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(draw.magnify(pixels, times))
    image.save(FOLDER / f"{name}.png")
    return image


# %% [markdown]
# ## 1. Cells
# Two rows show a task, here a picture and its mask. The third asks: its last cell is blank. Of
# every cell `inputs/cells.py` made an area of resolution², sides of whole tokens, by scaling the
# picture until it covers them and cropping its centre.

# %%
painter = Pipeline.load().painter  # mini: its models are read when they are first needed
preset = painter.preset
(spec,) = read_specs([SPEC], preset)
grid = spec.grid
print(*(preset.flux, preset.vae, preset.flow), sep="\n")  # all sizes; the authors' in config.py
show("1_cells", compose(grid), 2)

# %% [markdown]
# ## 2. Tokens
# The cells of a row are joined: to the model a row is one picture. 16 x 16 of its pixels are a
# token, 8 by the autoencoder and 2 by packing; tokens run over the border of cells.

# %%
S = grid.tokens
print(f"{len(grid.rows)} rows of {grid.query.pixels.shape} pixels are {S} tokens")
show("2_tokens", draw.number_tokens(grid))

# %% [markdown]
# ## 3. Positions
# A token knows the number of its row, and where in the row it stands: three axes, each of which
# turns some pairs of channels, some fast, some slowly. Text will stand before all, at 0, 0, 0.

# %%
T = preset.t5.max_length
ids = grid.ids()  # S 3
pe = conditioning.position_table([grid], preset.flux, T, S)  # cos, sin: 1 T+S 1 K/2
print(f"tokens stand at {ids[0]} … {ids[-1]} and are turned by {pe[0].shape[-1]} angles")
axes = [draw.map_tokens(grid, axis, 0, ids.max()) for axis in ids.T]
show("3_positions", draw.tile(axes, 3))

# %% [markdown]
# ## 4. Masks
# The mask stays as fine as the pixels: the 16 x 16 of a token are 256 of its channels.

# %%
row = grid.query
mask = ops.pack_mask(row.mask[None].astype(np.float32))  # 1 s 256
s = mask.shape[1]
print(f"{int(mask.all(-1).sum())} of the {s} tokens of the last row are asked")
show("4_mask", draw.colour(np.asarray(mask[0]), 0, 1), 3)  # a line for each token

# %% [markdown]
# ## 5. Condition channels
# Every row is encoded, blank where it is asked, and its mask is laid beside: what is given, and
# what is wanted, is told token by token. It never changes while the picture is made.

# %%
vae = painter.models.vae
encode = jax.jit(partial(conditioning.encode_condition, dtype=painter.dtype))
condition = np.concatenate([encode(vae, r.pixels[None], r.mask[None]) for r in grid.rows], 1)
print(f"{condition.shape[-1]} channels: 64 of the latent, 256 of the mask")
latent = ops.unpack(condition[:, -s:, :64], *(side // 8 for side in row.size))  # of the last row
channels = [draw.colour(c) for c in np.moveaxis(np.asarray(latent[0]), -1, 0)]  # 16 of h/8 W/8
show("5_condition", draw.tile([draw.magnify(c, 6) for c in channels], 4))

# %% [markdown]
# ## 6. Words
# T5 gives a vector for each token of the prompt, CLIP one for all of it (`model/text.py`). T5's are
# padded to T tokens, and the padding is attended to, as in FLUX.

# %%
txt, pooled, *_ = painter.read_texts([spec.prompt])[spec.prompt]  # storage/textreader.py
print(f"{spec.prompt!r} is {txt.shape} and {pooled.shape}")

# %% [markdown]
# ## 7. Modulation
# Time, guidance and CLIP's vector become one; of it every layer makes, for each channel, how much
# to shift and to scale what comes into attention and MLP, and how much of their result to add.

# %%
flux = painter.models.flux  # mini's adapter is folded into its weights
guidance = np.array([spec.guidance_scale], np.float32)


def modulate(t):
    """What time t float32 [1] says to every layer."""
    return flux.modulation(t, guidance, pooled[None])


said = [np.asarray(modulate(np.float32([t])).img[0, 0]).reshape(6, -1) for t in (1.0, 0.5, 0.1)]
print(f"{said[0].shape[0]} vectors of {said[0].shape[1]} channels to each stream of a double block")
show("7_modulation", draw.magnify(np.concatenate([draw.colour(x) for x in said]), 6))

# %% [markdown]
# ## 8. Velocity
# All rows begin as noise, also those that are given: the model paints them along. It reads noise
# and condition side by side, and says dx/dt, noise minus picture. So x - t v is the picture that
# it expects: blurred as long as there is much noise.

# %%
context = conditioning.Context(condition, txt[None], pooled[None], guidance, pe)
velocity_of = jax.jit(conditioning.velocity)
decode = jax.jit(lambda vae, x, h, w: vae.decode(ops.unpack(x, h, w)), static_argnums=(2, 3))


def look(x):
    """The last row of x [1, S, 64] as a picture, uint8 [h, C*w, 3]."""
    last = x[:, -s:].astype(painter.dtype)
    return conditioning.to_pixels(decode(vae, last, *(side // 8 for side in row.size)))[0]


noise = jax.random.normal(jax.random.key(spec.seed), (1, S, 64))
t = np.ones(1, np.float32)
v = velocity_of(flux, noise, modulate(t), context)
show("8_velocity", draw.tile([look(noise), look(noise - t * v)], 2), 2)

# %% [markdown]
# ## 9. Euler steps
# From noise, t = 1, to the picture, t = 0, along the velocity; slowly where there is much noise.

# %%
times = flow.schedule(spec.num_inference_steps, S, preset.flow)
x, seen = noise, []
for i, (t, t_next) in enumerate(zip(times[:-1, None], times[1:, None], strict=True)):
    v = velocity_of(flux, x, modulate(t), context)
    if i % 5 == 0:
        seen += [look(x), look(x - t * v)]
    x = flow.euler(x, v, t, t_next)
print(f"{len(times) - 1} steps from t = {times[0]:.2f} over {times[1]:.2f} to {times[-1]:.2f}")
show("9_steps", draw.tile(seen, 2), 2)  # x | what it is expected to be, at every fifth step

# %% [markdown]
# ## 10. The painted cell
# The last row is decoded, pixels that were given are put back, and the asked cell is cut out.

# %%
(cell,) = grid.cut(look(x))
show("10_cell", cell, 3)

# %% [markdown]
# ## 11. A training step: what is asked
# The examples are a grid with its whole truth: its last cell is masked, and noise of a drawn time
# laid over all. The loss asks for the velocity where the mask is. `train.py` draws its grids, and
# their words, of a source (`data/sources.py`; the words here still tell of three rows);
# `step.encode_batch` is this for a batch of them, and draws the guidance, too. What is masked in
# the condition is black for mini, as in painting, and grey where FLUX is trained, as the authors'.

# %%
recipe = preset.recipe
cells = np.stack([grid.split(r.pixels) for r in grid.rows[:-1]])  # 2 2 h w 3
asked = np.zeros((*cells.shape[:2], 1, 1), bool)
asked[-1, -1] = True
drawn = Grid.from_cells(cells, asked)
rows = [(r.pixels[None], r.mask[None]) for r in drawn.rows]
posteriors = conditioning.encode_rows(vae, rows, recipe.mask_fill, painter.dtype)
for_vae, for_noise, for_time = jax.random.split(jax.random.key(0), (3, 1))  # of one grid
truth, condition, share = conditioning.draw_training(posteriors, for_vae)
truth = truth.astype(np.float32)
noise = jax.random.normal(for_noise[0], truth.shape)
pe = conditioning.position_table([drawn], preset.flux, T, drawn.tokens)
context = context._replace(condition=condition, pe=pe)
seen = []
for t in (np.float32([0.3]), np.float32([0.95]), flow.draw_time(for_time, recipe.time_mean)):
    x_t, velocity = flow.interpolate(truth, noise, t)
    v = velocity_of(flux, x_t, modulate(t), context)
    print(f"at t = {t[0]:.2f} the loss is {flow.masked_loss(v, velocity, share)[0]:.3f}")
    seen += [look(x_t), look(x_t - t * v), look(truth)]
show("11_training", draw.tile(seen, 3), 2)  # noisy | expected | true, a line for each time

# %% [markdown]
# ## 12. A training step: what is learnt
# The base stays as it is, here without the adapter that mini learnt. Beside each of its products
# stands a new one, x A B + b, born with B and b zero: `lora_a`, `lora_b` and `lora_bias`, float32,
# are all that the gradient reaches. A step of AdamW against it, at the full rate, without warm-up,
# makes the loss less. `trainer.py` is the loop: gradients of micro-batches are summed, and divided
# by their number in `step.update`.

# %%
trained = models.checked_training_preset(MINI_FOLDER, recipe, painter.mesh)
graphdefs, adapter, frozen = models.load_for_training(trained, MINI_FOLDER, painter.mesh)
noisy = step.NoisyBatch(x_t, velocity, share, t, context)
how = dict(region=recipe.loss_region, graphdefs=graphdefs, dtype=painter.dtype)
loss_of = jax.jit(jax.value_and_grad(partial(step.loss_fn, **how), has_aux=True))
(before, _), gradient = loss_of(adapter, frozen, noisy)
optimizer = optimizers.make_optimizer(recipe.clip)
updates, _ = optimizer.update(gradient, optimizer.init(adapter), adapter)
adapter = jax.tree.map(lambda w, u: w - recipe.lr * u, adapter, updates)
(after, _), _ = loss_of(adapter, frozen, noisy)
count = sum(w.size for w in jax.tree.leaves(adapter))
print(f"a step on {count} numbers takes the loss of the base from {before:.4f} to {after:.4f}")
