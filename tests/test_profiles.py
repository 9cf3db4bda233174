"""Laws of colours: what a file says of primaries, white and curve is obeyed, or refused by name."""

import struct
import zlib

import numpy as np
import pytest
from picturefiles import WHITE, pixels, png, quadrants
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from vcloze_jax.config import UserError
from vcloze_jax.inputs.pictures import copy_picture, open_picture


def with_swapped_primaries():
    """sRGB's profile with red's and blue's place in it exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * profile[131], 12)}
    red, blue = (slice(entries[name] + 4, entries[name] + 12) for name in (b"rXYZ", b"bXYZ"))
    profile[red], profile[blue] = profile[blue], profile[red]
    text = profile.find("sRGB".encode("utf-16-be"))  # in its description
    profile[text : text + 8] = "odd!".encode("utf-16-be")
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_says_what_colours_are(tmp_path, mode):
    """Law: what a file's profile says of its numbers is obeyed, whatever its mode, and alpha stays;
    sRGB's own and a broken one leave every bit, and a mask's levels are no colours."""
    file, swapped = tmp_path / "a.png", Image.fromarray(np.asarray(quadrants())[..., ::-1])
    options = {"icc_profile": with_swapped_primaries()}
    quadrants().convert(mode).save(file, **options)
    opened = open_picture(file)
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(swapped)).max() <= 1
    again = np.asarray(copy_picture(opened))  # it is of sRGB now
    np.testing.assert_array_equal(again, np.asarray(opened))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile"):
        quadrants().convert(mode).save(file, icc_profile=profile)
        np.testing.assert_array_equal(pixels(file), np.asarray(quadrants()))
    grey = Image.new("L", (2, 1), 127)
    grey.save(file, icc_profile=options["icc_profile"])  # of three channels, for one
    assert (np.asarray(open_picture(file, "black")) == 127).all()
    assert (pixels(file) == 127).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_linear_png_is_shown_as_a_display_does(tmp_path, mode):
    """Law: levels that a PNG says to be linear in light are made those of sRGB, and alpha is not;
    those that grow as sRGB's, or beside a profile, and those of a mask stay."""
    file, picture = tmp_path / "a.png", Image.new("RGB", (2, 1), (55, 55, 55)).convert(mode)
    picture.save(file)
    plain = file.read_bytes()

    def read(gamma, *more, ground="white"):
        body = struct.pack(">I", gamma)
        added = struct.pack(">I", 4) + b"gAMA" + body
        added += struct.pack(">I", zlib.crc32(b"gAMA" + body))
        file.write_bytes(plain[:33] + added + b"".join(more) + plain[33:])
        return set(np.asarray(open_picture(file, ground)).ravel().tolist())

    assert read(100000) == {128}  # 0.216 of light
    assert read(100000, ground="black") == {55} and read(45455) == {55}
    srgb = struct.pack(">I", 1) + b"sRGB\0" + struct.pack(">I", zlib.crc32(b"sRGB\0"))
    assert read(100000, srgb) == {55}


