"""The user's own grids and pairs as a Source.

Of pairs, a grid is made of one, two or three rows; a grid of a file is taken as it stands. Both get
the paper's recipe (data/draws.py): conditions shuffled, any cell blank, sentences drawn.
"""

import hashlib
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vcloze_jax.config import Recipe, UserError
from vcloze_jax.data.draws import ROWS, draw_blank, draw_order, draw_rows, draw_sentences, renumber
from vcloze_jax.data.jsonlines import LineSamples, OwnSample
from vcloze_jax.data.pairfolders import FolderSamples, read_samples
from vcloze_jax.data.sizes import (
    SPOT,
    distance,
    fill_buckets,
    find_near,
    find_table,
    has_masks,
    measure_samples,
    merge_buckets,
    spread_evenly,
)
from vcloze_jax.data.sources import SPARE, Example, Shape, random_generator
from vcloze_jax.grid import Grid
from vcloze_jax.inputs.cells import MAX_TOKENS, cover, fit_cell
from vcloze_jax.inputs.pictures import open_picture, quiet_decoders
from vcloze_jax.inputs.spec import open_cells, sentences

HELD_OUT = 4  # samples at least, but never more than half
PREVIEWS = 4  # of grids that a file holds
SHOWN = 5  # names of others that are broken
MAX_BROKEN = 0.01  # share of the samples
ASKED = dict(reverse_masking=0.0, keep_order=True, task_sentence=1.0, content_sentence=1.0)
ASKED |= dict(fixed_templates=True, caption_dropout=0.0)  # what previews are drawn by


class Broken:
    """Samples that cannot be learnt from, as all threads find them: named once, and skipped.
    Raises UserError when they are more than `MAX_BROKEN` of all."""

    def __init__(self, samples, reasons: dict[int, str]):
        self.samples, self.reasons, self.lock = samples, reasons, threading.Lock()
        self.limit = int(MAX_BROKEN * len(samples))
        if reasons:
            self.tell(next(iter(reasons)))

    def note(self, i: int, reason: str) -> None:
        """That sample is broken, for that reason."""
        with self.lock:
            if i not in self.reasons:
                self.reasons[i] = reason
                self.tell(i)

    def tell(self, i: int) -> None:
        """Name one, and count them all."""
        count = len(self.reasons)
        others = [self.samples.name(k) for k in self.reasons if k != i][-SHOWN:]
        message = f"{self.samples.name(i)}: {self.reasons[i]}"
        message += f" ({count} of {len(self.samples)} samples broken, {self.limit} allowed"
        message += f"; {', '.join(others)})" if others else ")"
        if count > self.limit:
            raise UserError(message)
        tqdm.write(f"skipped: {message}", file=sys.stderr)


class Read(NamedTuple):
    """A sample as it is learnt."""

    number: int
    sample: OwnSample
    pixels: np.ndarray  # uint8 [r, C, h, w, 3]
    mask: np.ndarray  # bool [r, C, h, w]


