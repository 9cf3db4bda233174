"""Photographs where GraphEmoji's subjects stand: pictures of a domain that mini never saw.

A photograph takes the place of the 3D view; its conditions are derived as those of emoji are. What
only a drawing has (other styles, a silhouette) it has not, and no question asks for it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.data.conditions import CONDITIONS, derive
from vcloze_jax.data.graph import NODES, SIZE
from vcloze_jax.data.pairfolders import walk_pictures
from vcloze_jax.inputs.pictures import measure_picture, open_picture

VIEW = "fluent_3d"  # whose place a photograph takes
DERIVED = [name for name in CONDITIONS if name not in ("mask", "distance")]  # these need an outline
# The colour photographs that scikit-image ships (its LICENSE.txt names their makers).
SHIPPED = (
    "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png "
    "retina.jpg rocket.jpg"
).split()
PARTS = 4  # of a photograph, each a subject: three squares along it, and the middle, nearer
LEAST = 3  # photographs: two to show, one to ask of


@dataclass(frozen=True, eq=False)
class Photographs:
    """A source of subjects as Asker wants it: the parts of some photographs, all the first parts
    first."""

    names: list[str]
    pictures: np.ndarray  # uint8 [N, 17, 64, 64, 3]; what a photograph has not is black

    def choose_examples(self, subject, count):
        """The same part of the photographs that follow: `count` numbers."""
        files = len(self.names) // PARTS
        part, file = divmod(int(subject), files)
        return [part * files + (file + step) % files for step in range(1, count + 1)]


def read_photographs(folder=None):
    """Those of the user's folder, or those that scikit-image ships. Raises UserError naming the
    folder or the file."""
    files = photograph_files(folder) if folder else [shipped_folder() / name for name in SHIPPED]
    parts = [cut_parts(open_picture(file)) for file in files]  # [file][part]
    names = [f"{file.stem}, part {part + 1}" for part in range(PARTS) for file in files]
    views = [of_file[part] for part in range(PARTS) for of_file in parts]
    return Photographs(names, np.stack([*map(derive_views, views, range(len(views)))]))


def photograph_files(folder):
    """Pictures in a folder, in order. Raises UserError, also for one that cannot be read."""
    if not Path(folder).is_dir():
        raise UserError(f"--photographs {folder}: there is no such folder")
    files = [*walk_pictures(Path(folder))]
    for file in files:
        measure_picture(file)
    if len(files) < LEAST:
        raise UserError(f"--photographs {folder}: holds {len(files)} pictures; {LEAST} are needed")
    return files


def shipped_folder():
    """Where scikit-image keeps its pictures."""
    import skimage.data

    return Path(skimage.data.__file__).parent


def cut_parts(picture):
    """Squares of an RGB picture, uint8 [64, 64, 3] each: both ends and the middle of its longer
    side, and the middle at twice the size."""
    w, h = picture.size
    side = min(w, h)
    boxes = [((w - side) * k // 2, (h - side) * k // 2, side) for k in range(3)]
    boxes.append(((w - side // 2) // 2, (h - side // 2) // 2, side // 2))
    squares = [picture.crop((x, y, x + s, y + s)) for x, y, s in boxes]
    return [np.asarray(s.resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for s in squares]


def derive_views(view, seed):
    """All nodes that a photograph has: uint8 [17, 64, 64, 3]."""
    nodes = np.zeros((len(NODES), SIZE, SIZE, 3), np.uint8)
    nodes[NODES.index(VIEW)] = view
    rgba = np.dstack([view, np.full((SIZE, SIZE), 255, np.uint8)])
    for name in DERIVED:
        nodes[NODES.index(name)] = derive(rgba, name, seed)
    return nodes
