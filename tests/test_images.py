"""Laws of images.py: every readable picture comes out right, every other one as one UserError."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from vcloze_jax.config import UserError
from vcloze_jax.inputs import pictures as images
from vcloze_jax.inputs.pictures import (
    PictureSize,
    measure_picture,
    open_picture,
    quiet_decoders,
    save_png,
    save_text,
    to_mask,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(scale=16):
    """Red and green above, blue and white below; 3:2, so that a turn shows in the size."""
    corners = np.array([[RED, GREEN, GREEN], [BLUE, WHITE, WHITE]], np.uint8)
    return Image.fromarray(corners.repeat(scale, 0).repeat(scale, 1))


def pixels(path):
    """What a file shows; the size that its header tells is that."""
    picture = open_picture(path)
    assert measure_picture(path) == PictureSize(*picture.size)
    return np.asarray(picture)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff", "gif", "ppm"])
def test_lossless_formats_come_out_exactly(tmp_path, suffix):
    """Law: what a lossless format stores is what is read, in mode RGB."""
    quadrants().save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    opened = open_picture(tmp_path / f"a.{suffix}")
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(quadrants()))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_modes(tmp_path, mode):
    """Law: JPEG of any colour model comes out as RGB of the same colours (within its loss)."""
    grey = Image.new("RGB", (32, 16), (90, 90, 90))
    grey.convert(mode).save(tmp_path / "a.jpg", quality=95, progressive=True)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - 90).max() <= 2  # two levels of JPEG loss


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_exif_turn(tmp_path, turn, suffix):
    """Law: a picture stored turned, with the tag that says so, is read upright."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quadrants().transpose(inverse[turn]) if turn > 1 else quadrants()
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / f"a.{suffix}", exif=exif, lossless=True)
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.asarray(quadrants()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_alpha_lies_over_white(tmp_path, mode):
    """Law: a transparent pixel is white, whatever colour hides under it; an opaque one is kept."""
    if mode == "P":
        picture = Image.new("P", (4, 2), 0)
        picture.putpalette([*BLUE, 0, 0, 0])
        picture.paste(1, (2, 0, 4, 2))
        options = {"transparency": 0}
    elif mode == "tRNS":
        picture, options = Image.new("RGB", (4, 2), BLUE), {"transparency": BLUE}
        picture.paste((0, 0, 0), (2, 0, 4, 2))
    else:
        picture, options = Image.new("RGBA", (4, 2), (0, 0, 0, 0)), {}
        picture.paste((0, 0, 0, 255), (2, 0, 4, 2))
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png", **options)
    expected = np.array([[WHITE] * 2 + [(0, 0, 0)] * 2] * 2)
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_deep_grey_keeps_its_range(tmp_path, suffix):
    """Law: 16-bit grey is scaled (v / 257, rounded), not cut at 255."""
    ramp = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    assert pixels(tmp_path / f"a.{suffix}")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("case", ["photo", "hole", "labels", "stroke"])
def test_colours_are_no_mask(tmp_path, case):
    """Law: a mask is white and black. Of a photo, of one with a clear hole where it is to be
    painted (as others' editors have it), of a picture of labels or of coloured strokes some part or
    other would be bright: they are refused, as a mask alone."""
    clear = (0, 0, 0, 0)
    picture = Image.new(
        "RGBA", (32, 32), (250, 200, 40, 255) if case in ("photo", "hole") else clear
    )
    if case == "photo":
        picture.paste((90, 20, 120, 255), (0, 0, 32, 16))
    elif case == "hole":
        picture.paste(clear, (8, 8, 24, 24))
    else:
        picture.paste(
            (192, 128, 128, 255) if case == "labels" else (250, 220, 40, 255), (8, 8, 24, 24)
        )
    picture.save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (32, 32)
    with pytest.raises(UserError, match=r"holds colours, as #\w{6} at \d, \d; paint white what"):
        to_mask(open_picture(tmp_path / "a.png", "black"))


def test_a_jpeg_may_be_a_mask(tmp_path):
    """Law: what JPEG makes of white on black, in colour and at its worst, is no colour."""
    strokes = np.zeros((64, 64, 3), np.uint8)
    strokes[20:40, 10:50] = 255
    for subsampling in (0, 2):
        file = tmp_path / "a.jpg"
        Image.fromarray(strokes).save(file, quality=5, subsampling=subsampling)
        mask = to_mask(open_picture(file, "black"))
        assert (mask != (strokes[..., 0] > 0)).sum() < 64


@pytest.mark.parametrize("dtype, most", [(np.uint8, 255), (np.uint16, 65535)])
def test_a_negative_is_turned_over(tmp_path, dtype, most):
    """Law: a TIFF whose 0 is white, as of an X-ray, is shown as its maker sees it, at any depth."""
    stored = np.array([[0, most]], dtype)
    Image.fromarray(stored).save(tmp_path / "a.tiff", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tiff") as picture:
        assert picture.tag_v2[262] == 0
    expected = stored if dtype == np.uint8 else most - stored  # Pillow turns 8 bits as it writes
    assert pixels(tmp_path / "a.tiff")[0, :, 0].tolist() == (expected[0] // (most // 255)).tolist()


def test_one_bit_palette_and_first_frame(tmp_path):
    """Law: 1-bit is black and white; of an animation the first frame counts."""
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert pixels(tmp_path / "bit.png")[0, :, 0].tolist() == [255, 0]
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **{"lossless": True}
        )
        assert (pixels(tmp_path / name) == RED).all(), name


def png(width, height, body=b"", bits=8, kind=2, **chunks):
    """A PNG that claims a size and holds `body` as its data, behind other chunks."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = {"IHDR": header} | chunks | {"IDAT": body, "IEND": b""}
    parts = (chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # kinds of PNG


@pytest.mark.parametrize(
    "kind, values, chunks, expected",
    [
        (RGB, [65535, 32768, 0, 257, 514, 1028], {}, [(255, 128, 0), (1, 2, 4)]),
        (RGBA, [65535, 32768, 0, 65535, 0, 0, 0, 0], {}, [(255, 128, 0), WHITE]),
        (GREY_ALPHA, [32768, 65535, 0, 0], {}, [(128, 128, 128), WHITE]),
        (GREY, [65535, 7], {"tRNS": struct.pack(">H", 7)}, [WHITE, WHITE]),
        (GREY, [0, 7], {"tRNS": struct.pack(">H", 7)}, [(0, 0, 0), WHITE]),
    ],
)
def test_deep_png(tmp_path, kind, values, chunks, expected):
    """Law: 16 bits per channel keep their range in every kind of PNG, clear pixels are white."""
    body = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    (tmp_path / "a.png").write_bytes(png(2, 1, body, 16, kind, **chunks))
    assert [tuple(p) for p in pixels(tmp_path / "a.png")[0].tolist()] == expected


def test_cmyk_ink(tmp_path):
    """Law: ink is ink: full cyan is cyan, none is white."""
    ink = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 0]]], np.uint8), "CMYK")
    ink.save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0].tolist() == [[0, 255, 255], [255, 255, 255]]


def encoded(fmt, **options):
    buffer = io.BytesIO()
    quadrants().save(buffer, fmt, **options)
    return buffer.getvalue()


REFUSED = {
    "empty.png": (b"", "is empty"),
    "text.png": (b"hello", "none of"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of"),
    "cut.png": (encoded("PNG")[:-40], "cannot be read"),
    "cut.jpg": (encoded("JPEG")[:-300], "cannot be read"),
    "cut.gif": (encoded("GIF")[:-60], "cannot be read"),
    "nothing_inside.png": (png(8, 8), "cannot be read"),
    "bomb.png": (png(8193, 8192), "pixels"),
    "great_bomb.png": (png(60000, 60000), "pixels"),
    "wordy.png": (png(1, 1, zTXt=b"k\0\0" + zlib.compress(b"a" * 10**8)), "too large"),
    "no_side.png": (png(0, 5), "is a PNG that is damaged, or of a rare kind; save it anew"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of"),
    "other.jp2": (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "none of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_pictures_are_named(tmp_path, name):
    """Law: what cannot be decoded is one line that names the file, raised before any big memory."""
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        open_picture(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def deflated(text):
    return zlib.compress(text, 1)


METADATA = {
    "eXIf": (b"", b"II", b"junk" * 9, b"II*\0\x08\0\0\0\x05\0\x12\x01"),
    "tEXt": (
        b"workflow\0" + b"{}" * 2**21,
        b"transparency\0no",
        b"Raw profile type exif\0a\nb\nc\nxyz",
    ),
    "zTXt": (b"workflow\0\0" + deflated(bytes(2**21)), b"k\0\7", b"Raw profile type exif\0\0junk"),
    "iTXt": (b"prompt\0\1\0\0\0" + deflated(bytes(2**21)), b"XML:com.adobe.xmp\0\0\0\0\0<x"),
    "iCCP": (b"p\0\0" + deflated(bytes(2**21)), b"p\0\0junk", b"p\0\7junk", b""),
    "gAMA": (b"",),
    "cHRM": (b"\0",),
    "pHYs": (b"\0\0",),
    "sRGB": (b"",),
    "acTL": (b"\0",),
    "fcTL": (b"\0" * 26,),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's; quiet_decoders discards them
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_fails_no_png(tmp_path, kind):
    """Law: what a PNG says beside its pixels, large, broken or with a wrong checksum, is ignored,
    before the pixels and behind them."""
    body = deflated(b"\0" + bytes(range(6)))
    for data in METADATA[kind]:
        sound = png(2, 1, body, **{kind: data})
        start = sound.index(kind.encode())
        chunk = sound[start - 4 : start + 8 + len(data)]
        wrong = chunk[:-1] + bytes([chunk[-1] ^ 1])
        behind = sound.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")
        for content in (sound, sound.replace(chunk, wrong), behind):
            (tmp_path / "a.png").write_bytes(content)
            assert pixels(tmp_path / "a.png").tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.filterwarnings("ignore")
def test_a_turn_survives_other_metadata(tmp_path):
    """Law: a PNG whose profile is too large is still turned as its EXIF or its XMP says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    body = deflated(b"\0" + bytes(range(6)))
    for turned in ({"eXIf": exif.tobytes()[6:]}, {"iTXt": xmp}):
        content = png(2, 1, body, iCCP=b"p\0\0" + deflated(bytes(2**21)), **turned)
        (tmp_path / "a.png").write_bytes(content)
        assert pixels(tmp_path / "a.png").shape == (2, 1, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["webp", "jpg", "tiff"])
def test_metadata_fails_no_other_format(tmp_path, suffix):
    """Law: nor does broken EXIF or a large profile in any other format."""
    options = {"lossless": True} if suffix == "webp" else {"quality": 100}
    known = {"icc_profile": bytes(2**21)}
    broken = [{"exif": b"Exif\0\0" + b"junk" * 9}, {"exif": b"II*\0\x08\0\0\0\x05\0\x12\x01"}]
    for more in (known, *(broken if suffix != "tiff" else ())):
        Image.new("RGB", (4, 2), (90, 90, 90)).save(tmp_path / f"a.{suffix}", **options, **more)
        assert (pixels(tmp_path / f"a.{suffix}") == 90).all()


def test_floats_are_read_as_an_array_is(tmp_path):
    """Law: a grey of floats in [0, 1] is one of 8 bits, as an array of a program is; a picture
    whose white is not known is refused, not guessed."""
    ramp = np.array([[0, 0.5, 1]], np.float32)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 128, 255]
    assert to_mask(open_picture(tmp_path / "a.tiff", "black")).tolist() == [[False, True, True]]
    signed = np.full((2, 2), 9, np.int32)
    refused = {
        "not in .0, 1.; scale them": ramp * 255,
        "has signed levels, or 32 bits, .*; save it in 8": signed,
    }
    for message, array in (refused | {"not in .0, 1.": ramp * np.nan}).items():
        Image.fromarray(array).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match=message):
            open_picture(tmp_path / "a.tiff")


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
    again = np.asarray(images.copy_picture(opened))  # it is of sRGB now
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


