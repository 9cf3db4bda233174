"""One spec: read it strictly, open everything that it names, and say exactly what is wrong.

A spec uses the argument names of diffusers' VisualCloze pipeline. Every message reads
`SPEC: key: reason; remedy`, and all of this runs before JAX is imported.
"""

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from vcloze_jax.config import Preset, UserError
from vcloze_jax.grid import PATCH, Spec
from vcloze_jax.inputs import prompts
from vcloze_jax.inputs.cells import Cell, build_grid, floor, row_size
from vcloze_jax.inputs.checks import (
    TYPES,
    check_integer,
    check_keys,
    check_number,
    check_share,
    check_text,
    check_type,
    describe_error,
    describe_value,
    error_context,
    read_key,
    resolve_path,
)
from vcloze_jax.inputs.pictures import (
    check_file,
    copy_picture,
    open_picture,
    picture_of_array,
    quiet_decoders,
    to_mask,
)
from vcloze_jax.inputs.tasks import find_task, suggest_task
from vcloze_jax.inputs.upsampling import Upsampling

PROMPTS = ("layout_prompt", "task_prompt", "content_prompt")
MAX_PICTURES = 1024  # of one grid, all of which are held at once
MAX_SIDE = 4096  # of a picture that is painted
MAX_SEED = 2**32 - 1  # a JAX key wraps beyond 32 bits
NUMBERS = {  # each with its check
    "resolution": (check_integer, 16, MAX_SIDE),
    "num_inference_steps": (check_integer, 1, 1000),
    "guidance_scale": (check_number, 0, 1000),
    "seed": (check_integer, 0, MAX_SEED),
}
KEYS = ("image", *PROMPTS, "task", "latents", "upsampling", "adapter", *NUMBERS)
UPSAMPLING = ("width", "height", "strength", "num_inference_steps", "latents")
SIDE = 1024  # an upsampled target whose size nobody asked for has an area of at most SIDE²
LATENT_WIDTH = 64  # channels of a packed token: 16 of the VAE, 2 x 2 pixels
IN_MEMORY = "in memory"  # what a record says of a picture or of noise that no file held

# What diffusers' pipelines, or our own flags, call it, and what is to be said here.
WATCH = "say on_step: it is called with each step, in a program"
ANSWERS = {
    "upsampling_width": 'say "upsampling": {"width": …}',
    "upsampling_height": 'say "upsampling": {"height": …}',
    "upsampling_strength": 'say "upsampling": {"strength": …}',
    "num_images_per_prompt": "a call paints one; paint([{…}]), a file or --images paints several",
    "mask_image": 'a cell that is masked is {"image": path, "mask": path}',
    "lora": "give adapters as --lora FILE:SCALE",
    "images": "say image, the rows of cells; or num_images_per_prompt, a number, in a file",
    "steps": "say num_inference_steps",
    "generator": "say seed, an integer; or latents, the noise itself",
    "callback_on_step_end": WATCH,
    "callback_on_step_end_tensor_inputs": WATCH,
    "output_type": "a painting holds images and latents",
    "return_dict": "a painting comes back, and holds images and latents",
    "sigmas": "say num_inference_steps; the times follow from it and from the number of tokens",
    "prompt": "say task_prompt, content_prompt and layout_prompt",
    "negative_prompt": "guidance is distilled into the model; there is nothing to say it to",
    "prompt_embeds": "say task_prompt, content_prompt and layout_prompt",
    "pooled_prompt_embeds": "say task_prompt, content_prompt and layout_prompt",
    "max_sequence_length": "the weights say how many tokens of a prompt are read",
    "joint_attention_kwargs": "scale an adapter where it is loaded, FILE:SCALE",
    "height": "say resolution: rows take their shapes from their pictures",
    "width": "say resolution: rows take their shapes from their pictures",
}


def read_spec(table: dict, preset: Preset, name: str = "grid", source: Path = Path()) -> Spec:
    """Validate one spec; its paths begin at the folder of `source`, the file that it stood in.

    Its grid has what was opened at its final size, blank cells black and masked (cells.py); its
    prompt is the layout ("A grid layout with 3 rows …"), the task as it is given and the content
    ("The last image of the last row depicts: …"), which may be left out, but for the layout.
    Pictures and masks may also be PIL images or arrays, latents NumPy arrays. Raises UserError
    naming the key.
    """
    check_keys(check_type(table, dict), KEYS, ANSWERS)
    if "image" not in table:
        raise UserError("image: missing; give rows of cells, the query last")
    table = {key: v for key, v in table.items() if v is not None or key == "image"}
    numbers = read_numbers(table, preset)
    given = {key: read_key(table, key, None, check_prompt) for key in (*PROMPTS, "task")}

    folder = source.parent
    with quiet_decoders():
        image, cells = open_cells(table["image"], folder)
    resolution, steps, guidance, seed = numbers.values()
    grid = build_grid(cells, resolution)  # whose rows are one picture each, of equal cells
    none = None, None
    latents_path, latents = read_key(
        table, "latents", none, _open_latents, grid.tokens, "this grid", folder
    )
    own = next((cell.size for cell in map(_picture_of, cells[-1]) if cell), None)
    second, upsampling = read_key(table, "upsampling", none, _read_upsampling, steps, own, folder)

    layout, task, content = said = sentences(given, len(grid.rows), grid.columns)
    resolved = {"image": image, **dict(zip(PROMPTS, said, strict=True)), **numbers}
    resolved |= {"latents": latents_path, "upsampling": second}
    if (adapter := read_key(table, "adapter", None, check_text)) is not None:
        resolved["adapter"] = adapter
    more = dict(name=name, source=source, resolved=resolved, upsampling=upsampling)
    more["content_prompt"] = prompts.strip_prefix(content)
    prompt = prompts.join(layout, task, prompts.content_sentence(content))
    return Spec(grid, prompt, steps, guidance, seed, latents, **more)


