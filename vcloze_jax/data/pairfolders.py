"""Samples of the user's own data: a folder of pairs of pictures, with what is said of them.

As data/jsonlines.py has them of a file; a folder may have folders in it.
"""

import codecs
import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from vcloze_jax.config import UserError
from vcloze_jax.data.jsonlines import INSTRUCTION, KEYS, SOURCE, LineSamples, OwnSample
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.checks import (
    check_text,
    describe_error,
    error_context,
    fold_name,
    parse_json,
    read_key,
)
from vcloze_jax.inputs.pictures import check_file

# What holds the texts of a folder of `datasets`, which are lost where its pictures pair by name.
TEXTS_OF_OTHERS = "metadata.jsonl", "metadata.csv", "metadata.parquet"
LINES = ".json", ".jsonl"  # what lines of pairs are in, whatever its name: fill50k's prompt.json
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
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".npy", ".mp4", ".mov")
OF_OTHERS = ".parquet", ".arrow", ".tar", ".zip"  # what data sets are in that are no folders
TEXTS = ".txt", ".caption", ".json"  # kohya's, too; img2dataset's
CAPTIONS = "caption", "prompt", "text", "description"  # keys of a JSON beside a picture
INSTRUCTIONS = "instruction", "edit_prompt", "edit"  # others, which say what to do
NOT_OURS = ".", "@", "__"  # how files and folders begin that a system makes: macOS's, a NAS's
MAX_TEXT, MAX_TABLE = 2**16, 2**22  # bytes of a pair's text, and of a JSON that may hold one


class FolderSamples(Sequence):
    """The pairs of a folder: in/NAME.png and out/NAME.png, or NAME_in.png and NAME_out.png, or with
    others of `SIDES`, in whatever case, each with what NAME.txt or NAME.json says of its target, if
    there is one. NAME may have folders in it. Raises UserError naming a file."""

    def __init__(self, path: Path):
        self.path = self.folder = path
        with error_context(path):
            check_lines(path)
            names, inside = find_sides(path)
            sides = [list_pictures(path, side, inside) for side in names]
            check_partners(names, sides)
            if not sides[0]:
                known = ", ".join(f"{a} and {b}" for a, b in SIDES[1:])
                known = describe_unpaired(path) or f"other names of the two: {known}"
                raise UserError(
                    "no pair in it: neither in/NAME.png and out/NAME.png nor NAME_in.png and "
                    f"NAME_out.png; {known}"
                )
            check_texts(path)
            self.pairs = [(name, *(side[name] for side in sides)) for name in sorted(sides[0])]
            check_astray(path, self.pairs)
        self.digest = hashlib.sha256(repr(self.pairs).encode()).hexdigest()

    def __len__(self):
        return len(self.pairs)

    def name(self, i: int) -> str:
        """What the user finds it by."""
        return f"{self.path}: {self.pairs[i][0]}"

    def key(self, i: int) -> bytes:
        """What it stays known by, though others come and go."""
        return os.fsencode(self.pairs[i][0])

    def __getitem__(self, i: int) -> OwnSample:
        name, *pair = self.pairs[i]
        texts = map(read_text, list_texts(self.path, name, pair))
        text = next((text for text in texts if text is not None), None)
        phrases = [SOURCE, prompts.PHRASES["image"]]
        return OwnSample([pair], dict.fromkeys(KEYS[1:]) | {"content_prompt": text}, phrases)


def read_samples(path: Path) -> LineSamples | FolderSamples:
    """The samples of a file or a folder. Raises UserError."""
    return FolderSamples(path) if path.is_dir() else LineSamples(path)


def check_lines(folder: Path) -> None:
    """Raise UserError for a file, anywhere in a folder, whose lines name the folder's pairs, and
    which is not read beside them: if it has texts, or a name by which Hugging Face's datasets takes
    it for the list of all that counts (metadata.jsonl)."""
    stems = {file.stem for file in walk_pictures(folder)}
    for file in walk_all_files(folder):
        if file.stem not in stems and next(pairs_of_lines(file), None):
            texts = (any(pair.texts.values()) for pair in pairs_of_lines(file))
            if file.name in TEXTS_OF_OTHERS or any(texts):
                lost = f"{file.relative_to(folder)}: its texts are not read beside pairs"
                raise UserError(f"{lost}; give that file as --data, or move it away")


