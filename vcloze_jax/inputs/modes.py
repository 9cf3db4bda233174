"""Whatever mode a picture is of, as the RGB that its maker sees."""

import io
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps

from vcloze_jax.config import UserError
from vcloze_jax.inputs.primaries import make_profile, read_cicp

MAX_PIXELS = 2**26  # 8192 x 8192, 256 MiB as Pillow holds it
PHOTOMETRIC, MIN_IS_WHITE = 262, 0  # a tag of TIFF, and what it says of an X-ray
SAMPLES, SIGNED = 339, 2  # another, and what it says of levels below 0
KIND, REDUCED = 254, 1  # another, and the bit of it that says: a smaller copy of a later page
BANDS = {"L": 1, "LA": 1, "RGB": 3, "RGBA": 3}  # modes and how many of their bands are colours
DARK = 2**14  # a white of 16 bits below this is that of 8, 10, 12 or 14, or a depth in millimetres
FAINT = 248  # levels from this on are not told from white by eye


def to_upright_rgb(picture: Image.Image, ground: str) -> Image.Image:
    """A picture that is open, decoded, turned as its EXIF says, alpha over `ground`, as RGB.

    Raises DecompressionBombError above `MAX_PIXELS`, UserError for what would be all white or
    black, and whatever a decoder raises.
    """
    if not picture.width or not picture.height:
        raise UserError("has no pixels")
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if getattr(picture, "tag_v2", {}).get(KIND, 0) & REDUCED:
        remedy = "open it where it was made, and save it as PNG or JPEG"
        raise UserError(f"begins with a preview, as cameras' raw files do; {remedy}")
    if SIGNED in getattr(picture, "tag_v2", {}).get(SAMPLES, ()):
        raise UserError("has signed levels, whose white is not known; save it in 8 bits")
    deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))  # raw mode
    picture.load()
    with suppress(Exception):  # EXIF that cannot be read says nothing
        ImageOps.exif_transpose(picture, in_place=True)
    if ground == "white":  # the levels of a mask are no colours
        picture = _to_srgb(_to_display(picture))
    picture = _to_rgb(picture, ground)
    if deep and 0 < (most := max(high for _, high in picture.getextrema())) < DARK // 256:
        _refuse_dark(most * 256)  # colours of 16 bits, of which Pillow has kept 8
    return picture


def _to_display(picture: Image.Image) -> Image.Image:
    """A PNG that says by numbers how its levels grow with light and what its primaries are, as a
    renderer's linear one, as a display shows it, with a profile of the primaries; as it is where
    they grow as sRGB's do, about as the root 2.2 of light. Raises UserError for HDR."""
    said = picture.info
    gamma, corners = said.pop("gamma", None), said.pop("chromaticity", ())
    if numbers := said.pop("cicp", ()):  # it holds before a profile
        said.pop("icc_profile", None)
        gamma, corners = read_cicp(numbers)
    elif not gamma or {"icc_profile", "srgb"} & said.keys():
        return picture
    picture = _bend(picture, gamma)
    with suppress(ValueError):  # of primaries that are none
        picture.info["icc_profile"] = make_profile(corners)
    return picture


def _bend(picture: Image.Image, gamma: float) -> Image.Image:
    if abs(gamma * 2.2 - 1) < 0.1:
        return picture
    if picture.mode == "P" or "transparency" in picture.info:
        picture = picture.convert("RGBA")  # else the colour that is clear stays as it was
    if picture.mode not in BANDS:
        return picture
    light = (np.arange(256) / 255) ** (1 / gamma)
    bent = 1.055 * light ** (1 / 2.4) - 0.055
    levels = np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, bent)).astype(int).tolist()
    tables = [levels] * BANDS[picture.mode] + [[*range(256)]] * picture.mode.endswith("A")
    return picture.point(sum(tables, []))


def _to_srgb(picture: Image.Image) -> Image.Image:
    """A picture in the colours that its profile gives its numbers, as a telephone's Display P3, in
    sRGB; as it is where it has none, sRGB's own, or one that is broken or of other channels."""
    profile = picture.info.pop("icc_profile", None)
    if not profile or picture.mode[0] in "IF":
        return picture
    if picture.has_transparency_data or picture.mode == "P":
        picture = picture.convert("RGBA")
    with suppress(Exception):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" not in profile.profile.profile_description:
            mode = "RGBA" if picture.mode == "RGBA" else "RGB"
            srgb = ImageCms.createProfile("sRGB")
            picture = ImageCms.profileToProfile(picture, profile, srgb, outputMode=mode)
            del picture.info["icc_profile"]  # of what is now sRGB
    return picture


def _to_rgb(picture: Image.Image, ground: str) -> Image.Image:
    if picture.mode[0] in "IF":
        return _from_deep_grey(picture, ground).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        if ground == "white" and not alpha.getbbox():
            raise UserError("is clear everywhere: nothing of it is seen; save it without alpha")
        sheet = Image.new("RGB", picture.size, ground)
        sheet.paste(picture, mask=alpha)
        least = min(low for low, _ in sheet.getextrema())
        if ground == "white" and least >= FAINT and alpha.getextrema()[0] == 0:
            reason = "is white where it is not clear, and what is clear becomes white"
            raise UserError(f"{reason}: nothing of it is seen; lay it over another colour")
        return sheet
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_deep_grey(picture: Image.Image, ground: str) -> Image.Image:
    grey = np.asarray(picture)
    if picture.mode == "F":
        if not (grey.min() >= 0 and grey.max() <= 1):  # NaN is neither
            raise UserError("is of floats that are not in [0, 1]; scale them, or save it in 8 bits")
        return Image.fromarray(np.rint(grey * np.float32(255)).astype(np.uint8))
    if (picture.mode, picture.format) == ("I", "TIFF") or grey.min() < 0 or grey.max() > 65535:
        raise UserError(
            "has signed levels, or 32 bits, whose white is not known; save it in 8 bits"
        )
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == MIN_IS_WHITE:
        grey = 65535 - grey  # which Pillow does in 8 bits only
    clear = grey == picture.info.get("transparency", -1)  # the grey that a PNG calls clear
    if 0 < (most := grey.max(where=~clear, initial=0)) < DARK:
        _refuse_dark(most)
    levels = np.rint(grey / np.float32(257)).astype(np.uint8)
    levels[clear] = ImageColor.getcolor(ground, "L")
    return Image.fromarray(levels)


def _refuse_dark(most: int) -> None:
    reason = f"has 16 bits, and its brightest level is {most} of 65535: all but black"
    raise UserError(f"{reason}; stretch its levels, or save it in 8 bits")
