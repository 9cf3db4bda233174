"""spec.json: read it strictly, open everything that it names, and say exactly what is wrong.

A spec uses the argument names of diffusers' VisualCloze pipeline. Every message reads
`SPEC: key: reason; remedy`, and all of this runs before JAX is imported.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from vcloze_jax import prompts
from vcloze_jax.config import Preset, UserError
from vcloze_jax.grid import PATCH, Grid, Spec, Upsampling
from vcloze_jax.inputs.cells import Cell, build_grid, floor, row_size
from vcloze_jax.inputs.checks import (
    check_integer,
    check_keys,
    check_number,
    check_share,
    check_text,
    check_type,
    describe_error,
    error_context,
    parse_json,
    read_key,
    resolve_path,
    suggest_name,
)
from vcloze_jax.inputs.cluster import count_processes
from vcloze_jax.inputs.pictures import (
    check_file,
    check_writable,
    copy_picture,
    open_picture,
    quiet_decoders,
    to_mask,
)

PROMPTS = ("layout_prompt", "task_prompt", "content_prompt")
NUMBERS = ("resolution", "num_inference_steps", "guidance_scale", "seed")
OPTIONAL = (*PROMPTS, "task", "latents", "upsampling")  # null means absent
KEYS = ("image", *OPTIONAL, *NUMBERS)
UPSAMPLING = ("width", "height", "strength", "num_inference_steps", "latents")
MAX_BYTES = 2**22  # of a spec file
MAX_SPECS = 1024  # of one command
MAX_PICTURES = 1024  # of one grid, all of which are held at once
MAX_SIDE = 4096  # of a picture that is painted
SIDE = 1024  # an upsampled target whose size nobody asked for has an area of at most SIDE²
LATENT_WIDTH = 64  # channels of a packed token: 16 of the VAE, 2 x 2 pixels


def read_specs(paths: list[str | Path], preset: Preset) -> list[Spec]:
    """Read every spec of every file; a file holds one spec or a list of them.

    Raises UserError naming the file and the key, also when two specs would write the same file.
    """
    specs = []
    for path in map(Path, paths):
        with error_context(path):
            content = parse_json(_read_bytes(path))
            many = isinstance(content, list)
            if (count := len(specs) + (len(content) if many else 1)) > MAX_SPECS:
                raise UserError(f"grid {count} of at most {MAX_SPECS} at once; split them up")
            if not many:
                specs.append(read_spec(content, preset, path.stem, path))
                continue
            if not content:
                raise UserError("an empty list; give at least one spec")
            for i, item in enumerate(content):
                with error_context(f"[{i}]"):
                    specs.append(read_spec(item, preset, f"{path.stem}-{i}", path))
    _check_names(specs)
    return specs


def check_outputs(out: Path, specs: list[Spec]) -> None:
    """Make the folder. Raises UserError where an output cannot be written, or would replace an
    input."""
    names = [name for spec in specs for name in output_names(spec.name, len(spec.grid.targets))]
    if count_processes() != 1:  # or one would take away again what it made to try, under the others
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out, max(names, key=lambda name: len(os.fsencode(name))))
    out.mkdir(parents=True, exist_ok=True)
    inputs = set()
    for spec in specs:
        cells = (cell for row in spec.resolved["image"] for cell in row if cell)
        inputs.add(spec.source.resolve())
        for cell in cells:
            inputs.update(map(Path, cell.values() if isinstance(cell, dict) else [cell]))
    for name in names:
        if (out / name).resolve() in inputs:
            raise UserError(f"--out {out}: {name} is an input; choose another")
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} is a folder; choose another")


def output_names(name: str, targets: int) -> list[str]:
    """The files that painting a spec writes: grid, targets in column order, and last the record."""
    return [f"{name}.png", *(f"{name}_target{i}.png" for i in range(targets)), f"{name}.json"]


def read_spec(table: dict, preset: Preset, name: str = "grid", source: Path = Path()) -> Spec:
    """Validate one spec; its paths begin at the folder of `source`, the file that it stood in.

    Pictures and masks may also be PIL images, latents NumPy arrays. Raises UserError naming the
    key.
    """
    check_keys(check_type(table, dict), KEYS)
    if "image" not in table:
        raise UserError("image: missing; give rows of cells, the query last")
    table = {key: v for key, v in table.items() if v is not None or key not in OPTIONAL}
    resolution = read_key(table, "resolution", preset.resolution, check_integer, 16, MAX_SIDE)
    steps = preset.num_inference_steps
    steps = read_key(table, "num_inference_steps", steps, check_integer, 1, 1000)
    guidance = read_key(table, "guidance_scale", preset.guidance_scale, check_number, 0, 1000)
    seed = read_key(table, "seed", 0, check_integer, 0, 2**32 - 1)  # a JAX key wraps beyond 32 bits
    given = {key: read_key(table, key, None, check_text) for key in (*PROMPTS, "task")}

    folder = source.parent
    with quiet_decoders():
        image, cells = open_cells(table["image"], folder)
    grid = build_grid(cells, resolution)
    none = None, None
    latents_path, latents = read_key(
        table, "latents", none, _open_latents, grid.tokens, "this grid", folder
    )
    own = next((cell.size for cell in map(_picture_of, cells[-1]) if cell), None)
    second, upsampling = read_key(table, "upsampling", none, _read_upsampling, steps, own, folder)

    layout, task, content = sentences(given, grid)
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
        "upsampling": second,
    }
    prompt = prompts.join(layout, task, prompts.content_sentence(content))
    bare = prompts.strip_prefix(content)
    return Spec(
        grid,
        prompt,
        steps,
        guidance,
        seed,
        latents,
        upsampling=upsampling,
        content_prompt=bare,
        name=name,
        source=source,
        resolved=resolved,
    )


def _read_upsampling(
    table: dict, steps: int, own: tuple[int, int] | None, folder: Path
) -> tuple[dict, Upsampling]:
    """The second pass twice: as a resolved spec, and with its noise opened."""
    check_keys(check_type(table, dict), UPSAMPLING)
    table = {key: v for key, v in table.items() if v is not None}
    sides = [read_key(table, key, None, check_integer, PATCH, MAX_SIDE) for key in UPSAMPLING[:2]]
    width, height = upsampled_size(*sides, own)
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{width}x{height} has a side above {MAX_SIDE}; give width and height")
    strength = read_key(table, "strength", 0.4, check_share)
    steps = read_key(table, "num_inference_steps", steps, check_integer, 1, 1000)
    tokens = width // PATCH * (height // PATCH)
    path, noise = read_key(
        table, "latents", (None, None), _open_latents, tokens, "an upsampled target", folder
    )
    values = dict(width=width, height=height, strength=strength, num_inference_steps=steps)
    return values | {"latents": path}, Upsampling(**values, latents=noise)


def upsampled_size(
    width: int | None, height: int | None, own: tuple[int, int] | None
) -> tuple[int, int]:
    """Size (w, h) of an upsampled target, floored to 16.

    One side sets the other by the aspect of `own`, the size (w, h) of the query's first picture
    (None: it has none, and counts as 1024 x 1024). Without a side it is that size itself, scaled
    down to the area 1024² if that is less (lzyhha/VisualCloze:visualcloze.py).
    """
    w, h = own or (SIDE, SIDE)
    if width is None and height is None:
        return row_size(w, h, SIDE) if w * h > SIDE * SIDE else (floor(w), floor(h))
    return floor(width or height * w // h), floor(height or width * h // w)


def open_cells(rows: list, folder: Path) -> tuple[list, list]:
    """The cells twice: with absolute paths, and with opened pictures."""
    resolved, opened = [], []
    with error_context("image"):
        check_type(rows, list)
    for r, row in enumerate(rows):
        with error_context(f"image[{r}]"):
            check_type(row, list)
    if (count := sum(cell is not None for row in rows for cell in row)) > MAX_PICTURES:
        raise UserError(f"image: {count} pictures of at most {MAX_PICTURES}; use fewer cells")
    for r, row in enumerate(rows):
        resolved.append([])
        opened.append([])
        for i, cell in enumerate(row):
            with error_context(f"image[{r}][{i}]"):
                path, picture = _open_cell(cell, folder)
            resolved[-1].append(path)
            opened[-1].append(picture)
    return resolved, opened


def _open_cell(cell, folder: Path) -> tuple:
    if cell is None:
        return None, None
    if isinstance(cell, str | os.PathLike | Image.Image):
        return _open_picture(cell, "white", folder)
    if not isinstance(cell, dict) or cell.keys() != {"image", "mask"}:
        raise UserError('a cell is a path, null or {"image": path, "mask": path}')
    path, picture = read_key(cell, "image", None, _open_picture, "white", folder)
    mask_path, mask = read_key(cell, "mask", None, _open_mask, folder)
    return {"image": path, "mask": mask_path}, (picture, mask)


def _open_picture(picture, ground: str, folder: Path) -> tuple[str, Image.Image]:
    if isinstance(picture, Image.Image):
        return f"{picture.width}x{picture.height}, in memory", copy_picture(picture, ground)
    path = resolve_path(picture, folder)
    return path, open_picture(path, ground)


def _open_mask(picture, folder: Path) -> tuple[str, np.ndarray]:
    path, levels = _open_picture(picture, "black", folder)  # where it is clear, nothing is drawn
    with error_context(repr(path)):
        return path, to_mask(levels)


def _picture_of(cell: Cell) -> Image.Image | None:
    return cell[0] if isinstance(cell, tuple) else cell


def _open_latents(given, tokens: int, owner: str, folder: Path) -> tuple[str, np.ndarray]:
    wanted = f"must be float32 [{tokens}, {LATENT_WIDTH}]: {owner} has S = {tokens} tokens"
    if isinstance(given, np.ndarray):
        path, latents = "in memory", given
    else:
        path = resolve_path(given, folder)
        latents = _open_npy(path, wanted)
    if latents.dtype != np.float32 or latents.shape != (tokens, LATENT_WIDTH):
        raise UserError(f"{path!r} is {latents.dtype} {list(latents.shape)}; it {wanted}")
    if not np.isfinite(latents).all():
        raise UserError(f"{path!r} holds NaN or infinity; noise must be finite")
    return path, np.array(latents, order="C")


def _open_npy(path: str, wanted: str) -> np.ndarray:
    check_file(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")  # reads the header only, no pickle
    except Exception as error:
        reason = describe_error(error)
        raise UserError(f"{path!r} is not a readable .npy file ({reason}); it {wanted}") from None


def sentences(given: dict[str, str | None], grid: Grid) -> tuple[str, str, str]:
    """Layout, task and content as they will be said; the content without a prefix added."""
    layout, task, content, name = (given[key] for key in (*PROMPTS, "task"))
    if layout is None:
        layout = prompts.layout_prompt(len(grid.rows), grid.columns)
    if name is not None:
        with error_context("task"):
            task = _find_task_prompt(name, task, grid.columns)
    return layout, task or "", content or ""


def _find_task_prompt(name: str, task_prompt: str | None, columns: int) -> str:
    if task_prompt is not None:
        raise UserError("given beside task_prompt; remove one of them")
    if name not in prompts.TASKS:
        raise UserError(f"no task {name!r}{suggest_name(name, prompts.TASKS)}; see --list-tasks")
    task = prompts.TASKS[name]
    if task.columns != columns:
        raise UserError(f"{name} has {task.columns} columns, the grid {columns}; change one")
    return task.prompt


def _check_names(specs: list[Spec]) -> None:
    owners = {}
    for spec in specs:
        names = output_names(spec.name, len(spec.grid.targets))
        for name in dict.fromkeys(Path(name).stem for name in names):
            if name in owners:
                raise UserError(
                    f"{spec.source}: output {name!r} is also that of {owners[name]}; rename one"
                )
            owners[name] = spec.source


def _read_bytes(path: Path) -> bytes:
    if check_file(path).stat().st_size > MAX_BYTES:
        raise UserError(f"more than {MAX_BYTES} bytes; this is no spec")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {describe_error(error)}") from None