@dataclass(frozen=True, eq=False)
class OwnGrids:
    """A Source: some samples of a file or a folder, in their buckets."""

    samples: LineSamples | FolderSamples
    recipe: Recipe
    broken: Broken
    pairs: bool
    buckets: dict[Shape, np.ndarray]  # numbers of samples; of pairs by shapes of one row
    reserve: dict[Shape, np.ndarray] = field(default_factory=dict)  # those held out
    content: str = ""  # digest
    masks_every_row = False

    def digest(self) -> str:
        """Of the lines or names, the sizes of all pictures, and the files of some samples."""
        return self.content

    def look_at_some(self, table: np.ndarray) -> str:
        """Read some samples, spread evenly, so that mistakes show early, all of a bucket that a few
        broken ones would leave without a grid, and all where one is too many -> the digest, of
        those that are spread."""
        content = hashlib.sha256(self.samples.digest.encode() + table.tobytes())
        buckets = *self.buckets.items(), *self.reserve.items()
        for part in (self.buckets, self.reserve):
            content.update(np.sort(np.concatenate([*part.values(), table[:0, 0]])).tobytes())
        spot, few = spread_evenly(len(table)), max(ROWS) + min(self.broken.limit, SPOT)
        numbers = {*spot}.union(*(members.tolist() for _, members in buckets if len(members) < few))
        numbers = sorted(numbers) if self.broken.limit else range(len(table))
        places = [(i, shape) for i in numbers for shape, members in buckets if i in members]
        for i, shape in places:
            try:
                with quiet_decoders():
                    found = self.read(int(i), shape)
            except UserError as error:
                self.broken.note(int(i), str(error))
                continue
            if i not in spot:
                continue
            content.update(repr(found.sample).encode())
            cells = [cell for row in found.sample.rows for cell in row]
            files = [f for c in cells for f in (c.values() if isinstance(c, dict) else [c])]
            for file in filter(None, files):  # a mask may be null
                content.update((self.samples.folder / file).read_bytes())
        return content.hexdigest()[:16]

    def without_broken(self) -> "OwnGrids":
        """The same, but for the samples that are known to be broken, and buckets of such alone."""
        known, parts = [*self.broken.reasons], []
        for part in (self.buckets, self.reserve):
            left = {shape: np.setdiff1d(members, known) for shape, members in part.items()}
            parts.append({shape: members for shape, members in left.items() if len(members)})
        return replace(self, buckets=parts[0], reserve=parts[1])

    def summary(self) -> str:
        """Samples, held out and broken ones, and how many are in which bucket."""
        kind = "pairs" if self.pairs else "grids"
        held = sum(map(len, self.reserve.values()))
        count = sum(map(len, self.buckets.values()))
        lines = [f"{self.recipe.data}: {count} {kind} to learn from, {held} held out"]
        if held and held != round(self.recipe.held_out * (count + held)):
            lines[0] += f" of {count + held} (at least {HELD_OUT}, at most half)"
        lines += [f"{len(self.broken.reasons)} broken"] * bool(self.broken.reasons)
        for shape, members in self.buckets.items():
            size = f"cells of {shape.width}x{shape.height}"
            rows = "" if self.pairs else f"{shape.rows} rows, "
            lines.append(f"  {rows}{shape.columns} columns, {size}: {len(members)} {kind}")
        if (file := find_table(self.samples)).is_file():
            lines.append(f"  {file}: sizes of all pictures, read once; it may be deleted")
        return "\n".join(lines)

    def held_out(self) -> "OwnGrids":
        """The samples that are never trained on; without any, these."""
        return replace(self, buckets=self.reserve, reserve={}) if self.reserve else self

    def shapes(self) -> list[Shape]:
        """Of pairs, each bucket's with as many rows as it has pairs, at most 3."""
        if not self.pairs:
            return list(self.buckets)
        most = {shape: min(3, len(members)) for shape, members in self.buckets.items()}
        return [s._replace(rows=rows) for s in most for rows in range(1, most[s] + 1)]

    def shape(self, rng: np.random.Generator) -> Shape:
        """That of a sample, so that each is drawn as often as another."""
        counts = np.array([len(members) for members in self.buckets.values()])
        shape = list(self.buckets)[rng.choice(len(counts), p=counts / counts.sum())]
        return shape._replace(rows=draw_rows(rng, self.count(shape))) if self.pairs else shape

    def members(self, shape: Shape) -> np.ndarray:
        """The numbers of its samples."""
        return self.buckets[shape._replace(rows=1) if self.pairs else shape]

    def count(self, shape: Shape) -> int:
        """Any sample of its bucket may stand in the last row."""
        return len(self.members(shape))

    def example(self, rng: np.random.Generator, shape: Shape, queries: Iterable[int]) -> Example:
        """Draw one example: of pairs, those of the other rows are drawn from the same bucket."""
        members = self.members(shape)
        others = rng.choice(members, min(len(members), SPARE), replace=False) if self.pairs else []
        (query,) = self.read_some(members[queries], shape, 1)
        others = [i for i in others if i != query.number]
        rows = [*self.read_some(others, shape, shape.rows - 1), query] if self.pairs else [query]
        pixels, mask = (
            np.concatenate([getattr(row, x) for row in rows])[-shape.rows :]
            for x in ("pixels", "mask")
        )
        sample, order = query.sample, list(range(shape.columns))
        if not has_masks(sample):
            order = draw_order(rng, shape.columns, self.recipe)
            mask[-1, draw_blank(rng, shape.columns, self.recipe)] = True
        prompt = draw_sentences(rng, self.recipe, shape[:2], *tell_of(sample, shape, order))
        grid = Grid.from_cells(pixels[:, order], mask)
        return Example(grid, prompt, sample.texts["task"] or "")

    def read_some(self, numbers: Iterable[int], shape: Shape, count: int) -> list[Read]:
        """The first `count` of some samples that can be read. Raises UserError for too few."""
        found = list(islice(self.try_to_read(numbers, shape), count))
        if len(found) < count:
            raise UserError(f"{self.recipe.data}: too few samples that can be read, for {shape}")
        return found

    def try_to_read(self, numbers: Iterable[int], shape: Shape) -> Iterator[Read]:
        """Iterate over those of some samples that can be read; the others are noted."""
        for i in map(int, numbers):
            try:
                yield self.read(i, shape)
            except UserError as error:
                self.broken.note(i, str(error))

    def read(self, i: int, shape: Shape) -> Read:
        """One sample's cells, as large as the shape says. Raises UserError."""
        sample, size = self.samples[i], (shape.width, shape.height)
        fitted = lambda path, ground: cover(open_picture(path, ground), *size)  # noqa: E731
        read = open_picture if has_masks(sample) else fitted  # a mask has its picture's size
        _, rows = open_cells(sample.rows, self.samples.folder, read)
        rows = [[cell if isinstance(cell, tuple) else (cell, None) for cell in row] for row in rows]
        cells = [
            [fit_cell(*cell, *size, f"image[{r}][{c}]") for c, cell in enumerate(row)]
            for r, row in enumerate(rows)
        ]
        pixels, mask = (np.array([[cell[k] for cell in row] for row in cells]) for k in (0, 1))
        return Read(i, sample, pixels, mask)

    def previews(self) -> list[Example]:
        """Of pairs two questions, each with 0, 1 and 2 examples as far as there are some; of grids
        the first; with all text."""
        asked = replace(self, recipe=replace(self.recipe, **ASKED))
        shapes = self.shapes()
        if self.pairs:
            questions = range(min(2, self.count(shapes[0])))
            places = [(s, k) for k in questions for s in shapes if s[1:] == shapes[0][1:]]
        else:
            places = [(s, k) for s in shapes for k in range(self.count(s))][:PREVIEWS]
        generators = [random_generator("preview", 0, k) for _, k in places]
        queries = [np.roll(np.arange(self.count(s)), -k)[:SPARE] for s, k in places]
        asking = zip(generators, places, queries, strict=True)
        return [asked.example(rng, shape, query) for rng, (shape, _), query in asking]

    def questions(self, examples: int, numbers: Iterable[int]) -> dict[int, Example]:
        """Samples of these numbers, each asked with so many examples, where there are as many: of
        pairs any others of its bucket, of a grid its own rows above the last; its last cell blank,
        with all text. Raises UserError for one that cannot be read."""
        recipe, found = replace(self.recipe, **ASKED), {}
        for shape, members in self.buckets.items():
            if (len(members) if self.pairs else shape.rows) > examples:
                asked = shape._replace(rows=examples + 1)
                buckets = {shape if self.pairs else asked: members}
                one = replace(self, recipe=recipe, buckets=buckets)
                for k in np.flatnonzero(np.isin(members, numbers)):
                    rng = random_generator("preview", 0, int(members[k]))
                    found[int(members[k])] = one.example(rng, asked, [k])
        return found


