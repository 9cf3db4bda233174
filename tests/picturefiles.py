"""Picture files for tests, and what is read of them."""

import struct
import zlib

import numpy as np
from PIL import Image

from vcloze_jax.inputs.pictures import PictureSize, measure_picture, open_picture

SHAPES = [(64, 64), (100, 70), (70, 100), (333, 41), (48, 200)]
GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # kinds of PNG
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


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(width, height, seed=0):
    return Image.fromarray(noise(width, height, seed))
