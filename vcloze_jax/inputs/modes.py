"""Whatever mode a picture is of, as the RGB that its maker sees."""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageColor, ImageOps

from vcloze_jax.config import UserError

MAX_PIXELS = 2**26  # 8192 x 8192, 256 MiB as Pillow holds it
PHOTOMETRIC, MIN_IS_WHITE = 262, 0  # a tag of TIFF, and what it says of an X-ray


def to_upright_rgb(picture: Image.Image, ground: str) -> Image.Image:
    """A picture that is open, decoded, turned as its EXIF says, alpha over `ground`, as RGB.

    Raises DecompressionBombError above `MAX_PIXELS`, UserError for what would be all white or
    black, and whatever a decoder raises.
    """
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    picture.load()
    with suppress(Exception):  # EXIF that cannot be read says nothing
        ImageOps.exif_transpose(picture, in_place=True)
    return _to_rgb(picture, ground)


def _to_rgb(picture: Image.Image, ground: str) -> Image.Image:
    if picture.mode[0] in "IF":
        return _from_deep_grey(picture, ground).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if ground == "white" and not picture.getchannel("A").getbbox():
            raise UserError("is clear everywhere: nothing of it is seen; save it without alpha")
        if ground == "black" and _is_a_photo_with_a_hole(picture):
            reason = "is a picture with a clear part, and a mask is white where it is painted"
            raise UserError(f"{reason}: fill what is clear with white and the rest with black")
        sheet = Image.new("RGB", picture.size, ground)
        sheet.paste(picture, mask=picture.getchannel("A"))
        return sheet
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _is_a_photo_with_a_hole(mask: Image.Image) -> bool:
    """Whether most of an RGBA mask is seen, but not all, and most of that is coloured: others'
    editors cut what is to be painted out of the picture itself."""
    pixels = np.asarray(mask)
    seen = pixels[..., :3][pixels[..., 3] >= 128]
    coloured = np.ptp(seen, axis=-1) >= 32  # from the least of RGB to the most
    size = pixels[..., 3].size
    return size / 2 < len(seen) < size and coloured.mean() > 0.5


def _from_deep_grey(picture: Image.Image, ground: str) -> Image.Image:
    grey = np.asarray(picture)
    wide = picture.mode == "F" or (picture.mode, picture.format) == ("I", "TIFF")
    if wide or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("more than 16 bits per pixel")  # where is its white?
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == MIN_IS_WHITE:
        grey = 65535 - grey  # which Pillow does in 8 bits only
    clear = grey == picture.info.get("transparency", -1)  # the grey that a PNG calls clear
    if 0 < (most := grey.max(where=~clear, initial=0)) < 256:  # 8 bits, saved as 16: black
        raise UserError(f"has 16 bits, and its brightest level is {most}; save it in 8 bits")
    levels = np.rint(grey / np.float32(257)).astype(np.uint8)
    levels[clear] = ImageColor.getcolor(ground, "L")
    return Image.fromarray(levels)
