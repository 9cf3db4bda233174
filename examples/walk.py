# %% [markdown]
# # One grid, from its cells to the painted one
#
# What `sample.py` does, done by hand, a stage a cell: this file is a notebook (VS Code and PyCharm
# open it as one, Jupyter by jupytext) and a script, `python examples/walk.py`, which leaves its
# pictures in `outputs/walk/`. The functions are those of the story; only pictures, names and
# weights come from elsewhere.

# %%
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from vcloze_jax import Pipeline, conditioning, flow
from vcloze_jax.data.graph import NODE_PHRASES, NODES
from vcloze_jax.data.graphemoji import read_nodes
from vcloze_jax.grid import Grid
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.sheet import compose
from vcloze_jax.model import ops
from vcloze_jax.study import draw

FOLDER = Path("outputs/walk")


def show(name, pixels, times=1):
    """Keep uint8 [h, w, 3], larger, as a file, and give it to the notebook."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(draw.magnify(pixels, times))
    image.save(FOLDER / f"{name}.png")
    return image


# %% [markdown]
# ## 1. Cells
# Two rows show a task, here colour to gray. The third asks: its last cell is blank, that is black.

# %%
names, pictures = read_nodes("held_out")  # mini saw none of them; uint8 [subjects, nodes, h, w, 3]
subjects, kinds = ("peacock", "hut", "rocket"), ("fluent_3d", "gray")
rows = [names.index(name) for name in subjects]
columns = [NODES.index(kind) for kind in kinds]
cells = pictures[np.ix_(rows, columns)]  # 3 2 h w 3
truth = cells[-1, -1].copy()
cells[-1, -1] = 0
asked = np.zeros((3, 2, 1, 1), bool)
asked[-1, -1] = True
grid = Grid.from_cells(cells, asked)
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
painter = Pipeline.load().painter  # mini: its models are read when they are first needed
preset = painter.preset
T = preset.t5.max_length
ids = grid.ids()  # S 3
pe = conditioning.position_table([grid], preset.flux, T, S)  # cos, sin: 1 T+S 1 K/2
print(f"the last token stands at {ids[-1]} and is turned by {pe[0].shape[-1]} angles")
axes = [draw.map_tokens(grid, axis, 0, ids.max()) for axis in ids.T]
show("3_positions", draw.tile(axes, 3))

# %% [markdown]
# ## 4. Masks
# The mask stays as fine as the pixels: the 16 x 16 of a token are 256 of its channels.

# %%
row = grid.query
mask = ops.pack_mask(row.mask[None].astype(np.float32))  # 1 s 256
print(f"{int(mask.all(-1).sum())} of the {mask.shape[1]} tokens of the last row are asked")
show("4_mask", draw.colour(np.asarray(mask[0]), 0, 1), 3)  # a line for each token

# %% [markdown]
# ## 5. Condition channels
# Every row is encoded, blank where it is asked, and its mask is laid beside: what is given, and
# what is wanted, is told token by token. It never changes while the picture is made.

# %%
vae = painter.models.vae
encode = jax.jit(conditioning.encode_condition)
condition = np.concatenate([encode(vae, r.pixels[None], r.mask[None]) for r in grid.rows], 1)
latent = ops.unpack(condition[:, -mask.shape[1] :, :64], row.height // 8, row.width // 8)
print(f"{condition.shape[-1]} channels: 64 of the latent, 256 of the mask")
channels = [draw.colour(c) for c in np.moveaxis(np.asarray(latent[0]), -1, 0)]  # 16 of h/8 W/8
show("5_condition", draw.tile([draw.magnify(c, 6) for c in channels], 4))

# %% [markdown]
# ## 6. Words
# T5 gives a vector for each token of the prompt, CLIP one for all of it.

# %%
layout = prompts.layout_prompt(len(grid.rows), grid.columns)
task = prompts.task_prompt([NODE_PHRASES[kind][0] for kind in kinds])
prompt = prompts.join(layout, task)
txt, pooled, *_ = painter.read_texts([prompt])[prompt]
print(f"{prompt!r} is {txt.shape} and {pooled.shape}")

# %% [markdown]
# ## 7. Velocity
# All rows begin as noise, also those that are given: the model paints them along. It reads noise
# and condition side by side, and says dx/dt, noise minus picture. So x - t v is the picture that
# it expects: blurred as long as there is much noise.

# %%
guidance = np.array([preset.guidance_scale], np.float32)
context = conditioning.Context(condition, txt[None], pooled[None], guidance, pe)
noise = jax.random.normal(jax.random.key(0), (1, S, 64))
velocity_of = jax.jit(conditioning.velocity)


def velocity(x, t):
    """What the model says of x [1, S, 64] at t [1]."""
    mod = painter.models.flux.modulation(t, guidance, pooled[None])
    return velocity_of(painter.models.flux, x, mod, context)


def look(x):
    """The last row of x as a picture."""
    return painter.decode(grid, np.asarray(x)[0])


t = np.ones(1, np.float32)
v = velocity(noise, t)
show("7_velocity", draw.tile([look(noise), look(noise - t * v)], 2), 2)

# %% [markdown]
# ## 8. Euler steps
# From noise, t = 1, to the picture, t = 0, along the velocity; slowly where there is much noise.

# %%
times = flow.schedule(preset.num_inference_steps, S, preset.flow)
x, seen = noise, []
for i, (t, t_next) in enumerate(zip(times[:-1, None], times[1:, None], strict=True)):
    v = velocity(x, t)
    if i % 5 == 0:
        seen += [look(x), look(x - t * v)]
    x = flow.euler(x, v, t, t_next)
print(f"{len(times) - 1} steps from t = {times[0]:.2f} over {times[1]:.2f} to {times[-1]:.2f}")
show("8_steps", draw.tile(seen, 2), 2)  # x | what it is expected to be, at every fifth step

# %% [markdown]
# ## 9. The painted cell
# The last row is decoded, pixels that were given are put back, and the asked cell is cut out. Here
# it stands between the query and the truth; `sample.py` paints the same.

# %%
painted = look(x)
(cell,) = grid.cut(painted)
show("9_cell", draw.tile([cells[-1, 0], cell, truth], 3), 3)