def read_numbers(table: dict, preset: Preset) -> dict[str, int | float]:
    """Those of NUMBERS, in their order, each as the spec says it or as its preset has it: of
    FLUX 384, 30, 30 and 0, of mini 64, 30, 30 and 0."""
    defaults = preset.resolution, preset.num_inference_steps, preset.guidance_scale, 0
    pairs = zip(NUMBERS, defaults, strict=True)
    return {key: read_key(table, key, default, *NUMBERS[key]) for key, default in pairs}


def check_prompt(value) -> str:
    """A text; UserError where it holds what other programs take for an adapter, not for words."""
    if found := re.search(r"<(lora|lyco|hypernet):[^>]*>", check_text(value)):
        raise UserError(f"{found[0]} would be read as words; give adapters as --lora FILE:SCALE")
    return value


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
    key = "num_inference_steps"
    steps = read_key(table, key, steps, *NUMBERS[key])
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


def open_cells(rows: list, folder: Path, read=open_picture) -> tuple[list, list]:
    """The cells twice: with absolute paths, and with what `read(path, ground)` makes of their
    pictures; masks are always opened."""
    resolved, opened = [], []
    with error_context("image"):
        rows = check_type([*rows] if isinstance(rows, tuple) else rows, list)
        rows = [[*row] if isinstance(row, tuple) else row for row in rows]
    for r, row in enumerate(rows):
        if not isinstance(row, list):
            found = TYPES.get(type(row)) or describe_value(row)
            raise UserError(
                f"image[{r}]: must be a list, a row of cells as [path, null], not {found}"
            )
    if (count := sum(cell is not None for row in rows for cell in row)) > MAX_PICTURES:
        raise UserError(f"image: {count} pictures of at most {MAX_PICTURES}; use fewer cells")
    for r, row in enumerate(rows):
        resolved.append([])
        opened.append([])
        for i, cell in enumerate(row):
            with error_context(f"image[{r}][{i}]"):
                path, picture = _open_cell(cell, folder, read)
            resolved[-1].append(path)
            opened[-1].append(picture)
    return resolved, opened


def _open_cell(cell, folder: Path, read) -> tuple:
    if cell is None:
        return None, None
    if isinstance(cell, str | os.PathLike | Image.Image) or hasattr(cell, "__array__"):
        return _open_picture(cell, "white", folder, read)
    if not isinstance(cell, dict) or not {"image"} <= cell.keys() <= {"image", "mask"}:
        raise UserError('a cell is a path, null or {"image": path, "mask": path}')
    if cell.get("mask") is None:  # as programs write what has none
        whole = cell if cell["image"] is not None else {}
        return read_key(whole, "image", (None, None), _open_picture, "white", folder, read)
    path, picture = read_key(cell, "image", None, _open_picture, "white", folder, read)
    mask_path, mask = read_key(cell, "mask", None, _open_mask, folder)
    return {"image": path, "mask": mask_path}, (picture, mask)


def _open_picture(picture, ground: str, folder: Path, read=open_picture) -> tuple:
    if hasattr(picture, "__array__") and not isinstance(picture, Image.Image):
        try:
            array = np.asarray(picture)
        except Exception as error:  # of whose array it is, as of a tensor on a GPU
            raise UserError(f"cannot be an array of NumPy: {describe_error(error)}") from None
        picture = picture_of_array(array)
    if isinstance(picture, Image.Image):
        return f"{picture.width}x{picture.height}, {IN_MEMORY}", copy_picture(picture, ground)
    path = resolve_path(picture, folder)
    return path, read(path, ground)


def _open_mask(picture, folder: Path) -> tuple[str, np.ndarray]:
    path, levels = _open_picture(picture, "black", folder)  # where it is clear, nothing is drawn
    with error_context(repr(path)):
        return path, to_mask(levels)


def _picture_of(cell: Cell) -> Image.Image | None:
    return cell[0] if isinstance(cell, tuple) else cell


def _open_latents(given, tokens: int, owner: str, folder: Path) -> tuple[str, np.ndarray]:
    wanted = f"must be float32 [{tokens}, {LATENT_WIDTH}]: {owner} has S = {tokens} tokens"
    if hasattr(given, "__array__"):
        path, latents = IN_MEMORY, np.asarray(given)
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


def sentences(given: dict[str, str | None], rows: int, columns: int) -> tuple[str, str, str]:
    """Layout, task and content as they will be said; the content without a prefix added."""
    layout, task, content, name = (given[key] for key in (*PROMPTS, "task"))
    if layout is None:
        layout = prompts.layout_prompt(rows, columns)
    if name is not None:
        with error_context("task"):
            task = _find_task_prompt(name, task, columns)
    return layout, task or "", content or ""


def _find_task_prompt(name: str, task_prompt: str | None, columns: int) -> str:
    if task_prompt is not None:
        raise UserError("given beside task_prompt; remove one of them")
    task = find_task(name)
    if task is None:
        raise UserError(f"no task {name!r}{suggest_task(name)}; see --list-tasks")
    if task.columns != columns:
        raise UserError(f"{name} has {task.columns} columns, the grid {columns}; change one")
    return task.prompt