def check_texts(folder: Path) -> None:
    """Raise UserError for a file, anywhere in a folder, whose texts would be lost beside pairs."""
    stems = {file.stem for file in walk_pictures(folder)}
    for file in walk_all_files(folder):
        lines = file.suffix.lower() in LINES and file.stem not in stems
        if file.name in TEXTS_OF_OTHERS or (lines and tells_names(file, stems)):
            lost = f"{file.relative_to(folder)}: its texts are not read beside pairs"
            remedy = "put what it says of NAME into NAME.txt"
            raise UserError(f"{lost}; {remedy}, or move it away")


def check_astray(folder: Path, pairs: list[tuple[str, str, str]]) -> None:
    """Raise UserError for a text of a pair's name in a folder where none is looked for, or whose
    suffix is in capitals, which is not looked for either."""
    homes = {os.path.dirname(path) for pair in pairs for path in pair}
    stems = {os.path.basename(path).rpartition(".")[0] for pair in pairs for path in pair[1:]}
    stems |= {os.path.basename(name) for name, *_ in pairs}
    for place, names in walk_places(folder):
        here = str(place.relative_to(folder))
        is_home = here in homes or (here == "." and "" in homes)
        for name in names:
            stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
            if stem not in stems or suffix.lower() not in (TEXTS if is_home else TEXTS[:2]):
                continue
            lost = f"{here}/{name}: its text is not read"
            if not is_home:
                raise UserError(f"{lost} there; put it beside its picture, or move it away")
            if suffix not in TEXTS:
                raise UserError(f"{lost}; its suffix is {suffix.lower()}, in small letters")


def pairs_of_lines(file: Path) -> Iterator[OwnSample]:
    """The pairs that a file's lines are, up to the first that is none."""
    with suppress(UserError, OSError):
        for sample in LineSamples(file) if file.suffix.lower() in LINES else ():
            if sample.phrases is None:
                return
            yield sample


def tells_names(file: Path, stems: set[str]) -> bool:
    """Whether a file is one object with a text for pictures by their names: kohya's meta_cap.json,
    {"in/a": {"caption": …}}, DiffusionDB's, {"a.png": {"p": …}}, or {"a.png": text}."""
    try:
        table = parse_json(check_file(file).read_bytes().removeprefix(codecs.BOM_UTF8))
    except (UserError, OSError):
        return False
    named = table.items() if isinstance(table, dict) else ()
    return any(
        {Path(name).name, Path(name).stem} & stems and isinstance(value, dict | list | str)
        for name, value in named
    )


def check_partners(names: tuple[str, str], sides: list[dict[str, str]]) -> None:
    """Raise UserError for the first picture of either side that has no partner."""
    for name in sorted(sides[0].keys() ^ sides[1].keys()):
        here = name not in sides[0]
        side, missing = names[here], names[not here]
        near = {fold_name(other): path for other, path in sides[not here].items()}
        if path := near.get(fold_name(name)):
            raise UserError(f"{sides[here][name]} and {path}: write their names alike")
        raise UserError(f"{name}: there is its {side!r} picture alone; add {missing!r}")


def describe_unpaired(folder: Path) -> str:
    """What a folder without pairs seems to be, and what helps; "" where nothing tells."""
    if folder.name.casefold() in sum(SIDES, ()) and find_sides(folder.parent)[1]:
        return f"give the folder above it, {folder.parent}"
    for place, names in walk_places(folder):
        if odd := [name for name in names if name.endswith(OF_OTHERS)]:
            remedy = "unpack it, or write lines of pairs, a JSON object each"
            return f"{(place / odd[0]).relative_to(folder)} is not read: {remedy}"
        if place != folder and find_sides(place)[1]:
            return f"give the folder in it that has both, {place}"
    for file in walk_all_files(folder):
        if file.name in TEXTS_OF_OTHERS or next(pairs_of_lines(file), None):
            return f"if {file.relative_to(folder)} names its pairs, give that file as --data"
    return ""


