"""Samples of the user's own data: a file with one JSON object a line, or a list of them.

A sample is a grid, all of it given, or a pair: one row, an example of a task, of which grids are
made. Nothing of them is held but where they stand; each is read when it is drawn.
"""

import codecs
import hashlib
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vcloze_jax.config import UserError
from vcloze_jax.data.spans import SpanReader, scan_objects
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.checks import (
    WRAPPED,
    check_keys,
    check_text,
    check_type,
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
FILE_NAME = re.compile("(^|_)file_names?$")  # how an imagefolder of `datasets` ends such keys
MOST = 3  # conditions in one list
PLACEHOLDER = re.compile(r"(<img>)?<\|image_(\d+)\|>(</img>)?")  # OmniGen's, of a column
INSTRUCTION = prompts.EDITING_PREFIXES[1]
SOURCE = "a source image"
KEY_PHRASES = {"cond1": "a condition image", "cond2": "another condition image"}  # else SOURCE
LIST = re.compile(rb"(\xef\xbb\xbf)?\s*\[")  # how a file begins that is one JSON list
# … and one that holds such a list, after a few words about it.
LIST_WITHIN = re.compile(rb'(\xef\xbb\xbf)?\s*\{[^][{}]*"(?!image")(?P<key>\w+)"\s*:\s*\[\s*\{')
TABLES = ".csv", ".tsv"
TABLE = (
    "is a table; write each row as a JSON object, a line each, as pandas' to_json does with "
    "orient='records', lines=True"
)


class OwnSample(NamedTuple):
    """One line's grid, or one pair, before any picture is opened."""

    rows: list[list]  # of cells as a spec has them
    texts: dict[str, str | None]  # its sentences, by the keys of a spec
    phrases: list[str] | None = None  # what the columns of a pair are called; None: a grid


class LineSamples(Sequence):
    """The lines of a file, or the items of a list that it is, read in place. Raises UserError that
    names the file, a line or an item, and the key."""

    def __init__(self, path: Path):
        with error_context(path):
            self.path, self.folder = path, path.parent
            self.bytes = SpanReader(check_file(path))
            if path.suffix.lower() in TABLES:
                raise UserError(TABLE)
            content = self.bytes.map()
            if found := LIST_WITHIN.match(content):
                raise UserError(f"{found['key'].decode(errors='replace')!r}: {WRAPPED}")
            self.unit = "item" if LIST.match(content) else "line"
            if self.unit == "item":
                spans = [span for span, _ in scan_objects(content)]
            else:
                spans = find_lines(content)
            if not spans:
                raise UserError("no grid in it; write one JSON object a line")
        self.spans, hashed = np.array(spans), hashlib.sha256()
        for i in range(len(spans)):
            if sample := self.cut(i):
                hashed.update(sample + b"\n")
        self.digest = hashed.hexdigest()

    def __len__(self):
        return len(self.spans)

    def cut(self, i: int) -> bytes:
        """The text of a sample, without what is blank around it."""
        return self.bytes[self.spans[i]].strip()

    def name(self, i: int) -> str:
        """What the user finds it by."""
        return f"{self.path}: {self.unit} {i + 1}"

    def key(self, i: int) -> bytes:
        """What it stays known by, though others come and go."""
        return self.cut(i)

    def __getitem__(self, i: int) -> OwnSample:
        return read_line(parse_line(self.cut(i)))


def find_lines(content: mmap.mmap) -> list[tuple[int, int]]:
    """Where each line of a file stands, but for those at the end that are blank."""
    spans, start, filled = [], 0, 0
    for line in iter(content.readline, b""):
        spans.append((start, start + len(line)))
        start += len(line)
        if line.strip():
            filled = len(spans)
    return spans[:filled]


def parse_line(line: bytes) -> dict:
    """The object of a line. Raises UserError that says what a line must be."""
    try:
        return check_type(parse_json(line.removeprefix(codecs.BOM_UTF8)), dict)
    except UserError as error:
        raise UserError(f"{error}; each line is a JSON object, a grid or a pair") from None


def read_line(table: dict) -> OwnSample:
    """One line's object, a grid or a pair in any of the `SPELLINGS`. Raises UserError."""
    table = {key: value for key, value in table.items() if value is not None}
    for key, value in table.items():
        if isinstance(value, dict) and "path" in value and "bytes" in value:
            raise UserError(f"{key}: a picture as `datasets` writes it; write its path alone")
    if table and all(value and isinstance(value, dict) for value in table.values()):
        raise UserError(TABLE)  # by columns, as to_json writes it unless told otherwise
    given, table = ", ".join(table) or "(none)", without_file_name(table)
    for target, spelling in SPELLINGS.items():
        columns = [key for key in spelling.conditions if key in table]
        if target in table and columns:
            return read_pair(table, columns, target, spelling)
    if "image" not in table or isinstance(table["image"], str):
        raise UserError(f"keys {given}: {describe_spellings()}")
    check_keys(table, KEYS)
    return OwnSample(
        table["image"], {key: read_key(table, key, None, check_text) for key in KEYS[1:]}
    )


def without_file_name(table: dict) -> dict:
    """A line with what it has under input_file_name under input, and file_name's under image, as
    `datasets` calls them once they are opened. Raises UserError for two of one name."""
    plain = {}
    for key in table:
        name = FILE_NAME.sub("", key) or "image"
        if name in plain:
            raise UserError(f"{key}: there is another {name!r}; keep one")
        plain[name] = table[key]
    return plain


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
        with error_context(key):
            there = [table[key]] if isinstance(table[key], str) else check_type(table[key], list)
            if not 1 <= len(there) <= MOST:
                raise UserError(f"{len(there)} pictures, must be 1 to {MOST}")
            row += [check_text(path) for path in there]
        phrases += [KEY_PHRASES.get(key, SOURCE)] * len(there)
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
