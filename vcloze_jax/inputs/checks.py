"""Strict JSON, and checks of one value: each returns it, or says in a UserError what it must be."""

import difflib
import errno
import json
import math
import numbers
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from vcloze_jax.config import UserError

# What helps against an error of the file system.
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "change its rights",
    errno.EPERM: "change its rights",
    errno.EROFS: "name another place",
    errno.EFBIG: "ulimit -f or the disk allows no larger one; name another place",
    errno.EMFILE: "raise the limit, ulimit -n",
    errno.EIO: "the disk or the network drive failed; try again",
}
# What a file that should be JSON is by its first bytes, and what helps.
BINARY = {
    b"\x1f\x8b": "is compressed by gzip; unpack it",
    b"PK\x03\x04": "is a zip file; unpack it",
    b"\x89PNG": "is a picture; give the JSON file that names it",
    b"\xff\xd8\xff": "is a picture; give the JSON file that names it",
    b"PAR1": "is a file of Parquet; write it as JSON, an object a line",
    b"ARROW1": "is a file of Arrow; write it as JSON, an object a line",
}
# What is given for a picture, whatever its name, by how it begins, and what helps.
FOREIGN = {
    rb".{4}ftyp(hei|hev|mif|msf|avi)": "HEIC or AVIF, as telephones have them; convert it",
    rb".{4}ftyp|\x1aE\xdf\xa3": "a film; save the frame that is meant",
    rb"\xff\x0a|.{4}JXL |.{4}jP  |\xff\x4f\xff\x51": "JPEG XL or 2000; convert it",
    rb"PK\x03\x04|\x1f\x8b": "an archive; unpack it",
    rb"\x93NUMPY": "an array; save it as a picture, or give it in a program",
    rb"%PDF": "PDF; save the page that is meant as a picture",
    rb"(\xef\xbb\xbf)?\s*<(svg|\?xml)": "SVG, which has no pixels; convert it",
    rb"\s*<": "a web page: the download failed; fetch it again",
    rb"version https://git-lfs": "a pointer of git-lfs, not the file; run git lfs pull",
}
# Where JSON cannot be read on: how Python's message begins -> what should stand there, ours.
EXPECTED = {
    "Expecting property name": 'a key in "…" should stand there',
    "Expecting value": "a value should stand there",
    "Expecting ':'": "a colon should stand there",
    "Expecting ','": "a comma or a closing bracket should stand there",
    "Extra data": "nothing should stand behind the end",
    "Unterminated": 'a text begins that no " closes',
    "Invalid control": r"a line break or a tab is within a text; write \n or \t",
    "Invalid \\": r"a backslash that stands for nothing; write / in a path, or \\",
    "Illegal trailing comma": "a comma before the closing bracket; remove it",
    "Unexpected UTF-8 BOM": "a byte order mark; save it as UTF-8 without one",
}
# What stands there instead, by the first pattern that fits it and the character before.
INSTEAD = (
    (r".?$", "the end"),
    (r".?(//|/\*|#)", "a comment, which JSON does not know; remove it"),
    (r",[\]}]", "a closing bracket; remove the comma before it"),
    (r"\}\{", "one more object; several are a list, [{…}, {…}]"),
    (r".?['\u2018\u2019\u201c\u201d]", 'a quote that JSON does not know; write "'),
    (r".?(True|False|None)\b", "a word of Python; write true, false or null"),
)
URL = re.compile(r"(^|/)([a-z][a-z0-9+.-]+:(?=/)|data:(?=[a-z]+/))", re.IGNORECASE)
# What helps where it begins so; else it is downloaded.
ADDRESSES = {"file:": "write the path alone", "data:": "save it in a file, and give its path"}
TYPES = {dict: "an object", list: "a list", str: "a string"}
DASHES = re.compile(r"(^| )[\u2010-\u2015]")  # that word processors make of --
# What a list of grids is that stands under a key.
WRAPPED = "a list of objects within an object; give the list itself as the file, [{…}, {…}]"
LONGEST = 300  # characters of a foreign message, or of a name


