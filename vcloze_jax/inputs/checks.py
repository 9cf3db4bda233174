"""Checks of one value of a spec: each returns the value, or says in a UserError what it must be."""

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vcloze_jax.config import UserError


@contextmanager
def named(where: str | Path) -> Iterator[None]:
    """Put `where` in front of the message of any UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def take(table: dict, key: str, default, check, *limits):
    """Return table[key], checked by `check(value, *limits)`, or the default where it is absent."""
    with named(key):
        return check(table[key], *limits) if key in table else default


def keys(table: dict, known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{key!r}: unknown key{hint(key, known)}; known are {', '.join(known)}")


def hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def typed(value, kind: type):
    names = {dict: "an object", list: "a list", str: "a string"}
    if not isinstance(value, kind):
        found = names.get(type(value)) or json.dumps(value, default=repr)
        raise UserError(f"must be {names[kind]}, not {found}")
    return value


def text(value) -> str:
    try:
        typed(value, str).encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair, which is no character; remove it") from None
    return value


def path(value, folder: Path) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not text(value):
        raise UserError("an empty path; give a file, or null for a target")
    return os.path.abspath(folder / value)


def integer(value, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # bool is a subclass of int
        raise UserError(f"must be an integer in {low} ... {high}")
    return value


def number(value, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # NaN fails both
        raise UserError(f"must be a number in {low} ... {high}")
    return float(value)


def share(value) -> float:
    """A number above 0, at most 1."""
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise UserError("must be a number above 0, at most 1")
    return float(value)
