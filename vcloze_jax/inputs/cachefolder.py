"""What is kept between runs, so that it is computed once: all of it may be deleted at any time."""

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np


def cache_folder() -> Path:
    """Where compiled programs, text embeddings and derived pictures are kept: $XDG_CACHE_HOME if it
    is absolute, as its specification has it, else the home; of a process without one, temporary."""
    for folder in os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"):
        if os.path.isabs(folder):
            return Path(folder, "vcloze_jax")
    return temporary_cache()


@cache
def temporary_cache() -> Path:
    """The cache of a process without a home. Its name can be foreseen, so a folder that somebody
    else has made there, and may have filled with programs, is passed over for a new one."""
    folder = Path(tempfile.gettempdir(), f"vcloze_jax_{os.getuid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    with suppress(OSError):
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o22:
            return folder
    return Path(tempfile.mkdtemp(prefix="vcloze_jax_"))


def keep_array(name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array `make()`, mapped from a file, read-only: only what is looked at is read.

    It is made where there is no file of that `key`, which must say all that it depends on; those of
    other keys make room. Where the disk does not allow it, the array is not kept.
    """
    folder = cache_folder() / "arrays"
    file, part = folder / f"{name}-{key}.npy", folder / f".{name}-{key}.{os.getpid()}.tmp"
    with suppress(OSError, ValueError, EOFError):  # none, or no array
        return np.load(file, mmap_mode="r")
    array = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.save(stream, array)
        os.replace(part, file)
        for old in set(folder.glob(f"{name}-*.npy")) - {file}:
            old.unlink()
    except OSError:  # no room, or not ours to write: it is a help, no more
        with suppress(OSError):
            part.unlink()
    return array