def flag(name):
    """`micro_batch` -> `--micro-batch`."""
    return f"--{name.replace('_', '-')}"


def describe_error(error: Exception) -> str:
    """What an exception that is not ours, but a library's or the file system's, says on one line:
    with what helps, where that is known, and without the file, which the caller names."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON{describe_syntax(error)}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    for number, remedy in REMEDIES.items():  # a library often has it in the midst of its own
        if (reason := os.strerror(number)) in text:
            return f"{reason} ({remedy})"
    return shorten(" ".join(text.split()))


def describe_syntax(error: json.JSONDecodeError) -> str:
    """Where a text is not JSON, and what is wrong there, as the tail of a message. The line is left
    away where the text has only one: it may be one of a file that has more."""
    line = f"line {error.lineno}, " if "\n" in error.doc[: error.pos] + error.doc.rstrip() else ""
    what = next((words for start, words in EXPECTED.items() if error.msg.startswith(start)), "")
    if "should" in what:
        before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip(" \t\r\n")
        found = (words for sign, words in INSTEAD if re.match(sign, before[-1:] + rest))
        what += f", not {next(found, ascii(rest[:1]))}"
    return f" at {line}column {error.colno}: {what}"


def describe_foreign(start: bytes) -> str:
    """What a file that begins so is, and what helps, given for a picture; "" of others."""
    known = (words for sign, words in FOREIGN.items() if re.match(sign, start, re.DOTALL))
    return next(known, "")


def shorten(text: str) -> str:
    """At most the first 300 characters."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def explain_missing(path: str | Path) -> str:
    """Why a file that is not there looks as if it were, and what helps; "" where nothing tells."""
    path = Path(path)
    folder, name = path.parent, path.name
    if found := URL.search(str(path)):
        remedy = ADDRESSES.get(found[2].lower(), "download it first, and give its path")
        return f"it is a URL: {remedy}"
    if name == "-":
        return "what another program says is not read; save it, and give the file's path"
    if os.path.islink(path) and os.path.lexists(os.path.realpath(path)):
        return "links lead round in a circle; remove one"
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)}, which is gone; fetch it again"
    if DASHES.match(name):
        return "its dash was typed as another sign; write -- anew, if it is a flag"
    if "~" in path.parts:
        return "~ stands for no home here; write the path in full"
    if re.search(r"\$\w|\$\{|%\w+%", str(path)):
        return "variables are not filled in here; write the path in full"
    if re.search(r"[*?]", str(path)):
        return "nothing fits the pattern, or a quote kept the shell from filling it in"
    if name in ("null", "None"):
        return "what is to be painted is null, without quotes"
    if "\\" in name:
        return "write / instead of \\"
    if (plain := unquote(name)) != name and path.with_name(plain).exists():
        return f"there is {plain!r}; write the name as it is there"
    with suppress(OSError, ValueError):
        alike = [near for near in os.listdir(folder) if fold_name(near) == fold_name(name)]
        form = unicodedata.normalize("NFC", name)
        if alike and form in (unicodedata.normalize("NFC", near) for near in alike):
            return "there is one whose accents are encoded in another way (NFC, NFD); rename it"
        alike = alike or [near for near in os.listdir(folder) if Path(near).stem == name]
        if alike:
            return f"there is {alike[0]!r}; write the name as it is there"
    return ""


def fold_name(name: str) -> str:
    """A file's name as macOS and Windows compare it: whatever its case and Unicode form; without
    quotes and blanks around it, which a shell or a form may have left."""
    return unicodedata.normalize("NFC", name.strip(" \t\r\n'\"")).casefold()


def describe_with_file(error: Exception, file="") -> str:
    """`describe_error` after the file that the exception names, or else `file`."""
    file, reason = getattr(error, "filename", None) or file, describe_error(error)
    if isinstance(error, FileNotFoundError):
        remedy = explain_missing(file) if file else "the working directory is gone; cd to another"
        reason += remedy and f"; {remedy}"
    return f"{file}: {reason}" if file else reason


