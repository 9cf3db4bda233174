"""The chunks of a PNG, where Pillow passes over one or refuses the whole picture for it."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vcloze_jax.inputs.modes import MAX_PIXELS

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED = b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"
TELLING = b"cICP", b"eXIf", b"tEXt", b"zTXt", b"iTXt"  # of texts only those of `TURNS`
TURNS = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"  # keywords of text that may turn a PNG
LARGE = 2**20  # bytes of such text
CHECKSUM = 4  # bytes behind each chunk


def find_cicp(file: BinaryIO) -> tuple[int, ...]:
    """The four numbers of a PNG's cICP: primaries, curve, matrix and range; () without one. The
    file is left where it stands."""
    here = file.tell()
    try:
        for kind, size in walk_chunks(file):
            if kind == b"IDAT":
                break  # behind the pixels it says nothing
            if (kind, size) == (b"cICP", 4):
                return tuple(file.read(size))
        return ()
    finally:
        file.seek(here)


def strip_png(path: Path, told: bool) -> io.BytesIO:
    """A PNG with no more chunks than its pixels need and, if `told`, those that may turn it or say
    what its colours are: Pillow refuses the whole picture for text or a profile that is large or
    broken. Raises ValueError for another file."""
    kept = io.BytesIO()
    with path.open("rb") as file:
        kept.write(file.read(8))
        if kept.getvalue() != SIGNATURE:
            raise ValueError("no PNG")
        for kind, size in walk_chunks(file):
            if kept.tell() >= 8 * MAX_PIXELS:
                break
            if kind in NEEDED or told and kind in TELLING and size < LARGE:
                body = file.read(size + CHECKSUM)
                if not kind.endswith(b"Xt") or body.startswith(TURNS):
                    kept.write(size.to_bytes(4) + kind + body)
    kept.seek(0)
    return kept


def walk_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The kind and the size of each chunk, while the file stands at its first byte."""
    start = file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4]), head[4:]
        yield kind, size
        start = file.seek(start + 8 + size + CHECKSUM)
