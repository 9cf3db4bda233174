"""The steps of a painting as they are taken: for a callback, for a film."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vcloze_jax.grid import Spec
from vcloze_jax.hosts import is_first
from vcloze_jax.inputs.pictures import save_film
from vcloze_jax.inputs.sheet import compose, compose_columns
from vcloze_jax.inputs.specfiles import output_names


@dataclass(frozen=True, eq=False)
class Step:
    """One grid after one Euler step."""

    spec: Spec
    index: int  # of the step, from 0
    count: int  # of all steps
    time: float  # from 1, noise, to 0, the picture
    latents: np.ndarray  # float32 [S, 64], packed, at that time
    expected: np.ndarray  # float32 [S, 64], at time 0, were the velocity to stay as it was
    decode: object  # (grid, latents) -> uint8 [h, C*w, 3], the query row

    @property
    def second_pass(self):
        """Whether it enlarges a target, which is then all of its grid."""
        return self.spec.strength is not None

    def preview(self) -> Image.Image:
        """The grid as it is expected to end; decoded now, and only if it is asked for."""
        grid = self.spec.grid
        return Image.fromarray(compose(grid, self.decode(grid, self.expected)))

    def sheet(self) -> Image.Image:
        """The grid as it is, noise and all, and beside it as it is expected to end, labelled."""
        grid, title = self.spec.grid, f"step {self.index + 1} of {self.count}"
        rows = {"is": self.decode(grid, self.latents), "will be": self.decode(grid, self.expected)}
        return Image.fromarray(compose_columns(title, grid, rows))


def tell_steps(on_step, painter):
    """What a Painter tells of its batches, told grid by grid: `on_step(Step)`."""

    def watch(canvases, i, *batch):
        for canvas, *states in zip(canvases, *batch, strict=False):  # it may end in copies
            before, latents = (padded[: canvas.spec.grid.tokens] for padded in states)
            t, t_next = canvas.times[i : i + 2]
            expected = latents - t_next * (latents - before) / (t_next - t)
            count = len(canvas.times) - 1
            step = Step(canvas.spec, i, count, float(t_next), latents, expected, painter.decode)
            on_step(step)

    return watch


class Film:
    """Writes FOLDER/NAME_film.webp of each grid when its last step is done: the sheets of its first
    pass, each of which a call returns; of several hosts the first does. Give it as `on_step`."""

    def __init__(self, folder):
        self.folder, self.frames = Path(folder), defaultdict(list)

    def __call__(self, step):
        if not is_first():
            return None
        sheet = step.sheet()
        if step.second_pass:
            return sheet
        self.frames[step.spec].append(sheet)  # by identity: two may have one name
        if step.index == step.count - 1:
            *_, name, _ = output_names(step.spec.name, 0, film=True)
            frames = self.frames.pop(step.spec)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_film(self.folder / name, frames)
        return sheet
