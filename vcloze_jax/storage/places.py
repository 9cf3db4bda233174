"""Where things are: the shipped model, the one that a user names, and the cache. Knows no JAX."""

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

from vcloze_jax.config import FLUX_FILL, PRESETS, UserError

MINI = Path(__file__).parents[1] / "mini"  # shipped weights: the base, lora.safetensors beside it
LORA = MINI / "lora.safetensors"
DIGESTED = ".safetensors", ".sft", ".json", ".model"
LARGE, HEADER = 2**26, 2**20  # bytes


def named_model(weights, lora):
    """Weights folder and adapters [(file, scale)] that those flags name, or their absence; an
    adapter may also be a path, or "FILE:SCALE"."""
    if not lora and not weights:
        return MINI, [(LORA, 1.0)]
    lora = [lora] if isinstance(lora, str | Path) else lora or []
    pairs = [file_and_scale(str(x)) if isinstance(x, str | Path) else x for x in lora]
    return Path(weights or MINI), pairs


def file_and_scale(text):
    """'FILE[:SCALE]' -> path and scale; a name of a file that is there is never split."""
    file, colon, tail = text.rpartition(":")
    try:
        scale = float(tail)
    except ValueError:
        colon = ""
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {text}: the scale must be finite")
    return Path(file), scale


def cache_folder():
    """Where compiled programs and text embeddings are kept between runs: $XDG_CACHE_HOME if it is
    absolute, as its specification has it, else the home; of a process without one, temporary."""
    for folder in os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"):
        if os.path.isabs(folder):
            return Path(folder, "vcloze_jax")
    return Path(tempfile.gettempdir(), f"vcloze_jax_{os.getuid()}")


def named_preset(folder):
    """The preset that FOLDER/vcloze.json names, without it FLUX.1-Fill's. Raises UserError."""
    file = Path(folder) / "vcloze.json"
    if not file.is_file():
        return FLUX_FILL
    try:
        return PRESETS[json.loads(file.read_text())["preset"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = ", ".join(PRESETS)
        raise UserError(f'{file}: must say {{"preset": NAME}} with a name of {names}') from None


def digest_files(path):
    """What a run knows weights or an adapter by, wherever they lie: the names, sizes and contents
    of a file, or of a folder's tensors and configs; of a large file its header only."""
    path, found = Path(path), hashlib.sha256()
    files = sorted(f for f in path.rglob("*") if f.suffix in DIGESTED) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            content = stream.read(size if size < LARGE else HEADER)
        name = file.relative_to(path) if path.is_dir() else ""
        found.update(f"{name} {size} ".encode() + content)
    return found.hexdigest()[:16]