def find_sides(folder: Path) -> tuple[tuple[str, str], bool]:
    """The names of the two sides of a folder's pairs, the first of `SIDES` that both are there, in
    whatever case, and whether they are folders in it, and not the ends of names."""
    folders = {
        name.casefold(): name for name in sorted(os.listdir(folder)) if (folder / name).is_dir()
    }
    for sides in SIDES:
        if all(side.casefold() in folders for side in sides):
            return tuple(folders[side.casefold()] for side in sides), True
    stems = [file.stem.casefold() for file in walk_pictures(folder)]
    for sides in SIDES:
        apart = not sides[0].endswith(f"_{sides[1]}")
        ends = [f"_{side.casefold()}" for side in sides]
        if apart and all(any(stem.endswith(end) for stem in stems) for end in ends):
            return sides, False
    return SIDES[0], False


def list_pictures(folder: Path, side: str, inside: bool) -> dict[str, str]:
    """{NAME: path in the folder} of the pictures of one side of the pairs; a NAME is composed, as
    Linux and Windows have it and macOS has not. Raises UserError for two of one name."""
    found, root = {}, folder / side if inside else folder
    for file in walk_pictures(root, SUFFIXES + UNREAD):
        name = unicodedata.normalize("NFC", str(file.relative_to(root).with_suffix("")))
        path, length = str(file.relative_to(folder)), len(side) + 1
        if not inside:
            if name[-length:].casefold() != f"_{side}".casefold():
                continue
            name = name[:-length]
        if file.suffix.lower() in UNREAD:
            raise UserError(f"{path}: pictures of that kind are not read; convert it to PNG")
        if name in found:
            raise UserError(f"{path}: {found[name]} has the same name; remove one")
        found[name] = path
    return found


def walk_pictures(root: Path, suffixes=SUFFIXES) -> Iterator[Path]:
    """The pictures in a folder and those in it, in the order of their names."""
    return (file for file in walk_all_files(root) if file.suffix.lower() in suffixes)


def walk_all_files(root: Path) -> Iterator[Path]:
    """All files in a folder and those in it."""
    for place, names in walk_places(root):
        yield from (place / name for name in names)


def walk_places(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those in it, links to others too, each with its files, in the order of their
    names; a link that leads back to where it lies is passed over."""
    for place, folders, files in os.walk(root, followlinks=True):
        here = f"{os.path.realpath(place)}/"
        links = {name for name in folders if os.path.islink(os.path.join(place, name))}
        back = {n for n in links if here.startswith(f"{os.path.realpath(os.path.join(place, n))}/")}
        folders[:] = sorted(n for n in folders if n not in back and not n.startswith(NOT_OURS))
        yield Path(place), sorted(name for name in files if not name.startswith("."))


def list_texts(folder: Path, name: str, pair: list[str]) -> Iterator[Path]:
    """The files that say something of a pair: beside its folders, or beside either picture, then
    also by the picture's own name. The target's comes first."""
    for form in dict.fromkeys((name, unicodedata.normalize("NFD", name))):
        pictures = [folder / path for path in reversed(pair)]
        places = [folder / form, *(picture.parent / Path(form).name for picture in pictures)]
        for place in dict.fromkeys((*places, *(picture.with_suffix("") for picture in pictures))):
            for suffix in TEXTS:
                if (file := place.with_name(place.name + suffix)).exists():
                    yield file


def read_text(file: Path) -> str | None:
    """What a pair's text file says, on one line; None of a JSON that says nothing of a picture.
    Raises UserError naming it."""
    inside = file.suffix == ".json"
    limit = MAX_TABLE if inside else MAX_TEXT
    with error_context(repr(str(file))):
        if check_file(file).stat().st_size > limit:
            raise UserError(f"more than {limit} bytes; this is no caption")
        try:
            if inside:
                text = read_caption(parse_json(file.read_bytes().removeprefix(codecs.BOM_UTF8)))
            else:
                text = file.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read: {describe_error(error)}; save it as UTF-8") from None
    return text and " ".join(text.split())


def read_caption(table) -> str | None:
    """What the JSON beside a picture says of it. Raises UserError naming a key."""
    there = table.items() if isinstance(table, dict) else ()
    said = {k: v for k, v in there if k in CAPTIONS + INSTRUCTIONS and v is not None}
    if len(said) > 1:
        raise UserError(f"{' and '.join(said)}: keep one")
    for key in said:
        text = read_key(said, key, None, check_text)
        return INSTRUCTION + text if text and key in INSTRUCTIONS else text
    return None