def open_own(path: str, recipe: Recipe) -> OwnGrids:
    """The grids of a JSON-lines file or the pairs of a folder. Raises UserError naming what cannot
    be learnt from."""
    samples = read_samples(Path(path))
    table, reasons = measure_samples(samples)
    broken = Broken(samples, reasons)
    usable = np.flatnonzero(table[:, -1])
    kinds = table[usable, 0]
    if (other := usable[kinds != kinds[0]]).size:
        raise UserError(
            f"{samples.name(other[0])}: grids and pairs are mixed ({samples.name(usable[0])} is of "
            "the other kind); keep them in two files"
        )
    pairs = bool(kinds[0])
    buckets = fill_buckets(table, recipe.resolution)
    for shape, members in buckets.items():
        if (tokens := shape.tokens * (max(ROWS) if pairs else 1)) > MAX_TOKENS:
            reason = f"a grid has {tokens} tokens of at most {MAX_TOKENS}; lower the resolution"
            raise UserError(f"{samples.name(members[0])}: image: {reason} or use fewer cells")
    reserved = choose_part(samples, usable, recipe.held_out)
    parts = split_buckets(buckets, reserved, max(3, recipe.group))
    source = OwnGrids(samples, recipe, broken, pairs, *parts)
    return replace(source, content=source.look_at_some(table)).without_broken()


def tell_of(sample: OwnSample, shape: Shape, order) -> tuple[str | list[str], str, str | None]:
    """What a sample whose columns stand in that order says of task, content and layout."""
    _, task, content = sentences(sample.texts, *shape[:2])
    task, content = renumber(task, order), renumber(content, order)
    if sample.phrases and not task:
        task = [sample.phrases[i] for i in order]
    return task, content, sample.texts["layout_prompt"]


def choose_part(samples, numbers: np.ndarray, share: float) -> np.ndarray:
    """That share of some samples, to hold out: `HELD_OUT` at least, half at most. They are chosen
    by the hash of what each is, so that one more or less moves no more than one over."""
    count = min(max(HELD_OUT, round(share * len(numbers))), len(numbers) // 2) if share else 0
    hashes = [hashlib.sha256(samples.key(i)).digest() for i in numbers]
    return numbers[sorted(range(len(numbers)), key=hashes.__getitem__)[:count]]


def split_buckets(buckets, reserved, least) -> tuple[dict, dict]:
    """Buckets to learn from, of at least so many samples as far as can be, and those of the samples
    that are `reserved`, in the same shapes where one is not quite unlike; of both the fullest come
    first."""
    rest, reserve = {}, {}
    for shape, members in buckets.items():
        if len(learnt := np.setdiff1d(members, reserved)):
            rest[shape] = learnt
    rest = merge_buckets(rest, least)
    for shape, members in buckets.items():
        held = np.intersect1d(members, reserved)
        if len(held):
            near = find_near(shape, rest)
            home = min(near, key=lambda other: distance(other, shape)) if near else shape
            reserve[home] = np.append(reserve.get(home, held[:0]), held)
    parts = rest, merge_buckets(reserve, 3)
    return tuple(dict(sorted(part.items(), key=lambda item: -len(item[1]))) for part in parts)
