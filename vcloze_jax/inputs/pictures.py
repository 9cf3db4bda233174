"""Open pictures so that no file can surprise us, save them so that no reader meets half a file.

Pillow's `open(path).convert("RGB")` turns 16-bit grey white, ignores the camera's turn, shows the
noise under alpha, waits for ever on a pipe and only warns of a picture that fills the memory.
"""

import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vcloze_jax.config import UserError
from vcloze_jax.inputs.checks import (
    URL,
    describe_error,
    describe_foreign,
    explain_missing,
    shorten,
)
from vcloze_jax.inputs.modes import MAX_PIXELS, to_upright_rgb
from vcloze_jax.inputs.pngchunks import find_cicp, strip_png

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXIF = {"exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps what may turn a picture
TURNED = 0x0112, range(5, 9)  # EXIF's orientation, and those that swap width and height
STREAM = re.compile("/dev/(stdin|fd/)")
LONGEST_WEBP = 16383  # pixels to a side
COLOURED = 64  # from the least of RGB to the most, more than JPEG makes of a grey


class PictureError(UserError):
    """A picture cannot be opened; what else was said may be right."""


@dataclass(frozen=True)
class PictureSize:
    """What a picture's header tells."""

    width: int
    height: int


def check_file(path: str | Path) -> Path:
    """Return `path` if it is a regular file, so that opening it can neither wait nor act.

    Raises PictureError naming the file: missing, empty, a URL, a folder, a pipe, a device.
    """
    name = repr(shorten(str(path)))
    if STREAM.match(str(path)):
        raise PictureError(
            f"{name} is what another program says; save it, and give the file's path"
        )
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        remedy = explain_missing(path) or "check the path"
        raise PictureError(f"{name} cannot be opened: {describe_error(error)}; {remedy}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise PictureError(f"{name} is {kind}; give a regular file")
    if not found.st_size:
        raise PictureError(f"{name} is empty; fetch or save it again")
    return Path(path)


def open_picture(path: str | Path, ground: str = "white") -> Image.Image:
    """Decode the first frame of a picture to RGB: turned as EXIF says, alpha over `ground`.

    16-bit grey keeps its range (65535 becomes 255); other metadata is ignored, broken or not.
    Raises PictureError naming the file.
    """
    path = check_file(path)
    with _decoding(repr(shorten(str(path))), path):
        try:
            return _decode(path, ground)
        except (UserError, Image.DecompressionBombError):
            raise
        except Exception:
            for told in (True, False):
                try:
                    return _decode(strip_png(path, told), ground)
                except UserError:
                    raise
                except Exception:
                    continue
            raise


def measure_picture(path: str | Path, ground: str = "white") -> PictureSize:
    """Size of a picture as `open_picture` would turn it, from its first bytes where they tell.
    Raises PictureError naming the file."""
    try:
        with Image.open(check_file(path), formats=FORMATS) as picture:
            # Of a PNG that says nothing before its pixels Pillow would read all, to look behind.
            silent = picture.format == "PNG" and not EXIF & picture.info.keys()
            tag, swapped = TURNED
            turned = not silent and picture.getexif().get(tag) in swapped
            w, h = picture.size[::-1] if turned else picture.size
            if 0 < w * h <= MAX_PIXELS and picture.format != "TIFF":  # Pillow turns some itself
                return PictureSize(w, h)
    except PictureError:
        raise
    except Exception:  # a decoder may raise anything on a hostile file
        pass
    return PictureSize(*open_picture(path).size)  # says what is wrong, or reads it all the same


def decode_picture(content: bytes, name: str, ground: str = "white") -> Image.Image:
    """The picture that a file of that `content` would hold. Raises PictureError about `name`."""
    with _decoding(name, io.BytesIO(content)):
        return _decode(io.BytesIO(content), ground)


def copy_picture(picture: Image.Image, ground: str = "white") -> Image.Image:
    """A picture in memory as `open_picture` would read it from a file."""
    with _decoding(f"a picture of mode {picture.mode}"):
        return to_upright_rgb(picture.copy(), ground)


def picture_of_array(x: np.ndarray) -> Image.Image:
    """A picture or mask in memory, [h, w], or [h, w, 1], 3 or 4: uint8, bool, or float in [0, 1],
    which is rounded to 8 bits, half to even. Raises UserError that says what it is instead."""
    x = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    if x.dtype == bool:
        x = x.astype(np.float32)
    if np.issubdtype(x.dtype, np.floating):
        if not x.size or not (x.min() >= 0 and x.max() <= 1):  # NaN is neither
            raise UserError("a float picture must be in [0, 1]; or give 0 … 255 as uint8")
        x = np.rint(x.astype(np.float32) * 255).astype(np.uint8)
    fits = x.ndim == 2 or x.ndim == 3 and x.shape[2] in (3, 4)
    if x.dtype != np.uint8 or not fits or not x.size:
        found = f"an array {x.dtype} {list(x.shape)}"
        raise UserError(f"{found}; a picture is uint8, or float in [0, 1], [h, w, 3]")
    return Image.fromarray(x)


def to_mask(picture: Image.Image) -> np.ndarray:
    """RGB to bool [h, w]: white (grey level of 128 or more) is True, to be generated.

    Raises UserError if what is bright in it is coloured, as in a photo or in a picture of labels,
    or if all of it is grey below that: either is neither white nor black.
    """
    pixels = np.asarray(picture)
    coloured = np.ptp(pixels, axis=-1) >= COLOURED
    if coloured.sum() > (pixels.max(-1) >= 128).sum() / 10:
        y, x = np.unravel_index(coloured.argmax(), coloured.shape)
        found = f"holds colours, as #{pixels[y, x].tobytes().hex()} at {x}, {y}"
        raise UserError(f"{found}; paint white what is to be generated, and the rest black")
    levels = np.asarray(picture.convert("L"))
    if 0 < levels.max() < 128:
        reason = f"its brightest grey is {levels.max()}, and white begins at 128"
        raise UserError(f"{reason}; paint white what is to be generated")
    return levels >= 128


REDIRECTING = threading.RLock()


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Discard the remarks that Pillow warns and logs and that libtiff writes to stderr by itself.

    What matters of them comes as UserError. It redirects the process's stderr: threads wait.
    """
    with REDIRECTING, warnings.catch_warnings(), open(os.devnull, "w") as null:
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
    save_bytes(path, encoded.getvalue())


def save_film(path: str | Path, frames: list[Image.Image]) -> None:
    """Write frames of one size as an animated WebP that shows each for 0.1 s and the last for 2 s,
    atomically; smaller where they are larger than a WebP may be. Raises UserError if the disk
    refuses."""
    encoded = io.BytesIO()
    within = [min(side, LONGEST_WEBP) for side in frames[0].size]
    first, *rest = [ImageOps.contain(frame, within) for frame in frames]
    durations = [100] * len(rest) + [2000]
    how = dict(quality=90, duration=durations, loop=0, save_all=True, append_images=rest)
    first.save(encoded, "WEBP", **how)
    save_bytes(path, encoded.getvalue())


def save_figure(path: str | Path, figure) -> None:
    """Write a figure of matplotlib as PNG, atomically. Raises UserError if the disk refuses."""
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=100)
    save_bytes(path, encoded.getvalue())


def save_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically. Raises UserError if the disk refuses."""
    save_bytes(path, text.encode())


def save_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, atomically. Raises UserError if the disk refuses."""
    path = Path(path)
    try:
        _draft(path).write_bytes(content)
        os.replace(_draft(path), path)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {describe_error(error)}") from None
    finally:
        with suppress(OSError):
            _draft(path).unlink()


def check_no_address(folder: Path, flag: str = "--out") -> None:
    """Raise UserError for an address, which would be made a folder of that name: what is written
    is renamed when it is whole, and that a bucket cannot."""
    is_address = URL.match(f"{folder}/") or URL.search(str(folder))  # also one that became absolute
    if is_address and not folder.exists():
        known = "a disk, NFS, Lustre, Filestore; no bucket"
        raise UserError(f"{flag} {folder}: an address, not a path; name a folder here ({known})")


def check_writable(folder: Path, name: str, flag: str = "--out") -> None:
    """Prove that a file `name` can be saved in a folder, which is made if need be, and leave
    nothing behind. Raises UserError naming the folder as that of `flag`."""
    file = folder / name
    check_no_address(folder, flag)
    made = [above for above in file.parents if not os.path.exists(above)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _draft(file).write_bytes(b"\0")
    except (OSError, RecursionError) as error:  # of mkdir, where the path is of a thousand parts
        long = getattr(error, "errno", 0) == errno.ENAMETOOLONG
        remedy = "shorten the name" if long else "choose another folder"
        raise UserError(f"{flag} {folder}: {describe_error(error)}; {remedy}") from None
    finally:
        for undo in (_draft(file).unlink, *(above.rmdir for above in made)):
            with suppress(OSError):
                undo()


def _draft(path: Path) -> Path:
    # Beside the final file, because os.replace is atomic only within one file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def _decoding(name: str, file: Path | io.BytesIO | None = None) -> Iterator[None]:
    """Turn what decoding a picture, of a file if there is one, may raise into a PictureError about
    `name`."""
    try:
        yield
    except UserError as error:
        raise PictureError(f"{name} {error}") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{name} has more than {MAX_PIXELS} pixels; shrink it") from None
    except Image.UnidentifiedImageError:
        raise PictureError(f"{name} {_describe_unread(file)}") from None
    except Exception as error:  # a decoder may raise anything on a hostile file
        remedy = "fetch it again, or save it anew, in 8 bits"
        raise PictureError(f"{name} cannot be read: {describe_error(error)}; {remedy}") from None


def _describe_unread(file: Path | io.BytesIO) -> str:
    """What a file is by its first bytes, where it is no picture that is read, and what helps."""
    with file.open("rb") if isinstance(file, Path) else file as stream:
        stream.seek(0)
        start = stream.read(32)
    if kind := next((kind for kind in FORMATS if Image.OPEN[kind][1](start)), ""):
        return f"is a {kind} that is damaged, or of a rare kind; save it anew, in 8 bits"
    words = describe_foreign(start)
    return f"is none of {', '.join(FORMATS)}{f' but {words}' if words else '; convert it'}"


def _decode(file: Path | io.BytesIO, ground: str) -> Image.Image:
    with Image.open(file, formats=FORMATS) as picture:
        if picture.format == "PNG":
            picture.info["cicp"] = find_cicp(picture.fp)
        return to_upright_rgb(picture, ground)
