"""Where things are: the shipped model, and the one that a user names. Knows no JAX."""

import hashlib
import json
import math
import numbers
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vcloze_jax.config import FLUX_FILL, PRESETS, UserError
from vcloze_jax.inputs.checks import describe_error, explain_missing
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.placement import FILL
from vcloze_jax.ports.tables import mmdit

MINI_FOLDER = (
    Path(__file__).resolve().parents[1] / "mini"
)  # shipped: the base, and its adapter beside it
MINI_LORA = MINI_FOLDER / "lora.safetensors"
MINI_CLEAN = MINI_FOLDER.with_name("mini_clean")  # an MMDiT of 64 channels, and smaller
MINIS = MINI_FOLDER, MINI_CLEAN
DIGESTED = ".safetensors", ".sft", ".bin", ".json", ".model"
LARGE, HEADER, BLOCK = 2**26, 2**20, 2**16  # bytes
# Fields of a FluxConfig that tell presets from each other.
TELLING = "heads", "axes_dim", "double_blocks", "single_blocks", "text_width", "vec_width"
BLOCKS = 64  # of a large file, beside its header
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/([\w./-]+)")  # of a repository


def find_weights(weights, download=False) -> Path:
    """The folder on this machine that --weights names: a folder, one of Hugging Face's cache
    ("models--OWNER--NAME"), or the id OWNER/NAME of a repository in that cache; where that is not
    there yet and `download_weights` will fetch it, the id. Raises UserError."""
    path = Path(weights)
    if (path / "snapshots").is_dir():
        return find_snapshot(path)
    if not path.exists() and (
        odd := re.search(r"^[a-z]+:/|^(www\.)?huggingface\.co/|@", str(weights))
    ):
        kind = "a revision" if odd[0] == "@" else "an address"
        raise UserError(f"{weights}: {kind} is not read; give a folder, or the id OWNER/NAME alone")
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name := str(weights).rstrip("/")):
        # "./a/b" is no id, also where it is asked for once more.
        return path.absolute() if HUB_ID.fullmatch(str(path)) else path
    from huggingface_hub import constants  # slow to import

    path = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    if (path / "snapshots").is_dir():
        return find_snapshot(path)
    if download:
        return Path(name)
    reason = f"{name}: there is no such folder, nor is it in Hugging Face's cache"
    raise UserError(f"{reason}; {licence_of(name)}, then: hf download {name}")


def shipped_weights(placement) -> Path:
    """The shipped weights whose MMDiT reads what grids are in the Placement of this name."""
    return MINI_FOLDER if PLACEMENTS[placement].channels == FILL.channels else MINI_CLEAN


def licence_of(name):
    """Where the licence of a repository of Hugging Face is accepted."""
    return f"accept its licence at https://huggingface.co/{name} (FLUX.1's is non-commercial)"


def download_weights(weights) -> Path:
    """`find_weights` after all files of an id OWNER/NAME were fetched that the cache lacks."""
    path, name = Path(weights), str(weights).rstrip("/")
    if path.exists() or not HUB_ID.fullmatch(name):
        return find_weights(weights)
    from huggingface_hub import snapshot_download  # slow to import

    try:
        return Path(snapshot_download(name))
    except Exception as error:  # of the network, of the hub, of the disk
        reason = f"{name}: not downloaded ({describe_error(error)})"
        raise UserError(f"{reason}; {licence_of(name)}, and log in: hf auth login") from error


def find_snapshot(path):
    """The folder of the files in one of Hugging Face's cache: that of its main branch, or the only
    one. Raises UserError."""
    main = path / "refs" / "main"
    snapshots = sorted((path / "snapshots").glob("[!.]*"))
    if main.is_file() and (found := path / "snapshots" / main.read_text().strip()) in snapshots:
        return found
    if len(snapshots) == 1:
        return snapshots[0]
    raise UserError(f"{path}: holds {len(snapshots)} snapshots; give the folder of one")


def named_model(weights, lora):
    """Weights folder and adapters [(file, scale)] that --weights names and `split_bank` gives."""
    if not lora and not weights:
        return MINI_FOLDER, [(MINI_LORA, 1.0)]
    pairs = lora or []
    files = [file.resolve() for file, _ in pairs]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise UserError(f"--lora {twice}: given twice; give it once, with the sum of the scales")
    return find_weights(weights or MINI_FOLDER), pairs


class BankedAdapter(NamedTuple):
    """An adapter with a name, by which a spec picks it."""

    name: str
    file: Path
    scale: float


def adapter_and_name(text):
    """'NAME=FILE[:SCALE]' -> BankedAdapter; without a name, or where that is a file's, as
    `file_and_scale`."""
    found = re.fullmatch(r"([\w-]+)=(.+)", text)
    if not found or Path(text).exists():
        return file_and_scale(text)
    return BankedAdapter(found[1], *file_and_scale(os.path.expanduser(found[2])))


def is_pair(x):
    """Whether that is (file, scale)."""
    return len(x) == 2 and isinstance(x[0], str | Path) and isinstance(x[1], numbers.Real)


def read_adapter(x):
    """What a program may give for --lora -> (file, scale), or a BankedAdapter. Raises UserError."""
    if isinstance(x, BankedAdapter):
        return x
    if isinstance(x, str | Path):
        return adapter_and_name(str(x))
    if not isinstance(x, tuple | list) or not is_pair(x) or not math.isfinite(x[1]):
        raise UserError(f"lora {x!r}: neither a file, nor (file, a finite scale)")
    return Path(x[0]), float(x[1])


