"""What the page asks for, without the page: grids of cells in, sheets as they come, files kept."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.film import Film
from vcloze_jax.inputs.pictures import open_picture, save_png, to_mask
from vcloze_jax.inputs.sheet import MARK
from vcloze_jax.inputs.specfiles import read_specs
from vcloze_jax.pipeline import Pipeline


class Studio:
    """Paints grids with one model, whose adapters may be changed, into the folder `out`."""

    def __init__(self, weights, lora, mesh, out, offload=False):
        self.weights, self.mesh, self.offload = weights, mesh, offload
        self.out, self.pipeline = out, None
        self.worker = ThreadPoolExecutor(1)  # one grid at a time
        self.marked = {}  # bytes of a picture with its mask drawn in: the cell that it shows
        self.load(list(map(name_adapter, lora or [])))

    def load(self, adapters):
        """Make the pipeline of these adapters, as --lora names them, unless it is the one at
        hand."""
        if self.pipeline is None or adapters != self.adapters:
            self.pipeline = Pipeline.load(self.weights, adapters, self.mesh, self.offload)
            self.adapters, self.preset = adapters, self.pipeline.painter.preset

    def paint(self, rows, table, adapters):
        """Paint a grid; yields {name: file of a sheet} as often as it changes, and last
        {name: Painting}.

        `rows` holds cells as `save_cell` takes them, `table` the other keys of a spec. Raises
        UserError and FloatingPointError as sample.py does.
        """
        frames, sheets, numbers = SimpleQueue(), {}, count()
        with TemporaryDirectory() as folder:

            def tell(name, sheet):  # a file is written once: while it is sent it must not change
                file = Path(folder, f"{next(numbers)}.png")
                with suppress(FileNotFoundError):  # the browser has left, and the folder is gone
                    sheet.save(file)
                    frames.put({name: str(file)})

            job = self.worker.submit(self.run, rows, table, adapters, tell)
            while not (job.done() and frames.empty()):
                try:
                    sheets |= frames.get(timeout=0.1)
                except Empty:
                    continue
                if frames.empty():  # a browser that is slower than the steps sees the last of them
                    yield sheets
        yield job.result()

    def run(self, rows, table, adapters, tell):
        """`paint`, in the thread that computes; `tell(name, sheet)` after each step."""
        self.load(adapters)
        numbers = (n for n in count() if not [*self.out.glob(f"page{n}[_.]*")])
        name = f"page{next(numbers)}"
        folder = self.out / f"{name}_inputs"
        folder.mkdir(parents=True)
        try:
            cells = [
                [self.save_cell(cell, folder / f"{r}_{c}") for c, cell in enumerate(row)]
                for r, row in enumerate(rows)
            ]
            specs = read_specs([{"image": cells, **table}], self.preset)
        except (UserError, OSError):
            shutil.rmtree(folder)
            raise
        specs = [replace(spec, name=spec.name.replace("grid-0", name)) for spec in specs]
        film = Film(self.out)
        watch = lambda step: tell(step.spec.name, film(step))  # noqa: E731
        painted = self.pipeline.paint(specs, on_step=watch)
        for spec, painting in zip(specs, painted, strict=True):
            painting.save(self.out, spec.name)
        return {spec.name: painting for spec, painting in zip(specs, painted, strict=True)}

    def open(self, file):
        """The first spec of a file, or a record's: rows of cells for the page, and its keys."""
        spec = read_specs([file], self.preset)[0].resolved
        *examples, query = spec["image"]
        return examples, [self.show_cell(cell) for cell in query], spec

    def save_cell(self, cell, stem):
        """A cell of the page -> a cell of a spec, its pictures saved as files that begin with
        `stem`.

        It is the path of a picture, None, or what a brush leaves: {"background": RGBA picture or
        None, "layers": [RGBA of the strokes]}.
        """
        if cell is None:
            return None
        if not isinstance(cell, dict):
            return shutil.copyfile(cell, f"{stem}{Path(cell).suffix}")
        picture = cell["background"]
        strokes = [np.asarray(x)[..., 3] > 0 for x in cell["layers"]]
        if picture is None or picture.mode == "RGBA" and not picture.getchannel("A").getbbox():
            return None
        if known := self.marked.get(picture.convert("RGB").tobytes()):
            picture, mask = open_cell(known)
            strokes.append(mask)
        file = f"{stem}.png"
        save_png(file, np.asarray(picture))
        if not (mask := np.any(strokes, axis=0)).any():
            return file
        save_png(f"{stem}_mask.png", np.uint8(255) * mask)
        return {"image": file, "mask": f"{stem}_mask.png"}

    def show_cell(self, cell):
        """A cell of a resolved spec -> what a brush may go on with, or None; see `save_cell`.

        Gradio 6 draws no layer that it is given, and forgets it at the next stroke: so the mask is
        drawn into the picture that is seen, which is remembered.
        """
        if cell is None:
            return None
        if not isinstance(cell, dict):
            return {"background": open_picture(cell), "layers": [], "composite": None}
        picture, mask = open_cell(cell)
        strokes = np.zeros((*mask.shape, 4), np.uint8)
        strokes[mask] = *MARK, 255
        layer, seen = Image.fromarray(strokes), picture.copy()
        seen.paste(layer, mask=layer)
        self.marked[seen.tobytes()] = cell
        return {"background": picture, "layers": [layer], "composite": seen}


def name_adapter(adapter):
    """One of --lora, read, as it was given: [NAME=]FILE:SCALE."""
    *name, file, scale = adapter
    return "=".join([*name, f"{file}:{scale!r}"])


def open_cell(cell):
    """A picture, RGB, and its mask, bool [h, w], of a cell that is painted in part."""
    return open_picture(cell["image"]), to_mask(open_picture(cell["mask"], "black"))