@pytest.mark.parametrize("kind", [2, 6])
def test_dark_colours_of_16_bits_are_refused(tmp_path, kind):
    """Law: as of a grey, levels of up to 14 bits in 16 are all but black; black itself may be."""
    for level, refused in ((0, False), (6000, True), (40000, False)):
        values = np.full((1, 2, 3 if kind == 2 else 4), level, ">u2")
        values[..., 3:] = 65535
        body = zlib.compress(b"\0" + values.tobytes())
        (tmp_path / "a.png").write_bytes(png(2, 1, body, 16, kind))
        if refused:
            with pytest.raises(UserError, match="16 bits, and its brightest level is .* of 65535"):
                open_picture(tmp_path / "a.png")
        else:
            assert (pixels(tmp_path / "a.png") == level // 256).all()


def test_a_preview_is_not_the_picture(tmp_path):
    """Law: a camera's raw file is a TIFF that begins with a small copy, which is refused."""
    kind = {254: 1}
    quadrants().save(
        tmp_path / "a.tiff", tiffinfo=kind, save_all=True, append_images=[quadrants(64)]
    )
    with pytest.raises(UserError, match="a.tiff' begins with a preview, as cameras' raw files do"):
        measure_picture(tmp_path / "a.tiff")


def test_only_regular_files_are_opened(tmp_path):
    """Law: pipes, devices, folders, URLs and odd names are refused at once; nothing hangs."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for path, reason in {
        tmp_path / "pipe.png": "pipe",
        "/dev/zero": "device",
        tmp_path: "folder",
        tmp_path / "absent.png": "No such file",
        tmp_path / "loop.png": "links lead round in a circle; remove one",
        "https://example.org/a.png": "URL",
        "FILE:///etc/passwd": "URL",
        "s3://bucket/a.png": "URL",
        "": "No such file",
        "data:image/png;base64," + "A" * 5000: "URL",
        "a\0b.png": "null",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            open_picture(path)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "there, asked, remedy",
    [
        ("caf\u00e9.png", "cafe\u0301.png", "accents are encoded in another way"),
        ("Fox.PNG", "fox.png", r"there is 'Fox\.PNG'"),
        ("fox.png", "~/fox.png", "~ stands for no home"),
        ("fox.png", "..\\fox.png", "write / instead"),
        ("fox.png", "gone.png", "is a link to nowhere"),
        ("fox.png", "fox.png ", r"there is 'fox\.png'"),
        ("fox.png", '"fox.png"', r"there is 'fox\.png'"),
        ("fox.png", "fox", r"there is 'fox\.png'"),
        ("fox.png", "$HOME/fox.png", "variables are not filled in"),
        ("fox.png", "%HOME%/fox.png", "variables are not filled in"),
        ("fox.png", "null", "what is to be painted is null, without quotes"),
        ("fox.png", "wolf.png", "check the path"),
    ],
)
def test_a_missing_file_is_explained(tmp_path, there, asked, remedy):
    """Law: where a file seems to be there and is not, the line says what hides it: macOS decomposes
    accents, Windows knows no case, no shell expands what stands in a file."""
    (tmp_path / there).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"No such file or directory; .*{remedy}"):
        open_picture(tmp_path / asked)


UNREAD = {
    b"\0\0\0\x18ftypheic\0\0": " but HEIC or AVIF, as telephones have them; convert it",
    b"\0\0\0\x18ftypavif\0\0": " but HEIC or AVIF",
    b"\xff\x0a\0\0": " but JPEG XL; convert it",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": " but SVG, which has no pixels; convert it",
    b"<!DOCTYPE html>": " but a web page: the download failed; fetch it again$",
    b"version https://git-lfs.github.com/spec/v1": " but a pointer of git-lfs.*; run git lfs pull$",
    b"II*?": "PPM; convert it",
}


@pytest.mark.parametrize("start", UNREAD)
def test_what_is_no_picture_of_ours_says_what_it_is(tmp_path, start):
    """Law: a name tells nothing: what a file begins with says what it is and what helps."""
    (tmp_path / "a.jpg").write_bytes(start)
    with pytest.raises(UserError, match=f"a.jpg' is none of PNG, .*{UNREAD[start]}"):
        open_picture(tmp_path / "a.jpg")


def test_a_picture_that_shows_nothing_is_refused(tmp_path):
    """Law: what would silently be white or black is told: alpha that is 0 everywhere, as in bitmaps
    that do not use it, and levels of 8 to 14 bits saved with 16, as depth in millimetres has them.
    White strokes on clear are not seen on white. A mask that is clear is an empty mask."""
    file = tmp_path / "a.png"
    strokes = Image.new("LA", (4, 2), (255, 0))
    strokes.paste((250, 255), (2, 0, 4, 2))
    strokes.save(file)
    with pytest.raises(UserError, match="a.png' is white where it is not clear.*; lay it over"):
        open_picture(file)
    assert to_mask(open_picture(file, "black")).sum() == 4
    strokes.convert("L").save(file)  # an empty sheet is one
    assert pixels(file).min() >= 250
    picture = quadrants().convert("RGBA")
    picture.putalpha(0)
    picture.save(file)
    with pytest.raises(UserError, match="a.png' is clear everywhere.*; save it without alpha"):
        open_picture(file)
    assert not to_mask(open_picture(file, "black")).any()
    for most in (255, 5999, 16383):
        Image.fromarray(np.array([[0, most]], np.uint16)).save(file)
        with pytest.raises(
            UserError, match=f"16 bits, and its brightest level is {most} of .*; str"
        ):
            open_picture(file)
    Image.fromarray(np.zeros((1, 2), np.uint16)).save(file)
    assert not pixels(file).any()


@pytest.mark.filterwarnings("error")
def test_damaged_pictures_never_raise_anything_else(tmp_path, capfd):
    """Law: random damage gives a picture or a UserError, no warning and nothing on stderr."""
    draw = random.Random(0)
    sources = [encoded(fmt) for fmt in images.FORMATS]
    sources += [encoded("TIFF", compression=how) for how in ("tiff_lzw", "jpeg", "tiff_deflate")]
    for i in range(280):
        damaged = bytearray(sources[i % len(sources)])
        for _ in range(draw.choice([1, 4, 16])):
            damaged[draw.randrange(min(len(damaged), 400))] = draw.randrange(256)
        (tmp_path / "a").write_bytes(damaged)
        try:
            with quiet_decoders():
                measure_picture(tmp_path / "a")
                assert open_picture(tmp_path / "a").mode == "RGB"
        except UserError as error:
            assert "\n" not in str(error)
    assert capfd.readouterr().err == ""


def test_mask_threshold(tmp_path):
    """Law: grey of 128 and more is generated, less is kept; the mask keeps its size [h, w]."""
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "m.png")
    mask = to_mask(open_picture(tmp_path / "m.png"))
    assert mask.dtype == bool and mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_nothing_is_drawn_where_a_mask_is_clear(tmp_path, mode):
    """Law: of strokes on a clear ground only the strokes are marked, whatever colour is under it;
    half a stroke counts from half its white."""
    levels = np.array([[255, 255, 255, 0]], np.uint8)
    alpha = np.array([[0, 255, 255, 255]], np.uint8)
    if mode in ("RGBA", "LA"):
        alpha[0, 1] = 100
        picture = Image.merge("LA", [Image.fromarray(levels), Image.fromarray(alpha)])
        picture, options = picture.convert(mode), {}
    elif mode == "P":
        picture, options = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), "P"), {}
        picture.putpalette([255] * 3 + [90] * 3 + [255] * 3 + [0] * 3)
        options = {"transparency": 0}
    else:
        picture = Image.fromarray(np.array([[9, 0, 65535, 1]], np.uint16))
        options = {"transparency": 9}
    picture.save(tmp_path / "m.png", **options)
    mask = to_mask(open_picture(tmp_path / "m.png", "black"))
    assert mask.tolist() == [[False, False, True, False]]


def test_save_round_trip_leaves_nothing_else(tmp_path):
    """Law: what is saved is read back exactly, replaces the old file, and no temporary stays."""
    array = np.asarray(quadrants())
    for content in (np.zeros_like(array), array):
        save_png(tmp_path / "a.png", content)
    save_text(tmp_path / "a.json", "{}")
    assert np.array_equal(pixels(tmp_path / "a.png"), array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    """Law: a save that dies midway leaves the old file whole and no temporary behind."""
    save_text(tmp_path / "a.json", "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "replace", refuse)
    with pytest.raises(UserError, match="No space left"):
        save_text(tmp_path / "a.json", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    monkeypatch.setattr(images.Path, "unlink", refuse)  # where clean-up fails, too, it says nothing
    with pytest.raises(UserError, match="No space left"):
        save_text(tmp_path / "a.json", "new")


def test_proof_of_writing_leaves_nothing(tmp_path, monkeypatch):
    """Law: that a file can be written is proved by writing one; nothing of it stays, nor a folder
    that was made for it, and what was there stays."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.png").write_bytes(b"old")
    for folder in ("there", "a/b/c"):
        images.check_writable(tmp_path / folder, "a.png")
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "a.png"]

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    for folder, name, message in (
        ("there/a.png", "x", "--out .*a.png: File exists; choose another folder"),
        ("there", "n" * 250, "--out .*there: File name too long; shorten the name"),
        ("new", "x", "--out .*new: Read-only file system.*; choose another folder"),
    ):
        if folder == "new":
            monkeypatch.setattr(images.Path, "write_bytes", refuse)
        with pytest.raises(UserError, match=message):
            images.check_writable(tmp_path / folder, name)
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "a.png"]
