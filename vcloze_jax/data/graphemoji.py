"""GraphEmoji: 1,569 subjects, each drawn in eight styles, as a dataset of tfds and as a Source.

It is a small stand-in for Graph200K; data/graph.py names its views and draws grids of them. The
pictures are 64 x 64 with true alpha, ship with the package and are read without TensorFlow. They
lie in two packs, because their licences differ: `main` (MIT, Apache-2.0, CC-BY-4.0) and `openmoji`
(CC-BY-SA-4.0); the LICENSES file in each folder names every author.
scripts/build_graphemoji.py draws both again.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vcloze_jax.config import Recipe, UserError
from vcloze_jax.data import conditions, graph
from vcloze_jax.data.conditions import CONDITIONS, derive, over_white
from vcloze_jax.data.graph import NODES, PACKS, SIZE, VIEWS
from vcloze_jax.data.sources import Example, Shape, random_generator
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.cachefolder import keep_array

FOLDER = Path(__file__).parent  # tfds adds graphemoji/CONFIG/VERSION
DERIVED_FROM = VIEWS.index("fluent_3d")  # the view that conditions are derived from
TEXTS = {"main": ("codepoint", "name", "group", "subgroup"), "openmoji": ("codepoint",)}

HELD_OUT = 128  # subjects
# A man, a woman or a person, a gender sign, an arrow, the joiner: they make relatives of an emoji.
RELATIVES = {"1f468", "1f469", "1f9d1", "2640", "2642", "27a1", "200d"}


class GraphEmoji(tfds.core.GeneratorBasedBuilder):
    """One record per subject: its texts and the views of one pack, in Unicode's order."""

    name = "graphemoji"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Fluent, Noto, Twemoji and OpenMoji 17 at 64 x 64."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=pack, description=", ".join(views))
        for pack, views in PACKS.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Run scripts/build_graphemoji.py, which draws the pictures."

    def _info(self) -> tfds.core.DatasetInfo:
        pack = self.builder_config.name
        texts = {key: tfds.features.Text() for key in TEXTS[pack]}
        views = {view: tfds.features.Image(shape=(SIZE, SIZE, 4)) for view in PACKS[pack]}
        return tfds.core.DatasetInfo(
            builder=self,
            description="The same subjects in several styles, RGBA, joined by codepoint.",
            features=tfds.features.FeaturesDict(texts | views),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        subjects = json.loads((dl_manager.manual_dir / "subjects.json").read_text())
        out = choose_held_out([subject["codepoint"] for subject in subjects])
        train = [subject for subject in subjects if subject["codepoint"] not in out]
        rest = [subject for subject in subjects if subject["codepoint"] in out]
        return {
            "train": self._generate_examples(train, dl_manager.manual_dir),
            "held_out": self._generate_examples(rest, dl_manager.manual_dir),
        }

    def _generate_examples(self, subjects, folder):
        pack = self.builder_config.name
        for i, subject in enumerate(subjects):
            texts = {key: subject[key] for key in TEXTS[pack]}
            yield i, texts | {view: folder / view / subject["codepoint"] for view in PACKS[pack]}


def choose_held_out(codepoints: list[str]) -> set[str]:
    """Choose `HELD_OUT` subjects by the hash of their family, whole families only.

    The family of "man cook" is what remains without man and joiner, so that "woman cook" is on the
    same side. A choice by hash is the same in every rebuild and favours no group.
    """
    families: dict[str, list[str]] = {}
    for codepoint in codepoints:
        family = "-".join(c for c in codepoint.split("-") if c not in RELATIVES)
        families.setdefault(family, []).append(codepoint)
    chosen: set[str] = set()
    for family in sorted(families, key=lambda f: hashlib.sha256(f.encode()).digest()):
        if len(chosen) + len(families[family]) <= HELD_OUT:
            chosen.update(families[family])
    return chosen


@dataclass(frozen=True, eq=False)
class Subjects:
    """N subjects in Unicode's order. Views stand in the order of `VIEWS`."""

    codepoints: list[str]  # "1f468-200d-1f373", without variation selectors
    names: list[str]
    groups: list[str]
    rgba: np.ndarray  # uint8 [N, 8, 64, 64, 4], alpha not premultiplied


def read_subjects(split: str) -> Subjects:
    """Read all eight views of a split ("train" or "held_out"), the two packs joined by codepoint.

    Takes about 2 ms a subject, most of it in decoding WebP. Raises ValueError from tfds for
    another split and KeyError if a subject of `main` is missing in `openmoji`.
    """
    main, openmoji = (
        {record["codepoint"].decode(): record for record in _records(pack, split)} for pack in PACKS
    )
    rgba = np.empty((len(main), len(VIEWS), SIZE, SIZE, 4), np.uint8)
    for codepoint, pictures in zip(main, rgba, strict=True):
        record = main[codepoint] | openmoji[codepoint]
        for view, picture in zip(VIEWS, pictures, strict=True):
            picture[:] = Image.open(io.BytesIO(record[view])).convert("RGBA")
    names, groups = ([r[key].decode() for r in main.values()] for key in ("name", "group"))
    return Subjects(list(main), names, groups, rgba)


def _records(pack, split):
    """The records of one pack, pictures as encoded bytes (tfds alone would warn without OpenCV)."""
    builder = GraphEmoji(config=pack, data_dir=FOLDER)
    encoded = {view: tfds.decode.SkipDecoding() for view in PACKS[pack]}
    return builder.as_data_source(split, decoders=encoded)


def derive_nodes(subjects: Subjects) -> np.ndarray:
    """All `NODES` of all subjects, the conditions from one view: uint8 [N, 17, 64, 64, 3].

    The seed of a subject is its codepoint, so a picture does not depend on who stands beside it.
    """
    pictures = np.empty((len(subjects.codepoints), len(NODES), SIZE, SIZE, 3), np.uint8)
    for codepoint, rgba, row in zip(subjects.codepoints, subjects.rgba, pictures, strict=True):
        seed = [int(c, 16) for c in codepoint.split("-")]
        row[: len(VIEWS)] = over_white(rgba)
        for name, picture in zip(CONDITIONS, row[len(VIEWS) :], strict=True):
            picture[:] = derive(rgba[DERIVED_FROM], name, seed)
    return pictures


@cache
def read_nodes(split: str) -> tuple[list[str], np.ndarray]:
    """The names of a split's N subjects and all their `NODES`, uint8 [N, 17, 64, 64, 3].

    Derived once and kept, so that an example is a look-up and no large accelerator is starved; a
    later process finds them in the cache.
    """

    def make():
        subjects = read_subjects(split)
        nodes = derive_nodes(subjects)
        table = np.empty(len(nodes), [("name", "U64"), ("nodes", "u1", nodes.shape[1:])])
        table["name"], table["nodes"] = subjects.names, nodes
        return table

    table = keep_array(f"graphemoji-{split}", digest_derivation(), make)
    return table["name"].tolist(), np.asarray(table["nodes"])


def digest_derivation() -> str:
    """Of all that the nodes are made of: the packs, our code, and the libraries that it calls."""
    files = [*sorted(FOLDER.glob("graphemoji/*/*/*")), Path(__file__), Path(conditions.__file__)]
    libraries = [f"{name} {version(name)}" for name in ("numpy", "scipy", "scikit-image", "pillow")]
    found = hashlib.sha256(f"{NODES} {libraries}".encode())
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class GraphEmojiGrids:
    """A Source: grids of a split's subjects, whose pictures are read when the first is wanted."""

    split: str
    choose_shape: Callable  # rng -> Shape
    choose_sample: Callable  # rng, Shape, names, query -> Sample
    all_shapes: tuple[Shape, ...]
    masks_every_row: bool = False
    content: str = ""  # its tasks in words

    @property
    def names(self) -> list[str]:
        """What the prompts call the N subjects."""
        return read_nodes(self.split)[0]

    @property
    def pictures(self) -> np.ndarray:
        """uint8 [subject, node, 64, 64, 3]."""
        return read_nodes(self.split)[1]

    def held_out(self) -> "GraphEmojiGrids":
        """The same kind of grids of the subjects that are never trained on."""
        return replace(self, split="held_out")

    def digest(self) -> str:
        """Of the pack, which ships with the code, and of what is drawn of it."""
        what = f"{GraphEmoji.VERSION} {self.content} {self.all_shapes}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """Its tasks, and on how many subjects they are shown."""
        tasks = self.content.count("->")
        return f"GraphEmoji: {len(self.names)} subjects, {tasks or 'no'} tasks"

    def shape(self, rng: np.random.Generator) -> Shape:
        """What the members of a group share."""
        return self.choose_shape(rng)

    def shapes(self) -> list[Shape]:
        """All that are drawn."""
        return list(self.all_shapes)

    def count(self, shape: Shape) -> int:
        """Every subject may stand in the last row."""
        return len(self.names)

    def previews(self) -> list[Example]:
        """Two questions, each with 0, 1 and 2 examples."""
        examples = []
        for number in range(2):
            rng = random_generator("preview", 0, number)
            shape = self.shape(rng)._replace(rows=3)
            query = int(rng.integers(len(self.names)))
            drawn = self.choose_sample(rng, shape, self.names, query)
            for rows in (1, 2, 3):
                nodes, subjects = drawn.nodes[-rows:], drawn.subjects[-rows:]
                of_task = self.content != "fill"  # which is never told one
                sample = graph.ask_last(nodes, subjects, self.names, of_task)
                examples.append(self.picture(sample))
        return examples

    def example(self, rng: np.random.Generator, shape: Shape, queries: Iterable[int]) -> Example:
        """Draw one example of that shape; any subject can be shown."""
        return self.picture(self.choose_sample(rng, shape, self.names, int(next(iter(queries)))))

    def picture(self, sample: graph.Sample) -> Example:
        """Look the sample's cells up."""
        subjects = sample.subjects.reshape(len(sample.nodes), -1)  # R 1 or R C
        nodes = [[NODES.index(node) for node in row] for row in sample.nodes]
        grid = Grid.from_cells(self.pictures[subjects, nodes], sample.mask)
        return Example(grid, sample.prompt, sample.nodes[-1][-1])


def open_tasks(task: str, recipe: Recipe) -> GraphEmojiGrids:
    """Grids of all trained tasks, or of the one that is named. Raises UserError for a name that is
    no task, and for cells of another size than the pack's."""
    check_resolution(recipe)
    try:
        tasks = {graph.parse_task(task): 1.0} if task else graph.TRAIN
    except ValueError as error:
        raise UserError(f"--data {error}") from None
    draw_sample = partial(graph.draw_sample, recipe=recipe, tasks=tasks)
    draw_shape = partial(graph.draw_shape, tasks=tasks)
    shapes = graph.list_shapes(tasks)
    content = ", ".join(f"{task.name} {weight:.6g}" for task, weight in tasks.items())
    return GraphEmojiGrids("train", draw_shape, draw_sample, shapes, content=content)


def open_fill(part: str, recipe: Recipe) -> GraphEmojiGrids:
    """Grids with holes in any row, of no task: what mini's infilling base learns from. Raises
    UserError for cells of another size than the pack's."""
    check_resolution(recipe)
    shapes = tuple(Shape(*shape, SIZE, SIZE) for shape in graph.FILL_SHAPES)
    draw_sample = partial(graph.draw_fill, recipe=recipe)
    return GraphEmojiGrids("train", graph.draw_fill_shape, draw_sample, shapes, True, "fill")


def check_resolution(recipe: Recipe) -> None:
    """Raise UserError unless cells are as large as the pack's pictures."""
    if recipe.resolution != SIZE:
        reason = f"GraphEmoji's pictures have {SIZE} x {SIZE} pixels"
        raise UserError(f"--resolution {recipe.resolution}: {reason}; leave it at {SIZE}")