def split_bank(lora):
    """The adapters that --lora names, or a program, as paths, "FILE:SCALE" or (file, scale): those
    without a name, or None, and {name: those that paint where a spec picks it}. Raises UserError,
    also where two have one name."""
    one = isinstance(lora, str | Path) or (isinstance(lora, tuple) and is_pair(lora))
    lora = [read_adapter(x) for x in ([lora] if one else lora or [])]
    common, bank = [x for x in lora if not isinstance(x, BankedAdapter)], {}
    for name, *pair in (x for x in lora if isinstance(x, BankedAdapter)):
        if name in bank:
            raise UserError(f"--lora {name}={pair[0]}: {name} is named twice")
        if any(Path(pair[0]).resolve() == Path(file).resolve() for file, _ in common):
            reason = "is folded in for every spec already; give it with its name alone"
            raise UserError(f"--lora {name}={pair[0]}: {reason}")
        bank[name] = [*common, tuple(pair)]
    return common or None, bank


def describe_adapters(folder, pairs):
    """Which adapters [(file, scale)] are folded into the weights of a folder, in one line; on mini
    also whether its own is among them, since a --lora takes its place."""
    files = describe_pairs(pairs)
    line = f"adapter: {files or 'none'}"
    if folder.resolve() != MINI_FOLDER or any(file.resolve() == MINI_LORA for file, _ in pairs):
        return line
    return f"{line}, in place of mini's own" if files else f"{line}, not even mini's own"


def describe_pairs(pairs):
    """Adapters [(file, scale)] as their flags say them."""
    exact = lambda scale: repr(float(scale)).removesuffix(".0")  # noqa: E731
    return " + ".join(f"{file}:{exact(x)}" if x != 1 else str(file) for file, x in pairs)


def file_and_scale(text):
    """'FILE[:SCALE]' -> path and scale; a name of a file that is there is never split."""
    file, colon, tail = text.rpartition(":")
    try:
        scale = float(tail)
    except ValueError:
        colon = ""
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if not file:
        raise UserError(f"--lora {text}: no file before the scale")
    if not math.isfinite(scale):
        raise UserError(f"--lora {text}: the scale must be finite")
    return Path(file), scale


def suggest_adapter(file):
    """What helps where --lora names a file that is not there, as the tail of a message, or ""."""
    if HUB_ID.fullmatch(name := str(file)):
        fetch = f"hf download {name} --local-dir {Path(name).name}"
        return f"; of Hugging Face it is fetched first: {fetch}"
    if (within := HUB_FILE.fullmatch(name)) and not Path(within[1]).parent.exists():
        fetch = f"hf download {within[1]} {within[2]} --local-dir ."
        return f"; of Hugging Face it is fetched first: {fetch}"
    stem, colon, tail = name.rpartition(":")
    if colon and Path(stem).exists():
        number = re.fullmatch(r"[-+.\deE]+", tail)
        return "; training takes no :SCALE" if number else "; SCALE is a number, as in :0.5"
    return f"; {explain_missing(file) or 'check the path'}"


def named_preset(folder):
    """The preset that FOLDER/vcloze.json names, in its placement; without that file that of the
    transformer's sizes, or else FLUX.1-Fill's. Raises UserError."""
    file = Path(folder) / "vcloze.json"
    if not file.is_file():
        return recognise_preset(Path(folder))
    try:
        entries = json.loads(file.read_bytes())
        preset, placement = PRESETS[entries["preset"]], PLACEMENTS[entries.get("placement", "fill")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = ", ".join(PRESETS)
        raise UserError(f'{file}: must say {{"preset": NAME}} with a name of {names}') from None
    if placement == preset.flux.placement:
        return preset
    return replace(preset, flux=replace(preset.flux, placement=placement))


def recognise_preset(folder):
    """The preset whose sizes the transformer's config.json says, as where diffusers saved it again,
    which leaves vcloze.json behind; FLUX.1-Fill's where it says others, or is not there."""
    try:
        entries = json.loads((folder / mmdit.PART.folder / "config.json").read_bytes())
        sizes = {ours: entries.get(theirs) for theirs, ours in mmdit.PART.config.items()}
    except (OSError, ValueError, AttributeError):  # who reads all of it says what is wrong
        return FLUX_FILL
    told = [json.dumps(sizes[name]) for name in TELLING]
    known = (
        p for p in PRESETS.values() if told == [json.dumps(getattr(p.flux, n)) for n in TELLING]
    )
    return next(known, FLUX_FILL)


def digest_files(path):
    """What weights or an adapter are known by, wherever and since whenever they lie: the names,
    sizes and contents of a file, or of a folder's tensors and configs.

    Of a large file it is the header and blocks at even distances, 5 MiB in all: training changes
    all of a file, and is seen; a change by hand of what lies between the blocks is not.
    """
    path, found = Path(path), hashlib.sha256()
    files = sorted(f for f in path.rglob("*") if f.suffix in DIGESTED) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        name = file.relative_to(path) if path.is_dir() else ""
        found.update(f"{name} {size} ".encode())
        with file.open("rb") as stream:
            found.update(stream.read(size if size < LARGE else HEADER))
            for n in range(BLOCKS if size >= LARGE else 0):
                stream.seek((size - BLOCK) * (n + 1) // BLOCKS)
                found.update(stream.read(BLOCK))
    return found.hexdigest()[:16]
