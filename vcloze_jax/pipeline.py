"""The whole of it for a program: load once, then paint grids of pictures.

from vcloze_jax import Pipeline
painting = Pipeline.load()([["a_gray.png", "a.png"], ["b_gray.png", None]], seed=1)
painting.images[0].save("b.png")
"""

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from vcloze_jax.inputs.pictures import save_png, save_text
from vcloze_jax.inputs.spec import output_names, read_spec
from vcloze_jax.model.lora import fold
from vcloze_jax.model.text import Tokenizers
from vcloze_jax.painter import Job, Painter, versions
from vcloze_jax.sharding import compute_dtype, make_mesh, parse_mesh, put, shardings
from vcloze_jax.storage import adapters, places, weights
from vcloze_jax.storage.textreader import TextCache


@dataclass(frozen=True)
class Painting:
    """What came of one grid."""

    images: list[Image.Image]  # the targets in column order, upsampled if that was asked for
    grid: Image.Image  # all cells, the painted ones marked at their corners
    record: dict  # the spec as resolved, prompt, sizes, boxes, tokens, seconds by part, versions

    @property
    def dropped(self):
        """How many tokens of the prompt each text encoder did not read: "3 T5, 20 CLIP" or ""."""
        lost = self.record["dropped_tokens"].items()
        return ", ".join(f"{count} {encoder.upper()}" for encoder, count in lost if count)

    def save(self, folder, name):
        """Write NAME.png, NAME_target0.png … and last the record, NAME.json; each atomically."""
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
    def load(cls, weights=None, lora=None, mesh=None):
        """Make ready what paints; files are checked now, and read when they are first needed.

        `weights` is a folder (default: mini, with its adapter), `lora` a list of adapters, each
        "FILE", "FILE:SCALE" or (file, scale), `mesh` as the flag: "8" or "data=2,fsdp=4" (default:
        all accelerators, or one CPU). Raises UserError.
        """
        return cls(load_painter(weights, lora, mesh))

    def __call__(self, image, **spec):
        """Paint one grid -> Painting.

        `image` holds rows of cells: a PIL image, a path, None (to be painted) or {"image": …,
        "mask": …}; the last row asks. The rest are the keys of a spec: task_prompt, content_prompt,
        layout_prompt, task, resolution, num_inference_steps, guidance_scale, seed, latents,
        upsampling. Raises UserError naming the key, and FloatingPointError for NaN.
        """
        table = {"image": [list(row) for row in image], **spec}
        return self.paint([read_spec(table, self.painter.preset)])[0]

    def paint(self, specs, progress=lambda steps, label: steps):
        """Paint specs (spec.py) as batches -> list of Painting, in order."""
        return list(map(painting, specs, self.painter(list(map(job, specs)), progress)))


def job(spec):
    """A spec as the Painter takes it."""
    numbers = (spec.num_inference_steps, spec.guidance_scale, spec.seed, spec.latents)
    return Job(spec.grid, spec.prompt, *numbers, spec.upsampling, spec.content_prompt)


def painting(spec, painted):
    """A spec and what the Painter made of it -> Painting."""
    grid = spec.grid
    record = {
        "spec": spec.resolved,
        "prompt": spec.prompt,
        "sizes": [[width // grid.columns, height] for height, width in grid.shape],
        "boxes": grid.boxes,
        **painted.record,
    }
    sheet = Image.fromarray(grid.compose(painted.pixels))
    return Painting([Image.fromarray(target) for target in painted.targets], sheet, record)


def load_painter(folder, lora, mesh):
    """A Painter of what those three name; see Pipeline.load."""
    folder, loras = places.model_of(folder, lora)
    mesh = make_mesh(parse_mesh(mesh) if mesh else None)
    preset = weights.check_fill(folder)
    for file, _ in loras:
        adapters.check(file, preset.flux)
    tokenizers = Tokenizers(folder, preset.t5, preset.clip)
    shelf = Shelf(folder, preset, loras, mesh)
    return Painter(preset, shelf, tokenizers, mesh, shelf.remember)


class Shelf:
    """The models of a weights folder, each put on the mesh when it is first asked for.

    MMDiT and autoencoder stay there. The text encoders, half as large as the MMDiT and needed for
    a moment, are loaded whenever they are asked for, and live no longer than they are held.
    """

    def __init__(self, folder, preset, loras, mesh):
        self.folder, self.preset, self.loras, self.mesh = folder, preset, loras, mesh
        self.dtype = compute_dtype(mesh)

    @cached_property
    def flux(self):
        """The MMDiT, with the adapters folded in."""
        graphdef, state = nnx.split(self.load("flux"))
        tree = nnx.to_pure_dict(state)
        del state  # or the weights before the folding would be held till its end
        for file, scale in self.loras:
            adapter = put(adapters.load(file, self.preset.flux), self.mesh, "flux/")
            fold_into(tree, adapter, scale)
        return nnx.merge(graphdef, tree)

    @cached_property
    def vae(self):
        return self.load("vae")

    @property
    def t5(self):
        return self.load("t5")

    @property
    def clip(self):
        return self.load("clip")

    def load(self, name):
        place = partial(shardings, mesh=self.mesh, root=f"{name}/")
        config = getattr(self.preset, name)
        return weights.load(weights.MODULES[name], config, self.folder, self.dtype, place)

    def remember(self, encode, *ids):
        """Text embeddings of these encoders on this mesh: from disk, or else by `encode`."""
        t5, clip = self.preset.t5, self.preset.clip
        shapes = [(t5.max_length, t5.width), (clip.width,)]
        cache = TextCache(places.cache_folder() / "text", self.identity(), shapes, self.dtype)
        return cache(encode, *ids)

    def identity(self):
        """All that an embedding depends on beside its ids. Files are known as git knows them: by
        name, size, time of change and inode."""
        stats = [(file.name, file.stat()) for file in self.text_files]
        files = [(name, s.st_size, s.st_mtime_ns, s.st_dev, s.st_ino) for name, s in stats]
        mesh = dict(self.mesh.shape), self.mesh.devices.flat[0].device_kind
        return repr((files, self.preset.t5, self.preset.clip, self.dtype, mesh, versions()))

    @cached_property
    def text_files(self):
        """The files of both text encoders."""
        paths = [
            weights.plan(weights.MODULES[name], getattr(self.preset, name), self.folder)[0].path
            for name in ("t5", "clip")
        ]
        files = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths]
        return [file for part in files for file in part]


def fold_into(tree, adapter, scale):
    """lora.fold in place and layer by layer, so that two whole trees are never held."""
    for name, branch in adapter.items():
        if isinstance(branch, dict) and any(isinstance(b, dict) for b in branch.values()):
            fold_into(tree[name], branch, scale)
        else:
            tree.update(fold({name: tree.pop(name)}, {name: branch}, scale))
