"""Stations of the walk: what is painted, from condition channels to the cell.

The velocities are those of the steps that were taken.
"""

import jax
import numpy as np

from vcloze_jax import conditioning, flow
from vcloze_jax.grid import PATCH, Grid
from vcloze_jax.inputs.measures import rmse
from vcloze_jax.inputs.sheet import compose
from vcloze_jax.model import ops
from vcloze_jax.model.mmdit import Flux
from vcloze_jax.model.vae import VAE
from vcloze_jax.painter import Painter, euler_step, initial_noise
from vcloze_jax.study import draw
from vcloze_jax.study.journey import SEED, Station
from vcloze_jax.study.page import Figure

MOMENTS = 6  # of the steps, at which the picture is looked at


def visit_condition(j):
    grid, condition = j.spec.grid, j.canvas.condition
    row = grid.query
    size = tuple(side // 8 for side in row.size)
    last = condition[None, -(size[0] * size[1] // 4) :]  # 1 s 320
    latent, mask = np.split(last, [j.states.shape[-1]], -1)
    channels = np.moveaxis(np.asarray(ops.unpack(latent, *size))[0], -1, 0)  # 16 h/8 W/8
    blanked = conditioning.blank(conditioning.to_model(row.pixels[None]), row.mask[None], -1.0)
    maps = [draw.magnify(draw.colour(c, channels.min(), channels.max()), 6) for c in channels]
    shown = np.moveaxis(np.asarray(ops.unpack(mask, *size))[0], -1, 0)  # 64 h/8 W/8
    masks = [draw.magnify(draw.colour(m, 0, 1), 3) for m in shown]
    return Station(
        "Condition channels",
        "What is asked is made black, the row is encoded, and the mask is folded beside its "
        "latent: every token is told what stands in its patch, and which of its pixels to make.",
        (
            conditioning.blank,
            VAE.encode,
            ops.pack,
            ops.pack_mask,
            conditioning.encode_condition,
        ),
        {
            "blanked row": blanked,
            "its latent": ops.unpack(latent, *size),
            "latent tokens": latent,
            "mask tokens": mask,
            "condition": condition,
        },
        [
            Figure(conditioning.to_pixels(blanked)[0], "The blanked query row.", 2),
            Figure(draw.tile(maps, 4), f"Its {len(maps)} latent channels, on one scale."),
            Figure(
                draw.tile(masks, 8),
                f"Its mask, {len(masks)} channels: the pixels of 8 x 8, bright where one is made.",
            ),
        ],
    )


def visit_noise(j):
    times = j.canvas.times
    first = np.abs(j.states[0]).mean(-1)
    figure, (panel,) = draw.new_figure(width=5, height=3)
    panel.plot(times, "o-", color="#e25822", label="shifted")
    panel.plot(np.linspace(1, 0, len(times)), color="#999999", label="even")
    panel.set(xlabel="step", ylabel="t")
    panel.legend()
    return Station(
        "Noise and times",
        f"All rows start as noise, by the seed {SEED}: also those that are given, which the model "
        "paints along. Time goes from 1 to 0 in steps that dwell where there is much noise.",
        (initial_noise, flow.schedule, flow.shift_time),
        {"latents": j.states[0], "times": times},
        [
            Figure(
                draw.tile([query_map(j, first, first.max()), j.decode(j.states[0])], 2),
                "The noise of the last row: the mean size of its channels, by token; and decoded.",
                2,
            ),
            Figure(draw.render_figure(figure), "The times of the steps."),
        ],
    )


def visit_velocity(j):
    steps = np.unique(np.linspace(0, len(j.velocities) - 1, MOMENTS).astype(int))
    sizes = np.sqrt(np.square(j.velocities).mean(-1))  # N S
    columns = {
        f"t = {j.canvas.times[i]:.2f}": np.stack(
            [j.decode(j.states[i]), j.decode(j.expected[i]), query_map(j, sizes[i], sizes.max())]
        )
        for i in steps
    }
    img = np.concatenate([j.states[0], j.canvas.condition], -1)
    guidance = j.context.guidance
    pooled = j.context.pooled
    times = j.canvas.times[:1]
    mod = jax.eval_shape(j.painter.models.flux.modulation, times, guidance, pooled)
    shapes = {f"modulation.{name}": x for name, x in mod._asdict().items()}
    return Station(
        "Velocity",
        "Noisy latent and condition, side by side, go through the transformer with the text; time, "
        "guidance and pooled text scale and shift every layer. It says dx/dt, noise minus picture. "
        "So x - t v is the picture that it expects, at every time.",
        (conditioning.velocity, Flux.modulation, Flux.__call__, flow.interpolate),
        {"img": img, "txt": j.canvas.txt, **shapes, "velocity": j.velocities[0]},
        [
            Figure(
                draw.label_columns(columns),
                "The query row at some times: what x is, decoded; what is expected, decoded; the "
                f"size of the velocity, by token, from 0 to {sizes.max():.1f}.",
            )
        ],
    )


def query_map(j, values, high):
    """A number for every token as a picture of the query row alone, as large as it is."""
    last = draw.spread_tokens(j.spec.grid, values)[-1]
    return draw.magnify(draw.colour(last, 0, high), PATCH)


def visit_steps(j):
    final = j.states[-1]
    count = len(j.spec.grid.query.pixels) // PATCH * (j.spec.grid.query.size[1] // PATCH)
    far = lambda x: np.sqrt(np.square(x[:, -count:] - final[-count:]).mean((1, 2)))  # noqa: E731
    figure, (panel,) = draw.new_figure(width=5, height=3)
    panel.plot(j.canvas.times, far(j.states), "o-", color="#999999", label="x")
    panel.plot(j.canvas.times[:-1], far(j.expected), "o-", color="#e25822", label="x - t v")
    panel.set(xlabel="t", ylabel="RMSE to the last x", xlim=(1.02, -0.02))
    panel.legend()
    return Station(
        "Euler steps",
        "x moves along the velocity from one time to the next. One program, compiled once, makes "
        "every step.",
        (flow.euler, euler_step, Painter.denoise),
        {"states": j.states, "the last": final},
        [
            Figure(
                draw.tile([j.decode(x) for x in j.states], 3),
                "The last row after every step; its given cell is painted along, and dropped.",
            ),
            Figure(
                draw.render_figure(figure), "How far the latent of the last row is from its end."
            ),
        ],
    )


def visit_picture(j):
    grid, pixels = j.spec.grid, j.canvas.pixels
    (target,) = grid.cut(pixels)
    error = rmse(target / 255, j.truth / 255)
    sheet = draw.label_columns({"painted": target[None], "truth": j.truth[None]})
    return Station(
        "The painted cell",
        "Only the query row is decoded. Pixels that were given are put back as they were, and the "
        f"asked cell is cut out. Its RMSE to the truth is {error:.3f}.",
        (Painter.decode, VAE.decode, Grid.keep, Grid.cut),
        {"latents": j.states[-1], "query row": pixels, "cell": target},
        [
            Figure(sheet, "The cell, and what was hidden.", 2),
            Figure(compose(grid, pixels), "The whole grid.", 2),
        ],
    )


STATIONS = (visit_condition, visit_noise, visit_velocity, visit_steps, visit_picture)
