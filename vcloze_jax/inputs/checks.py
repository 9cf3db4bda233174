"""Strict JSON, and checks of one value: each returns it, or says in a UserError what it must be."""

import difflib
import errno
import json
import math
import numbers
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
LONGEST = 300  # characters of a foreign message


def describe_error(error: Exception) -> str:
    """What an exception that is not ours, but a library's or the file system's, says on one line:
    with what helps, where that is known, and without the file, which the caller names."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    for number, remedy in REMEDIES.items():  # a library often has it in the midst of its own
        if (reason := os.strerror(number)) in text:
            return f"{reason} ({remedy})"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def describe_with_file(error: Exception, file="") -> str:
    """`describe_error` after the file that the exception names, or else `file`."""
    file = getattr(error, "filename", None) or file
    return f"{file}: {describe_error(error)}" if file else describe_error(error)


@contextmanager
def error_context(where: str | Path) -> Iterator[None]:
    """Put `where` in front of the message of any UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_json(content: bytes):
    """JSON without its traps: no key twice, no number of thousands of digits, and in UTF-8.

    Raises UserError that names what is wrong; `error_context` names the file.
    """
    try:
        text = content.decode()
        if text.startswith("\ufeff"):
            raise UserError("begins with a byte order mark; save it as UTF-8 without one")
        return json.loads(text, object_pairs_hook=_unite_pairs, parse_int=_parse_int)
    except UnicodeDecodeError:
        raise UserError("is not UTF-8; save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"is not JSON: {error}") from None
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
    return int(digits) if len(digits) < 20 else math.inf


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
    names = {dict: "an object", list: "a list", str: "a string"}
    if not isinstance(value, kind):
        found = names.get(type(value)) or json.dumps(value, default=repr)
        raise UserError(f"must be {names[kind]}, not {found}")
    return value


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
        raise UserError(f"must be an integer in {low} ... {high}")
    return int(value)


def check_number(value, low: float, high: float) -> float:
    """A number of low … high, integers and NumPy's included; no boolean, no NaN."""
    if not _is_a(numbers.Real, value) or not low <= value <= high:  # NaN fails both
        raise UserError(f"must be a number in {low} ... {high}")
    return float(value)


def check_share(value) -> float:
    """A number above 0, at most 1."""
    if not _is_a(numbers.Real, value) or not 0 < value <= 1:
        raise UserError("must be a number above 0, at most 1")
    return float(value)


def _is_a(kind: type, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which Python counts as one
