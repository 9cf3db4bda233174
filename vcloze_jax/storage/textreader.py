"""Text embeddings on disk: a prompt that was read once needs no text encoder, nor its 10 GB.

A file is named after the SHA-256 of everything that its numbers depend on, and holds their own
SHA-256, then the numbers. A file that is missing, cut or changed is one that is not there.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy learns bfloat16)
import numpy as np

LIMIT = 256  # files, 1 GiB of FLUX's; the oldest go first


class TextCache:
    """Embeddings of one pair of text encoders.

    `identity` says all that they depend on beside the token ids; `shapes` are those of txt and
    pooled, of one `dtype`.
    """

    def __init__(self, folder: Path, identity: str, shapes: list[tuple], dtype: str):
        self.folder, self.identity = Path(folder), identity
        self.shapes, self.dtype = shapes, np.dtype(dtype)

    def __call__(self, encode, t5_ids: np.ndarray, clip_ids: np.ndarray):
        """-> txt and pooled of these ids: what is stored, or else what `encode(t5_ids, clip_ids)`
        says, which is then stored where the disk allows."""
        key = hashlib.sha256(self.identity.encode() + t5_ids.tobytes() + clip_ids.tobytes())
        file = self.folder / key.hexdigest()
        embeddings = self.read(file)
        if embeddings is None:
            embeddings = encode(t5_ids, clip_ids)
            self.write(file, embeddings)
        return embeddings

    def read(self, file):
        try:
            content = file.read_bytes()
        except OSError:
            return None
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        numbers = np.frombuffer(content, self.dtype)
        ends = np.cumsum([np.prod(shape) for shape in self.shapes])
        parts = np.split(numbers, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def write(self, file, embeddings):
        content = b"".join(np.ascontiguousarray(x, self.dtype).tobytes() for x in embeddings)
        part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(part, file)
            files = sorted(self.folder.iterdir(), key=lambda f: f.stat().st_mtime)
            for old in files[:-LIMIT]:
                old.unlink(missing_ok=True)
        except OSError:  # no room, or not ours to write: the cache is a help, no more
            with suppress(OSError):
                part.unlink()
