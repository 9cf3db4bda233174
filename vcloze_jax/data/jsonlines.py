"""Samples of the user's own data: a file with one JSON object a line, or a folder of pairs.

A sample is a grid, all of it given, or a pair: one row, an example of a task, of which grids are
made. Nothing of them is held but where they stand; each is read when it is drawn.
"""

import hashlib
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vcloze_jax import prompts
from vcloze_jax.config import UserError
from vcloze_jax.inputs.checks import (
    check_keys,
    check_text,
    check_type,
    describe_error,
    error_context,
    parse_json,
    read_key,
)
from vcloze_jax.inputs.pictures import check_file
from vcloze_jax.inputs.spec import PROMPTS

KEYS = ("image", *PROMPTS, "task")


class Spelling(NamedTuple):
    """How others write a pair: keys of the conditions, of which a line has some, each a path or a
    list of one to `MOST`, and of the text; whether that says what to do, and not what the target
    shows; keys that say nothing to us."""

    conditions: tuple[str, ...]
    texts: tuple[str, ...]
    instructs: bool = False
    unread: tuple[str, ...] = ()


# By the key of the target; the columns stand in the order of the conditions, the target last.
# Of ControlNet's fill50k, InstructPix2Pix, MagicBrush, UltraEdit, HQ-Edit, OmniGen, musubi-tuner,
# DiffSynth-Studio, as their datasets and trainers have it.
SPELLINGS = {
    "target": Spelling(("cond1", "cond2", "source"), ("text", "prompt", "caption")),
    "output": Spelling(("input",), ("prompt", "instruction"), True),
    "output_image": Spelling(
        ("input_images", "input_image"), ("instruction", "edit", "prompt"), True, ("task_type",)
    ),
    "edited_image": Spelling(
        ("original_image", "input_image", "source_image"), ("edit_prompt",), True
    ),
    "target_img": Spelling(("source_img",), ("instruction",), True),
    "image_path": Spelling(("control_path", "control_path_0", "control_path_1"), ("caption",)),
    "image": Spelling(
        ("conditioning_image", "control_image", "edit_image"), ("text", "caption", "prompt")
    ),
}
MOST = 3  # conditions in one list
PLACEHOLDER = re.compile(r"(<img>)?<\|image_(\d+)\|>(</img>)?")  # OmniGen's, of a column
# What holds the texts of a folder of `datasets`, which are lost where its pictures pair by name.
TEXTS_OF_OTHERS = "metadata.jsonl", "metadata.csv", "metadata.parquet"
# Names of the two sides of a folder of pairs: of ai-toolkit, SimpleTuner, diffusers, pix2pix.
SIDES = (
    ("in", "out"),
    ("input", "output"),
    ("control", "target"),
    ("source", "target"),
    ("conditioning", "images"),
    ("conditioning_images", "images"),
    ("A", "B"),
)
INSTRUCTION = prompts.EDITING_PREFIXES[1]
SOURCE = "a source image"
CONDITIONS = {"cond1": "a condition image", "cond2": "another condition image"}  # else SOURCE
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
MAX_TEXT = 2**16  # bytes of a pair's text


class OwnSample(NamedTuple):
    """One line's grid, or one pair, before any picture is opened."""

    rows: list[list]  # of cells as a spec has them
    texts: dict[str, str | None]  # its sentences, by the keys of a spec
    phrases: list[str] | None = None  # what the columns of a pair are called; None: a grid


class LineSamples(Sequence):
    """The lines of a file, read in place. Raises UserError naming the file, a line and the key."""

    def __init__(self, path: Path):
        with error_context(path), check_file(path).open("rb") as file:
            self.path, self.folder, hashed = path, path.parent, hashlib.sha256()
            self.starts, filled = [0], 0
            for line in file:
                self.starts.append(self.starts[-1] + len(line))
                if line.strip():
                    hashed.update(line.strip() + b"\n")
                    filled = len(self.starts)
            del self.starts[filled:]  # lines at the end that are blank
            if not self.starts:
                raise UserError("no grid in it; write one JSON object a line")
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.digest = hashed.hexdigest()

    def __len__(self):
        return len(self.starts) - 1

    def name(self, i: int) -> str:
        """What the user finds it by."""
        return f"{self.path}: line {i + 1}"

    def __getitem__(self, i: int) -> OwnSample:
        return read_line(parse_line(self.content[self.starts[i] : self.starts[i + 1]]))


class FolderSamples(Sequence):
    """The pairs of a folder: in/NAME.png and out/NAME.png, or NAME_in.png and NAME_out.png, or with
    others of `SIDES`, each with what NAME.txt says of its target, if there is one. Raises UserError
    naming a file."""

    def __init__(self, path: Path):
        self.path = self.folder = path
        with error_context(path):
            if others := [name for name in TEXTS_OF_OTHERS if (path / name).exists()]:
                remedy = "put what it says of NAME into NAME.txt, and move it away"
                raise UserError(f"{others[0]}: its texts are not read beside pairs; {remedy}")
            names, inside = find_sides(path)
            sides = [list_pictures(path, side, inside) for side in names]
            for name in sorted(sides[0].keys() ^ sides[1].keys()):
                side, missing = names if name in sides[0] else names[::-1]
                raise UserError(f"{name}: there is its {side!r} picture alone; add {missing!r}")
            if not sides[0]:
                known = ", ".join(f"{a} and {b}" for a, b in SIDES[1:])
                raise UserError(
                    "no pair in it: neither in/NAME.png and out/NAME.png nor NAME_in.png and "
                    f"NAME_out.png; other names of the two: {known}"
                )
        self.pairs = [(name, *(side[name] for side in sides)) for name in sorted(sides[0])]
        self.digest = hashlib.sha256(repr(self.pairs).encode()).hexdigest()

    def __len__(self):
        return len(self.pairs)

    def name(self, i: int) -> str:
        """What the user finds it by."""
        return f"{self.path}: {self.pairs[i][0]}"

    def __getitem__(self, i: int) -> OwnSample:
        name, *pair = self.pairs[i]
        texts = [self.path / f"{name}.txt", *((self.path / p).parent / f"{name}.txt" for p in pair)]
        text = next((read_text(file) for file in texts if file.exists()), None)
        phrases = [SOURCE, prompts.PHRASES["image"]]
        return OwnSample([pair], dict.fromkeys(KEYS[1:]) | {"content_prompt": text}, phrases)


