"""Arrays in files, each named after the SHA-256 of everything that its numbers depend on.

A file holds the SHA-256 of its numbers, and gets its name when it is whole: one that is missing,
cut or changed is one that is not there, and processes that write one at once write the same.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import ml_dtypes  # noqa: F401 (NumPy learns bfloat16)
import numpy as np

from vcloze_jax.config import UserError
from vcloze_jax.inputs.checks import describe_error
from vcloze_jax.ports import engine


class ArrayStore:
    """A folder of them. `identity` says all that they depend on beside their keys, tuples of
    arrays; `names` what they are called in a file."""

    def __init__(self, folder: Path, identity: str, names: tuple[str, ...]):
        self.folder, self.identity, self.names = Path(folder), identity, names

    def file(self, key: tuple[np.ndarray, ...]) -> Path:
        """Where the arrays of a key are, or would be."""
        found = hashlib.sha256(self.identity.encode())
        for array in key:
            found.update(repr(array.shape).encode() + array.tobytes())
        return self.folder / f"{found.hexdigest()}.safetensors"

    def read(self, key: tuple[np.ndarray, ...]) -> list[np.ndarray] | None:
        """The arrays of a key as they were written, or None."""
        try:
            source = engine.SafetensorsFile(self.file(key))
            arrays = [source.read(name) for name in self.names]
            return arrays if source.metadata["sha256"] == digest_all(arrays) else None
        except (OSError, KeyError, engine.PortError):
            return None

    def write(self, key: tuple[np.ndarray, ...], arrays: list[np.ndarray]) -> None:
        """Keep the arrays of a key. Raises UserError where the disk refuses."""
        file = self.file(key)
        part = file.with_name(f".{file.stem}.{uuid4().hex}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = dict(zip(self.names, arrays, strict=True))
            engine.save_tensors(part, tensors, {"sha256": digest_all(arrays)})
            os.replace(part, file)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise UserError(f"{self.folder}: cannot be written: {describe_error(error)}") from None


def digest_all(arrays: list[np.ndarray]) -> str:
    """SHA-256 of the numbers of some arrays."""
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()