def test_curves_bend_a_palette_and_leave_what_is_clear(tmp_path):
    """Law: colours of a palette are bent by gAMA as RGB's are, and a colour that is declared clear
    is clear after it, too."""
    picture, linear = Image.new("RGB", (2, 1), (60, 120, 200)), PngInfo()
    picture.putpixel((1, 0), (10, 20, 30))
    linear.add(b"gAMA", struct.pack(">I", 100000))
    found = {}
    for name, saved in {"rgb": picture, "palette": picture.quantize(2)}.items():
        saved.save(tmp_path / f"{name}.png", pnginfo=linear)
        found[name] = pixels(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(found["palette"], found["rgb"])
    assert found["rgb"][0, 0].tolist() == [133, 182, 229]
    picture.save(tmp_path / "clear.png", pnginfo=linear, transparency=(10, 20, 30))
    clear = pixels(tmp_path / "clear.png")
    assert clear.tolist() == [[[133, 182, 229], [255, 255, 255]]]


DISPLAY_P3 = 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000  # as cHRM has it


# What CSS Color 4 says of sRGB's red, green, blue and white in color(display-p3 …), in 8 bits.
QUADRANTS_IN_P3 = [[(234, 51, 35), (117, 251, 76)], [(0, 0, 245), WHITE]]


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        {"cICP": bytes([12, 13, 0, 1])},
        {"cICP": bytes([12, 13, 0, 1]), "iCCP": b"p\0\0" + zlib.compress(with_swapped_primaries())},
        {"cICP": bytes([12, 13, 0, 1]), "tEXt": b"workflow\0" + b"{}" * 2**21, "zTXt": b"k\0\7"},
        {"gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *DISPLAY_P3)},
    ],
    ids=["cICP", "before a profile", "beside broken text", "cHRM"],
)
def test_primaries_say_what_colours_are(tmp_path, said, alpha):
    """Law: a PNG that gives its colours by numbers, and not by a profile, as phones' Display P3, is
    read as its maker sees it, alpha too; a mask's levels are no colours."""
    stored = np.array(QUADRANTS_IN_P3, np.uint8)
    body = np.dstack([stored, np.full((2, 2), 255, np.uint8)]) if alpha else stored
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in body))
    file = tmp_path / "a.png"
    file.write_bytes(png(2, 2, body, kind=6 if alpha else 2, **said))
    expected = np.asarray(quadrants(1))[:, :2].astype(int)
    assert np.abs(pixels(file) - expected).max() <= 3  # half a level, where sRGB is steepest
    np.testing.assert_array_equal(np.asarray(open_picture(file, "black")), stored)


@pytest.mark.parametrize(
    "said",
    [
        {"cICP": bytes([1, 13, 0, 1])},
        {"cICP": bytes([1, 1, 0, 1])},  # frames of a video
        {"cICP": bytes([2, 2, 0, 1])},
        {"cICP": bytes([12, 13, 0])},
        {"cICP": bytes([1, 13, 0, 1]), "gAMA": struct.pack(">I", 100000)},
        {"cHRM": struct.pack(">8I", *DISPLAY_P3)},  # without gAMA it says nothing
        {"gAMA": struct.pack(">I", 45455), "cHRM": bytes(32)},
        {"gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *[30000] * 8)},
        {"sRGB": b"\0", "gAMA": struct.pack(">I", 45455), "cHRM": struct.pack(">8I", *DISPLAY_P3)},
    ],
)
def test_what_says_srgb_or_nothing_leaves_every_bit(tmp_path, said):
    """Law: numbers of sRGB, of a video that is looked at like it, or broken ones change nothing."""
    stored = np.array(QUADRANTS_IN_P3, np.uint8)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in stored))
    (tmp_path / "a.png").write_bytes(png(2, 2, body, **said))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), stored)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((9, 16, 0, 1), r"a.png' is of HDR \(PQ, says its cICP\); save it in SDR, as sRGB"),
        ((9, 18, 0, 1), r"a.png' is of HDR \(HLG"),
        ((1, 13, 0, 0), r"a.png' has colours that are not read \(cICP 1, 13, 0, 0\); save it as"),
        ((10, 13, 0, 1), "colours that are not read"),
        ((1, 13, 1, 1), "colours that are not read"),
    ],
)
def test_colours_of_no_known_white_are_refused(tmp_path, numbers, message):
    """Law: HDR has no white that were sRGB's, and numbers that are not known are not guessed."""
    body = zlib.compress(bytes(4))
    for others in ({}, {"zTXt": b"k\0\7"}):  # broken
        (tmp_path / "a.png").write_bytes(png(1, 1, body, cICP=bytes(numbers), **others))
        with pytest.raises(UserError, match=message):
            open_picture(tmp_path / "a.png")


def test_a_linear_curve_is_read_of_cicp_too(tmp_path):
    """Law: cICP's linear levels are those of gAMA 1."""
    body = zlib.compress(b"\0\x37\x37\x37")
    (tmp_path / "a.png").write_bytes(png(1, 1, body, cICP=bytes([1, 8, 0, 1])))
    assert (pixels(tmp_path / "a.png") == 128).all()