def read_samples(path: Path) -> LineSamples | FolderSamples:
    """The samples of a file or a folder. Raises UserError."""
    return FolderSamples(path) if path.is_dir() else LineSamples(path)


def parse_line(line: bytes) -> dict:
    """The object of a line. Raises UserError that says what a line must be."""
    try:
        return check_type(parse_json(line.rstrip()), dict)
    except UserError as error:
        raise UserError(f"{error}; each line is a JSON object, a grid or a pair") from None


def read_line(table: dict) -> OwnSample:
    """One line's object, a grid or a pair in any of the `SPELLINGS`. Raises UserError."""
    table = {key: value for key, value in table.items() if value is not None}
    for target, spelling in SPELLINGS.items():
        columns = [key for key in spelling.conditions if key in table]
        if target in table and columns:
            return read_pair(table, columns, target, spelling)
    if "image" not in table or isinstance(table["image"], str):
        raise UserError(f"keys {', '.join(table) or '(none)'}: {describe_spellings()}")
    check_keys(table, KEYS)
    return OwnSample(
        table["image"], {key: read_key(table, key, None, check_text) for key in KEYS[1:]}
    )


def describe_spellings() -> str:
    """What a line must be, in words."""
    pairs = [f"{target} + {'/'.join(s.conditions)}" for target, s in SPELLINGS.items()]
    return (
        'neither a grid, {"image": rows of pictures, the last cell is learnt}, nor a pair, whose '
        f"target and conditions are {'; '.join(pairs)}"
    )


def read_pair(table: dict, columns: list[str], target: str, spelling: Spelling) -> OwnSample:
    """A pair or more, whose conditions stand under the keys of `columns`."""
    known = *spelling.conditions, target, *spelling.texts, "task_prompt"
    check_keys({key: table[key] for key in table if key not in spelling.unread}, known)
    row, phrases = [], []
    for key in columns:
        there = [table[key]] if isinstance(table[key], str) else check_type(table[key], list)
        with error_context(key):
            if not 1 <= len(there) <= MOST:
                raise UserError(f"{len(there)} pictures, must be 1 to {MOST}")
            row += [check_text(path) for path in there]
        phrases += [CONDITIONS.get(key, SOURCE)] * len(there)
    row.append(read_key(table, target, None, check_text))
    given = [read_key(table, key, None, check_text) for key in spelling.texts if key in table]
    if len(given) > 1:
        raise UserError(f"{' and '.join(k for k in spelling.texts if k in table)}: keep one")
    text = given[0] if given else None
    if text and spelling.instructs:
        text = INSTRUCTION + PLACEHOLDER.sub(r"[IMAGE\2]", text)
    texts = dict.fromkeys(KEYS[1:]) | {"content_prompt": text}
    texts["task_prompt"] = read_key(table, "task_prompt", None, check_text)
    return OwnSample([row], texts, [*phrases, prompts.PHRASES["image"]])


def find_sides(folder: Path) -> tuple[tuple[str, str], bool]:
    """The names of the two sides of a folder's pairs, the first of `SIDES` that both are there, and
    whether they are folders in it, and not the ends of names."""
    for sides in SIDES:
        if all((folder / side).is_dir() for side in sides):
            return sides, True
    stems = [file.stem for file in folder.iterdir()]
    for sides in SIDES:
        apart = not sides[0].endswith(f"_{sides[1]}")
        if apart and all(any(stem.endswith(f"_{side}") for stem in stems) for side in sides):
            return sides, False
    return SIDES[0], False


def list_pictures(folder: Path, side: str, inside: bool) -> dict[str, str]:
    """{NAME: path in the folder} of the pictures of one side of the pairs. Raises UserError for
    two of one name."""
    found = {}
    for file in sorted((folder / side if inside else folder).iterdir()):
        name = file.stem if inside else file.stem.removesuffix(f"_{side}")
        if (
            file.suffix.lower() in SUFFIXES
            and file.name[0] != "."
            and (inside or name != file.stem)
        ):
            path = str(file.relative_to(folder))
            if name in found:
                raise UserError(f"{path}: {found[name]} has the same name; remove one")
            found[name] = path
    return found


def read_text(file: Path) -> str:
    """What a pair's text file says, on one line. Raises UserError naming it."""
    with error_context(repr(str(file))):
        if check_file(file).stat().st_size > MAX_TEXT:
            raise UserError(f"more than {MAX_TEXT} bytes; this is no caption")
        try:
            return " ".join(file.read_text("utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read: {describe_error(error)}; save it as UTF-8") from None
