"""The whole of it for a program: load once, then paint grids of pictures.

from vcloze_jax import Pipeline
painting = Pipeline.load()([["a_gray.png", "a.png"], ["b_gray.png", None]], seed=1)
painting.images[0].save("b.png")
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Never

import flax
import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from vcloze_jax import __version__
from vcloze_jax.config import UserError
from vcloze_jax.devices import describe_virtual, kernel_on, make_mesh, parse_mesh
from vcloze_jax.dial import measure_moves
from vcloze_jax.film import Step, tell_steps
from vcloze_jax.grid import Spec, bucket
from vcloze_jax.hosts import is_first, pick_share
from vcloze_jax.inputs.pictures import save_png, save_text
from vcloze_jax.inputs.prompts import count_unread, describe_unread
from vcloze_jax.inputs.sheet import cell_boxes, compose
from vcloze_jax.inputs.spec import read_spec
from vcloze_jax.inputs.specfiles import check_picked, output_names, read_specs
from vcloze_jax.inputs.world import describe_unlike_mini
from vcloze_jax.painter import Canvas
from vcloze_jax.placement import FILL
from vcloze_jax.programs import tally, timed
from vcloze_jax.references import choose_painter, part_sizes
from vcloze_jax.storage import adapters, places, weights
from vcloze_jax.storage.models import LazyModels, check_mesh

ONE = Spec | dict | str | os.PathLike  # what may be a spec
PARTS = ("load", "text", "vae", "compile", "paint", "decode")  # of the seconds in a record


@dataclass(frozen=True)
class Painting:
    """What came of one grid; its pictures are decoded when they are first asked for."""

    canvas: Canvas
    is_ours: bool  # of several hosts, which all painted it, one decodes and writes it
    moves: dict | None = None  # {change: RMSE to what was painted without it}, if asked for

    def decode(self):
        """Decode its pictures now. Raises FloatingPointError."""
        return self.images, self.grid

    @cached_property
    def images(self) -> list[Image.Image]:
        """The targets in column order, upsampled if that was asked for."""
        return [Image.fromarray(target) for target in self.canvas.targets]

    @cached_property
    def grid(self) -> Image.Image:
        """All cells, the painted ones marked at their corners."""
        return Image.fromarray(compose(self.canvas.spec.grid, self.canvas.pixels))

    @property
    def latents(self) -> np.ndarray:
        """float32 [S, 64], packed: all rows at t = 0, of the first pass."""
        return self.canvas.latents

    @property
    def record(self) -> dict:
        """The spec as resolved, prompt, sizes, boxes, tokens, seconds by part, versions."""
        moves = {} if self.moves is None else {"dial": self.moves}
        return describe(self.canvas) | moves

    @property
    def dropped(self):
        """How many tokens of the prompt each text encoder did not read: "3 T5, 20 CLIP" or ""."""
        return count_unread(self.record, "dropped_tokens")

    @property
    def unread(self):
        """What the text encoders did not read of the prompts, a sentence for each reason."""
        parts = {"prompt": self.record}
        for second_pass in self.record.get("upsampling", ()):
            parts["content_prompt"] = second_pass
        return [said for name, part in parts.items() for said in describe_unread(part, name)]

    @property
    def remarks(self):
        """All that may have made the picture worse, a sentence each."""
        return [*self.unread, *filter(None, [self.record["unlike_training"]])]

    def save(self, folder, name):
        """Write NAME.png, NAME_target0.png … and last the record, NAME.json; each atomically, into
        a folder that is made if need be; where another host writes it, nothing."""
        if not self.is_ours:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        names = output_names(name, len(self.images))
        grid, *targets, record = (Path(folder, name) for name in names)
        save_png(grid, np.asarray(self.grid))
        for file, image in zip(targets, self.images, strict=True):
            save_png(file, np.asarray(image))
        save_text(record, json.dumps(self.record, indent=1) + "\n")


class Pipeline:
    """Paints grids with one model on one mesh."""

    def __init__(self, painter):
        self.painter = painter

    @classmethod
    def load(cls, weights=None, lora=None, mesh=None, offload=False):
        """Make ready what paints; files are checked now, and read when they are first needed.

        `weights` is a folder (default: mini, with its adapter), `lora` a list of adapters, each
        "FILE", "FILE:SCALE" or (file, scale), or "NAME=FILE" for specs that pick it; `mesh` as the
        flag: 8 or "data=2,fsdp=4" (default: all accelerators, or one CPU). `offload` keeps the
        MMDiT's blocks in host memory. Raises UserError.
        """
        return cls(load_painter(weights, lora, mesh, offload))

    def __call__(
        self,
        image: list[list],
        *,
        task_prompt: str | None = None,
        content_prompt: str | None = None,
        layout_prompt: str | None = None,
        task: str | None = None,
        resolution: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        latents: np.ndarray | str | Path | None = None,
        upsampling: dict | None = None,
        adapter: str | None = None,
        progress: bool = False,
        on_step: Callable[[Step], None] | None = None,
        **unknown: Never,
    ) -> Painting:
        """Paint one grid. The keys are those of a spec; what is None is as if it were left away.

        `image` holds rows of cells, the last row asks. A cell is a path, a PIL image, an array
        (uint8, or float in [0, 1]; [h, w, 3], [h, w, 4] or [h, w]), None (to be painted) or
        {"image": …, "mask": …}. `latents` is the noise at t = 1, float32 [S, 64], packed.
        `progress` shows a bar of the steps; `on_step` is called with each. Raises UserError naming
        the key, and FloatingPointError for NaN.
        """
        given = dict(
            task_prompt=task_prompt,
            content_prompt=content_prompt,
            layout_prompt=layout_prompt,
            task=task,
            resolution=resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            latents=latents,
            upsampling=upsampling,
            adapter=adapter,
        )
        if not isinstance(image, list | tuple):
            raise UserError("image: rows of cells are wanted; paint([…]) takes specs and files")
        table = {key: value for key, value in given.items() if value is not None} | unknown
        table["image"] = image
        specs = [read_spec(table, self.painter.preset)]
        return self.paint(specs, progress=progress, on_step=on_step)[0]

    def paint(
        self,
        specs: Spec | dict | str | os.PathLike | list[Spec | dict | str | os.PathLike],
        *,
        progress: bool = False,
        on_step: Callable[[Step], None] | None = None,
        dial: bool = False,
    ) -> list[Painting]:
        """Paint specs as batches, in order, or one alone. Each is a Spec, what a spec's file would
        hold (where cells may be pictures, too), or the path of a file of specs or of a record;
        those that ask for several pictures give as many paintings. The `dial` paints each again
        with its examples in another order, one left out or all, and from other noises: how far it
        moves is in its record. Raises as a call does."""
        found, alone = [], isinstance(specs, ONE) or not isinstance(specs, Iterable)
        for i, spec in enumerate([specs] if alone else specs):
            read = isinstance(spec, Spec)
            found += [spec] if read else read_specs([spec], self.painter.preset, first=i)
        hooks = (steps_bar,) if progress else ()
        watch = tell_steps(on_step, self.painter) if on_step else None
        paint = partial(paint_by_adapter, self.painter)
        canvases = paint(found, *hooks, watch=watch)
        ours = pick_share(range(len(canvases)))
        moves = measure_moves(paint, canvases, *hooks) if dial else [None] * len(canvases)
        paintings = [
            Painting(canvas, i in ours, moved)
            for i, (canvas, moved) in enumerate(zip(canvases, moves, strict=True))
        ]
        for i in ours:
            paintings[i].decode()
        return paintings

    def summary(self) -> str:
        """The weights that paint, and the adapters folded into them, a line each; and a line where
        devices are virtual."""
        models = self.painter.models
        base = weights.summary(models.folder, self.painter.preset)
        lines = [f"weights: {base}", places.describe_adapters(models.folder, models.bank[None])]
        for name, pairs in models.bank.items():
            lines += [f"{name}: {places.describe_pairs(pairs)}"] if name else []
        lines += filter(None, [describe_virtual(self.painter.mesh)])
        return "\n".join(lines)


def load_painter(named, lora, mesh, offload=False):
    """A Painter of what those three name; see Pipeline.load."""
    common, bank = places.split_bank(lora)
    folder, loras = places.named_model(named, common)
    mesh = make_mesh(None if mesh is None else parse_mesh(str(mesh)))
    if offload and jax.process_count() > 1:
        raise UserError(
            "--offload: one host's memory is meant; of several, --mesh splits the MMDiT"
        )
    banked = [Path(file) for pairs in bank.values() for file, _ in pairs]
    if not (named or common) and adapters.agreed_placement(banked) not in (None, FILL):
        loras = []  # mini's own is for FILL
    files = dict.fromkeys([*(Path(file) for file, _ in loras), *banked])
    placement = adapters.agreed_placement([*files])
    if placement and not named:
        folder = places.shipped_weights(placement.name)
    preset = weights.checked_grid_preset(folder, placement)
    check_mesh(preset, mesh)
    for file in files:
        adapters.check(file, preset.flux)
    models = LazyModels(folder, preset, loras, mesh, offload, bank)
    return choose_painter(preset)(preset, models, models.text_reader(), mesh, timed)


def picked_adapter(spec):
    """The name of the adapter that a spec picks of the bank, or None."""
    return spec.resolved.get("adapter")


def paint_by_adapter(painter, specs, *hooks, watch=None):
    """What a Painter makes of specs, in their order, each painted by the adapter that it picks;
    those of one adapter together. Raises UserError for one that is not there."""
    groups, models = defaultdict(list), painter.models
    for i, spec in enumerate(specs):
        groups[picked_adapter(spec)].append(i)
        check_picked(spec, models.bank)
    canvases = {}
    for name in sorted(groups, key=lambda name: name != models.selected):
        models.select(name)
        painted = painter([specs[i] for i in groups[name]], *hooks, watch=watch)
        canvases |= dict(zip(groups[name], painted, strict=True))
    return [canvases[i] for i in range(len(specs))]


def describe(canvas):
    """All that made a picture, as JSON."""
    spec, painter = canvas.spec, canvas.painter
    grid = spec.grid
    preset = painter.preset
    models = painter.models
    adapted = models.bank[picked_adapter(spec)]
    own = all(Path(file).resolve() == places.MINI_LORA for file, _ in adapted)  # or there is none
    is_mini = own and models.folder.resolve() in places.MINIS
    record = {
        "spec": spec.resolved,
        "prompt": spec.prompt,
        "sizes": [[width // grid.columns, height] for height, width in grid.shape],
        "boxes": cell_boxes(grid),
        **describe_pass(canvas, preset),
        "compiles": tally["compiled"],
        "attention": kernel_on(painter.mesh, preset),
        "weights": str(models.folder),
        "adapters": places.describe_adapters(models.folder, adapted),
        "unlike_training": describe_unlike_mini(spec) if is_mini else "",
        "versions": {"vcloze_jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
    }
    if canvas.second_passes:
        record["upsampling"] = [describe_pass(again, preset) for again in canvas.second_passes]
    return record


def describe_pass(canvas, preset):
    """Tokens, what was not read of the prompt, and seconds of one pass, of this host: "vae" is 0
    where another one, whose device held the grid, has encoded it."""
    tokens = canvas.spec.grid.tokens
    sizes = dict(image=tokens, text=len(canvas.txt), bucket=bucket(tokens, preset.resolution))
    moving, once = part_sizes(canvas.spec.grid, preset)
    sizes |= dict(moving=moving, once=once) if once else {}
    seconds = {part: round(canvas.seconds[part], 4) for part in PARTS}
    return {"tokens": sizes, **canvas.unread, "seconds": seconds}


def steps_bar(steps, label):
    """The Euler steps of one batch as a progress bar, with the seconds that each takes."""
    form = "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
    how = dict(unit="step", dynamic_ncols=True, bar_format=form, disable=not is_first())
    return tqdm(steps, label, **how)