@contextmanager
def error_context(where: str | Path) -> Iterator[None]:
    """Put `where` in front of the message of any UserError, of whatever kind, raised inside."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None


def parse_json(content: bytes):
    """JSON without its traps: no key twice, no number of thousands of digits, and in UTF-8.

    Raises UserError that names what is wrong; `error_context` names the file.
    """
    if kind := next((kind for start, kind in BINARY.items() if content.startswith(start)), None):
        raise UserError(kind)
    try:
        text = content.decode()
        if "\0" in text:
            raise UserError("holds zero bytes, as UTF-16 and archives do; save it as text in UTF-8")
        if text.startswith("\ufeff"):
            raise UserError("begins with a byte order mark; save it as UTF-8 without one")
        return json.loads(text, object_pairs_hook=_unite_pairs, parse_int=_parse_int)
    except UnicodeDecodeError:
        raise UserError("is not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        empty = not text.strip()
        raise UserError("is empty" if empty else f"is {describe_error(error)}") from None
    except RecursionError:
        raise UserError("is nested too deeply") from None


def _unite_pairs(pairs: list[tuple]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{twice!r}: given twice; keep one")
    return table


def _parse_int(digits: str) -> int | float:
    # Python refuses thousands of digits without saying which key; the check of the key refuses inf.
    return int(digits) if len(digits) < 300 else math.inf  # below it is a float, too


def read_key(table: dict, key: str, default, check, *limits):
    """Return table[key], checked by `check(value, *limits)`, or the default where it is absent."""
    with error_context(key):
        return check(table[key], *limits) if key in table else default


def check_keys(table: dict, known: Iterable[str], answers: dict[str, str] | None = None) -> None:
    """Raise UserError for the first key that is not known; `answers` are to those of others."""
    for key in table:
        if key in (answers or {}):
            raise UserError(f"{key!r}: {answers[key]}")
        if key not in known:
            near = suggest_name(key, known)
            raise UserError(f"{key!r}: unknown key{near}; known are {', '.join(known)}")


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, as the tail of a message; "" without a like one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_type(value, kind: type):
    """An object (dict), a list or a string."""
    if not isinstance(value, kind):
        raise UserError(
            f"must be {TYPES[kind]}, not {TYPES.get(type(value)) or describe_value(value)}"
        )
    return value


def describe_value(value) -> str:
    """A value as JSON has it, on one line."""
    return shorten(json.dumps(value, default=repr))


def check_text(value) -> str:
    """A string that UTF-8 can hold."""
    try:
        check_type(value, str).encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair, which is no character; remove it") from None
    return value


def resolve_path(value, folder: Path) -> str:
    """A path that begins at `folder`, as an absolute one."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not check_text(value):
        raise UserError("an empty path; give a file, or null for a target")
    if value.endswith("in memory"):
        raise UserError(f"{value!r}: a program had it, and no file; save it, and name the file")
    return os.path.abspath(folder / value)


def check_integer(value, low: int, high: int) -> int:
    """An integer of low … high, NumPy's included; no boolean."""
    if not _is_a(numbers.Integral, value) or not low <= value <= high:
        raise UserError(f"must be an integer in {low} ... {high}, not {describe_value(value)}")
    return int(value)


def check_number(value, low: float, high: float) -> float:
    """A number of low … high, integers and NumPy's included; no boolean, no NaN."""
    if not _is_a(numbers.Real, value) or not low <= value <= high:  # NaN fails both
        raise UserError(f"must be a number in {low} ... {high}, not {describe_value(value)}")
    return float(value)


def check_share(value) -> float:
    """A number above 0, at most 1."""
    if not _is_a(numbers.Real, value) or not 0 < value <= 1:
        raise UserError(f"must be a number above 0, at most 1, not {describe_value(value)}")
    return float(value)


def _is_a(kind: type, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which Python counts as one
