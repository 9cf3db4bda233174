"""Laws of pictures.py: every readable picture comes out right, every other one as one UserError."""

import io
import os
import random
import threading
import zlib

import numpy as np
import pytest
from picturefiles import BLUE, RED, pixels, png, quadrants
from PIL import Image

from vcloze_jax.config import UserError
from vcloze_jax.inputs import pictures as images
from vcloze_jax.inputs.pictures import (
    measure_picture,
    open_picture,
    quiet_decoders,
)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff", "gif", "ppm"])
def test_lossless_formats_come_out_exactly(tmp_path, suffix):
    """Law: what a lossless format stores is what is read, in mode RGB."""
    quadrants().save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    opened = open_picture(tmp_path / f"a.{suffix}")
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(quadrants()))


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
    "cICP": (b"", b"\x0c\x0d\0"),
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
        ("a fox.png", "a%20fox.png", "there is 'a fox.png'"),
        ("fox.png", "wolf*.png", "nothing fits the pattern"),
        ("fox.png", "-", "what another program says is not read"),
        ("fox.png", "file:///fox.png", "it is a URL: write the path alone"),
        ("fox.png", "data:image/png;base64,iVBO", "it is a URL: save it in a file"),
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
    b"\xff\x0a\0\0": " but JPEG XL or 2000; convert it",
    b"\0\0\0\x0cjP  \r\n": " but JPEG XL or 2000; convert it",
    b"\0\0\0\x20ftypisom": " but a film; save the frame that is meant",
    b"PK\x03\x04\x14\0": " but an archive; unpack it",
    b"\x93NUMPY\x01\0": " but an array; save it as a picture, or give it in a program",
    b"%PDF-1.4": " but PDF; save the page that is meant as a picture",
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


def test_threads_take_turns_to_be_quiet():
    """Where two threads open pictures, the process's stderr is afterwards what it was."""
    before, inside, left = os.fstat(2).st_ino, threading.Event(), threading.Event()

    def second():
        with quiet_decoders():
            inside.set()
            left.wait(5)

    with quiet_decoders():
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(0.3)  # it may not come in before this one has left
    left.set()
    thread.join()
    assert os.fstat(2).st_ino == before
