"""Laws of modes.py and of masks: whatever a file says of its levels and clear parts, it is
read as its maker sees it, or refused by name."""

import struct
import zlib

import numpy as np
import pytest
from picturefiles import BLUE, GREY, GREY_ALPHA, RGB, RGBA, WHITE, pixels, png, quadrants
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.inputs.pictures import measure_picture, open_picture, to_mask


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_modes(tmp_path, mode):
    """Law: JPEG of any colour model comes out as RGB of the same colours (within its loss)."""
    grey = Image.new("RGB", (32, 16), (90, 90, 90))
    grey.convert(mode).save(tmp_path / "a.jpg", quality=95, progressive=True)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - 90).max() <= 2  # two levels of JPEG loss


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


def test_floats_are_read_as_an_array_is(tmp_path):
    """Law: a grey of floats in [0, 1] is one of 8 bits, as an array of a program is; a picture
    whose white is not known is refused, not guessed."""
    ramp = np.array([[0, 0.5, 1]], np.float32)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 128, 255]
    assert to_mask(open_picture(tmp_path / "a.tiff", "black")).tolist() == [[False, True, True]]
    signed = np.full((2, 2), 9, np.int32)
    Image.new("L", (2, 2), 220).save(tmp_path / "a.tiff", tiffinfo={339: 2})  # of 8 bits, too
    with pytest.raises(UserError, match="has signed levels, whose white is not known; save it in"):
        open_picture(tmp_path / "a.tiff")
    refused = {
        "not in .0, 1.; scale them": ramp * 255,
        "has signed levels, whose white is .*; save it in 8": signed,
    }
    for message, array in (refused | {"not in .0, 1.": ramp * np.nan}).items():
        Image.fromarray(array).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match=message):
            open_picture(tmp_path / "a.tiff")


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
