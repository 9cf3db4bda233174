"""Digests of a checkpoint's files and arrays, each made where the bytes are.

Of an array every host digests the parts that its devices hold, and of the files its share; the
first host joins what they found in the file `digests`, which begins with its own digest.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from vcloze_jax.hosts import pick_share
from vcloze_jax.sharding import on_host
from vcloze_jax.storage.adapters import to_host

WHOLE = ""  # the part of an array that is all of it


class Damaged(Exception):
    """A checkpoint that is not what was saved."""


def describe_type(array) -> str:
    """ "float32[2, 3]"."""
    return f"{array.dtype}{list(array.shape)}"


def write_digests(path: Path, arrays: dict) -> None:
    """Write what this host can tell of a step's folder and of its arrays, {name: array}."""
    parts = {name: [describe_type(x), digest_parts(x)] for name, x in arrays.items()}
    files = {str(f.relative_to(path)): digest_file(f) for f in pick_share(walk_files(path))}
    note = {"arrays": parts, "files": files}
    (path / f"digests-{jax.process_index()}").write_text(json.dumps(note))


def join_digests(path: Path) -> None:
    """Join what all hosts wrote."""
    joined = {"arrays": {}, "files": {}}
    for host in range(jax.process_count()):
        note = json.loads((path / f"digests-{host}").read_bytes())
        (path / f"digests-{host}").unlink()
        joined["files"] |= note["files"]
        for name, (kind, parts) in note["arrays"].items():
            joined["arrays"].setdefault(name, [kind, {}])[1].update(parts)
    text = json.dumps(joined, indent=1)
    (path / "digests").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def check_files(path: Path) -> dict:
    """{name: [type, {part: digest}]} of a step's arrays, after this host's share of its files was
    read. Raises Damaged, or OSError, if they are not what was saved."""
    seal, _, text = (path / "digests").read_bytes().partition(b"\n")
    if seal.decode(errors="replace") != hashlib.sha256(text).hexdigest():
        raise Damaged("file digests is not what was saved")
    digests = json.loads(text)
    for name, digest in pick_share(sorted(digests["files"].items(), key=lambda x: by_name(x[0]))):
        if digest_file(path / name) != digest:
            raise Damaged(f"file {name} is not what was saved")
    arrays = digests["arrays"].items()  # of version 0.1.0, digested whole
    return {name: [kind, {WHOLE: x} if isinstance(x, str) else x] for name, (kind, x) in arrays}


def is_as_saved(array, digests: dict[str, str]) -> bool:
    """Whether what this host holds of an array is what these digests of its parts say. Only where
    it lay otherwise when it was saved, it is brought together first."""
    if not isinstance(array, jax.Array) or list_parts(array) != digests.keys():
        whole = on_host(array) if isinstance(array, jax.Array) else array
        return all(digest_bytes(whole[parse_part(part)]) == x for part, x in digests.items())
    return all(digests[part] == digest for part, digest in digest_parts(array).items())


def list_parts(array: jax.Array) -> set[str]:
    """The parts of an array that devices hold, of this host or another."""
    cuts = array.sharding.devices_indices_map(array.shape).values()
    return {spell_part(cut, array.shape) for cut in cuts}


def digest_parts(array) -> dict[str, str]:
    """{part: digest} of the parts of an array that devices of this host hold."""
    if not isinstance(array, jax.Array):
        return {WHOLE: digest_bytes(array)}
    shards = {spell_part(s.index, array.shape): s.data for s in array.addressable_shards}
    return {part: digest_bytes(to_host(data)) for part, data in shards.items()}


def spell_part(cut: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """ "0:4,2:6"."""
    spans = [span.indices(size)[:2] for span, size in zip(cut, shape, strict=True)]
    if all(span == (0, size) for span, size in zip(spans, shape, strict=True)):
        return WHOLE
    return ",".join(f"{start}:{stop}" for start, stop in spans)


def parse_part(text: str) -> tuple[slice, ...]:
    """The index of a part."""
    return tuple(slice(*map(int, span.split(":"))) for span in text.split(",") if span)


def digest_bytes(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk_files(path: Path) -> list[Path]:
    """All files of a step but digests, in one order."""
    return sorted((f for f in (path / "arrays").rglob("*") if f.is_file()), key=by_name)


def by_name(file) -> tuple[str, ...]:
    """What orders files so that those of one kind, each host's own, are neighbours: or all large
    ones could be one host's share. By folders, innermost first: names in them are random."""
    *folders, name = Path(file).parts
    return *folders[::-1], name


def flush(path: Path) -> None:
    """Have the disk hold a step; what is read of it next comes from there, not from memory."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                os.fsync(content.fileno())
                if hasattr(os, "posix_fadvise"):  # not on a Mac
                    os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
