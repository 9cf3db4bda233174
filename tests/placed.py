"""Models and grids of each placement, for the tests of placements."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import test_mmdit
import tiny
from flax import nnx
from safetensors.numpy import load_file

from vcloze_jax.conditioning import segment_table
from vcloze_jax.devices import make_mesh
from vcloze_jax.grid import Grid, Row
from vcloze_jax.inputs.papers import DEV, FRAMES, KLEIN, KONTEXT, PLACEMENTS
from vcloze_jax.placement import FILL
from vcloze_jax.storage.models import grow
from vcloze_jax.storage.weights import Flux, build

DATA = Path(__file__).parent / "data"
MESH = make_mesh(dict(data=1, fsdp=1, tensor=1))
TORCH = DEV, KONTEXT, FRAMES, KLEIN  # those of which the fixture holds a velocity
CLEAN = [placement for placement in PLACEMENTS.values() if any(placement.clean)]
NOISE = replace(FILL, enters=("text", "noise", "noise", "noise", "noise"))  # FLUX.1-dev's own
NAME = dict(ids=lambda placement: placement.name)


@cache
def stored():
    return load_file(DATA / "placements.safetensors")


@cache
def base(placement, **changes):
    """The fixture's transformer of 64 channels, or a placement's, as it begins."""
    flux = tiny.flux(in_channels=placement.channels, **changes)
    config = replace(flux.config, placement=placement)
    return build(Flux, config, grow(nnx.to_pure_dict(nnx.state(flux)), config, MESH))


def model(placement):
    """The same, with the fixture's weights where the placement has some of its own."""
    graphdef, state = nnx.split(base(placement))
    tree, own = nnx.to_pure_dict(state), {k: x for k, x in stored().items() if "cond/" in k}
    if placement.embeds:
        dense = lambda name: (own[f"cond/{name}.weight"].T, own[f"cond/{name}.bias"])  # noqa: E731
        at = lambda i: dense(f"norms.{i}.linear")  # noqa: E731
        kinds = (tree["double"]["img"], range(2)), (tree["single"], range(2, 4))
        for stream, layers in kinds:
            arrays = map(np.stack, zip(*map(at, layers), strict=True))
            stream["cond_mod"] = dict(zip(("kernel", "bias"), arrays, strict=True))
        tree["cond_in"] = dict(zip(("kernel", "bias"), dense("embedding"), strict=True))
    return nnx.merge(graphdef, tiny.cast(tree, jnp.float32))


def grid(blank=1):
    """The fixture's: two rows of two cells, the query's cell of that column blank."""
    rng, rows = np.random.default_rng(0), []
    for h, w in ((32, 32), (16, 64)):
        rows.append(Row(rng.integers(0, 256, (h, w, 3), np.uint8), np.zeros((h, w), bool)))
    rows[1].mask[:, blank * 32 : blank * 32 + 32] = True
    return Grid(tuple(rows), 2)


def inputs(placement, channels=64):
    """Arguments of test_mmdit.velocity but the model, and its segments."""
    args = test_mmdit.inputs()
    pe = test_mmdit.table(grid().ids(placement))
    segments = segment_table([grid()] * 2, placement, 8)
    args["img"] = args["img"][..., :channels]
    return args | dict(pe=pe, segments=segments)


@jax.jit
def velocity(flux, img, txt, pooled, t, guidance, pe, segments, lengths=None, **_):
    return flux(img, txt, flux.modulation(t, guidance, pooled), pe, lengths, segments)


def run(flux, ids=None, **args):
    return velocity(flux, **args)
