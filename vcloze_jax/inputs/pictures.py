"""Open pictures so that no file can surprise us, save them so that no reader meets half a file.

Pillow's `open(path).convert("RGB")` turns 16-bit grey white, ignores the camera's turn, shows the
noise under alpha, waits for ever on a pipe and only warns of a picture that fills the memory.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vcloze_jax.config import UserError
from vcloze_jax.inputs.checks import describe_error

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 2**26  # 8192 x 8192, 256 MiB as Pillow holds it
URL = re.compile(r"(^|/)[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def check_file(path: str | Path) -> Path:
    """Return `path` if it is a regular file, so that opening it can neither wait nor act.

    Raises UserError naming the file: missing, a URL, a folder, a pipe, a device.
    """
    name = repr(str(path))
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if URL.search(str(path)):
            raise UserError(f"{name} is a URL; download it and give the file") from None
        raise UserError(
            f"{name} cannot be opened: {describe_error(error)}; check the path"
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{name} is {kind}; give a regular file")
    return Path(path)


def open_picture(path: str | Path) -> Image.Image:
    """Decode the first frame of a picture to RGB: turned as EXIF says, alpha over white.

    16-bit grey keeps its range (65535 becomes 255). Raises UserError naming the file.
    """
    path = check_file(path)
    with _decoding(repr(str(path))), Image.open(path, formats=FORMATS) as picture:
        return _to_upright_rgb(picture)


def copy_picture(picture: Image.Image) -> Image.Image:
    """A picture in memory as `open_picture` would read it from a file."""
    with _decoding(f"a picture of mode {picture.mode}"):
        return _to_upright_rgb(picture.copy())


def to_mask(picture: Image.Image) -> np.ndarray:
    """RGB to bool [h, w]: white (grey level of 128 or more) is True, to be generated."""
    return np.asarray(picture.convert("L")) >= 128


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Discard the remarks that Pillow warns and logs and that libtiff writes to stderr by itself.

    What matters of them comes as UserError. Not for threads: it redirects the process's stderr.
    """
    with warnings.catch_warnings(), open(os.devnull, "w") as null:
        warnings.simplefilter("ignore")
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 pixels [h, w, 3] as PNG, atomically. Raises UserError if the disk refuses."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    _save(Path(path), encoded.getvalue())


def save_figure(path: str | Path, figure) -> None:
    """Write a figure of matplotlib as PNG, atomically. Raises UserError if the disk refuses."""
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=100)
    _save(Path(path), encoded.getvalue())


def save_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically. Raises UserError if the disk refuses."""
    _save(Path(path), text.encode())


def _save(path: Path, content: bytes) -> None:
    # Beside the final file, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {describe_error(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what decoding a picture may raise into a UserError about `name`."""
    try:
        yield
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_PIXELS} pixels; shrink it") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is none of {', '.join(FORMATS)}; convert it") from None
    except Exception as error:  # a decoder may raise anything on a hostile file
        raise UserError(f"{name} cannot be read: {describe_error(error)}; save it anew") from None


def _to_upright_rgb(picture: Image.Image) -> Image.Image:
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    return _to_rgb(picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":
        return _from_deep_grey(picture).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        sheet = Image.new("RGB", picture.size, "white")
        sheet.paste(picture, mask=picture.getchannel("A"))
        return sheet
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_deep_grey(picture: Image.Image) -> Image.Image:
    grey = np.asarray(picture)
    if picture.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("more than 16 bits per pixel")  # where is its white?
    levels = np.rint(grey / np.float32(257)).astype(np.uint8)
    levels[grey == picture.info.get("transparency", -1)] = 255  # the grey that a PNG calls clear
    return Image.fromarray(levels)
