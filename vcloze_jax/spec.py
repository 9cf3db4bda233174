"""spec.json: read it strictly, open everything that it names, and say exactly what is wrong.

A spec uses the argument names of diffusers' VisualCloze pipeline. Every message reads
`SPEC: key: reason; remedy`, and all of this runs before JAX is imported.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vcloze_jax import prompts
from vcloze_jax.config import Preset, UserError
from vcloze_jax.grid import Grid, build_grid
from vcloze_jax.images import check_file, open_mask, open_picture, quiet_decoders

PROMPTS = ("layout_prompt", "task_prompt", "content_prompt")
NUMBERS = ("resolution", "num_inference_steps", "guidance_scale", "seed")
OPTIONAL = (*PROMPTS, "task", "latents", "upsampling")  # null means absent
KEYS = ("image", *OPTIONAL, *NUMBERS)
MAX_BYTES = 2**22  # of a spec file
LATENT_WIDTH = 64  # channels of a packed token: 16 of the VAE, 2 x 2 pixels


@dataclass(frozen=True, eq=False)
class Spec:
    """One grid to paint, validated. `resolved` is the spec with every default filled in."""

    name: str
    source: Path
    grid: Grid
    prompt: str
    content_prompt: str  # bare, for the second pass
    num_inference_steps: int
    guidance_scale: float
    seed: int
    latents: np.ndarray | None  # float32 [S, 64], the noise at t = 1
    upsampling: dict | None
    resolved: dict


def read_specs(paths: list[str | Path], preset: Preset) -> list[Spec]:
    """Read every spec of every file; a file holds one spec or a list of them.

    Raises UserError naming the file and the key, also when two specs would write the same file.
    """
    specs = []
    for path in map(Path, paths):
        with _named(path), quiet_decoders():
            content = _parse(path)
            if not isinstance(content, list):
                specs.append(_read_spec(path.stem, path, content, preset))
                continue
            if not content:
                raise UserError("an empty list; give at least one spec")
            for i, item in enumerate(content):
                with _named(f"[{i}]"):
                    specs.append(_read_spec(f"{path.stem}-{i}", path, item, preset))
    _check_names(specs)
    return specs


def _read_spec(name: str, source: Path, table: dict, preset: Preset) -> Spec:
    _check_keys(_typed(table, dict))
    table = {key: v for key, v in table.items() if v is not None or key not in OPTIONAL}

    def take(key, default, check, *limits):
        with _named(key):
            return check(table[key], *limits) if key in table else default

    resolution = take("resolution", preset.resolution, _integer, 16, 4096)
    steps = take("num_inference_steps", preset.num_inference_steps, _integer, 1, 1000)
    guidance = take("guidance_scale", preset.guidance_scale, _number, 0, 1000)
    seed = take("seed", 0, _integer, 0, 2**32 - 1)  # a JAX key wraps beyond 32 bits
    given = {key: take(key, None, _text) for key in (*PROMPTS, "task")}
    take("upsampling", None, _upsampling)

    image, cells = _open_cells(table["image"], source.parent)
    grid = build_grid(cells, resolution)
    latents_path = take("latents", None, _path, source.parent)
    with _named("latents"):
        latents = _open_latents(latents_path, grid.tokens) if latents_path else None

    layout, task, content = _sentences(given, grid)
    resolved = {
        "image": image,
        "layout_prompt": layout,
        "task_prompt": task,
        "content_prompt": content,
        "resolution": resolution,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "latents": latents_path,
        "upsampling": None,
    }
    prompt = prompts.join(layout, task, prompts.content_sentence(content))
    bare = prompts.strip_prefix(content)
    return Spec(name, source, grid, prompt, bare, steps, guidance, seed, latents, None, resolved)


def _open_cells(rows: list, folder: Path) -> tuple[list, list]:
    """The cells twice: with absolute paths, and with opened pictures."""
    resolved, opened = [], []
    with _named("image"):
        _typed(rows, list)
    for r, row in enumerate(rows):
        with _named(f"image[{r}]"):
            _typed(row, list)
        resolved.append([])
        opened.append([])
        for i, cell in enumerate(row):
            with _named(f"image[{r}][{i}]"):
                path, picture = _open_cell(cell, folder)
            resolved[-1].append(path)
            opened[-1].append(picture)
    return resolved, opened


def _open_cell(cell: str | dict | None, folder: Path) -> tuple:
    if cell is None:
        return None, None
    if isinstance(cell, str):
        path = _path(cell, folder)
        return path, open_picture(path)
    if not isinstance(cell, dict) or cell.keys() != {"image", "mask"}:
        raise UserError('a cell is a path, null or {"image": path, "mask": path}')
    paths = {}
    for key in ("image", "mask"):
        with _named(key):
            paths[key] = _path(cell[key], folder)
    return paths, (open_picture(paths["image"]), open_mask(paths["mask"]))


def _open_latents(path: str, tokens: int) -> np.ndarray:
    wanted = f"must be float32 [{tokens}, {LATENT_WIDTH}]: this grid has S = {tokens} tokens"
    check_file(path)
    try:
        latents = np.lib.format.open_memmap(path, mode="r")  # reads the header only, no pickle
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path!r} is not a readable .npy file ({reason}); it {wanted}") from None
    if latents.dtype != np.float32 or latents.shape != (tokens, LATENT_WIDTH):
        raise UserError(f"{path!r} is {latents.dtype} {list(latents.shape)}; it {wanted}")
    if not np.isfinite(latents).all():
        raise UserError(f"{path!r} holds NaN or infinity; noise must be finite")
    return np.array(latents, order="C")


def _sentences(given: dict[str, str | None], grid: Grid) -> tuple[str, str, str]:
    """Layout, task and content as they will be said; the content without a prefix added."""
    layout, task, content, name = (given[key] for key in (*PROMPTS, "task"))
    if layout is None:
        layout = prompts.layout_prompt(len(grid.rows), grid.columns)
    if name is not None:
        with _named("task"):
            task = _named_task(name, task, grid.columns)
    return layout, task or "", content or ""


def _named_task(name: str, task_prompt: str | None, columns: int) -> str:
    if task_prompt is not None:
        raise UserError("given beside task_prompt; remove one of them")
    if name not in prompts.TASKS:
        raise UserError(f"no task {name!r}{_hint(name, prompts.TASKS)}; see --list-tasks")
    task = prompts.TASKS[name]
    if task.columns != columns:
        raise UserError(f"{name} has {task.columns} columns, the grid {columns}; change one")
    return task.prompt


def _check_keys(table: dict) -> None:
    for key in table:
        if key not in KEYS:
            raise UserError(f"{key!r}: unknown key{_hint(key, KEYS)}; known are {', '.join(KEYS)}")
    if "image" not in table:
        raise UserError("image: missing; give rows of cells, the query last")


def _check_names(specs: list[Spec]) -> None:
    owners = {}
    for spec in specs:
        targets = (f"{spec.name}_target{k}" for k in range(len(spec.grid.targets)))
        for name in (spec.name, *targets):
            if name in owners:
                raise UserError(
                    f"{spec.source}: output {name!r} is also that of {owners[name]}; rename one"
                )
            owners[name] = spec.source


def _parse(path: Path):
    if check_file(path).stat().st_size > MAX_BYTES:
        raise UserError(f"more than {MAX_BYTES} bytes; this is no spec")
    try:
        text = path.read_bytes().decode()
        if text.startswith("\ufeff"):
            raise UserError("begins with a byte order mark; save it as UTF-8 without one")
        return json.loads(text, object_pairs_hook=_unique, parse_int=_parse_int)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8; save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"is not JSON: {error}") from None
    except RecursionError:
        raise UserError("is nested too deeply to be a spec") from None


def _unique(pairs: list[tuple]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{twice!r}: given twice; keep one")
    return table


def _parse_int(digits: str) -> int | float:
    # Python refuses thousands of digits without saying which key; the check of the key refuses inf.
    return int(digits) if len(digits) < 20 else math.inf


def _typed(value, kind: type):
    names = {dict: "an object", list: "a list", str: "a string"}
    if not isinstance(value, kind):
        raise UserError(f"must be {names[kind]}, not {names.get(type(value), json.dumps(value))}")
    return value


def _text(value) -> str:
    try:
        _typed(value, str).encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair, which is no character; remove it") from None
    return value


def _path(value, folder: Path) -> str:
    if not _text(value):
        raise UserError("an empty path; give a file, or null for a target")
    return os.path.abspath(folder / value)


def _integer(value, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # bool is a subclass of int
        raise UserError(f"must be an integer in {low} ... {high}")
    return value


def _number(value, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # NaN fails both
        raise UserError(f"must be a number in {low} ... {high}")
    return float(value)


def _upsampling(value) -> None:
    _typed(value, dict)
    raise UserError("upsampling is not yet available; remove the key")


def _hint(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextmanager
def _named(where: str | Path) -> Iterator[None]:
    """Put `where` in front of the message of any UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
