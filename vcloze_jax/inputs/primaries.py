"""The colours of a PNG that gives them by numbers (cICP, or cHRM and gAMA) and not by a profile.

Sources: ITU-T H.273, tables 2 and 3; the PNG specification, third edition, 4.3 and 11.3.2.
"""

import numpy as np
from PIL import ImageCms

from vcloze_jax.config import UserError

D65 = 0.3127, 0.3290
SRGB = *D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06  # x and y of white, red, green and blue
PRIMARIES = {  # by their number
    1: SRGB,
    2: SRGB,  # "unspecified"
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),  # PAL
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),  # NTSC
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # DCI-P3
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
# gAMA of a curve by its number; those of video are looked at as sRGB's is.
CURVES = dict.fromkeys((1, 2, 4, 6, 13, 14, 15), 1 / 2.2) | {5: 1 / 2.8, 8: 1.0}
HDR = {16: "PQ", 18: "HLG"}
ALIKE = 0.002  # of x or y, by which sRGB's own are written in other ways
D50 = np.array([0.9642, 1.0, 0.8249])  # XYZ of a profile's white
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def read_cicp(numbers: tuple[int, ...]) -> tuple[float, tuple[float, ...]]:
    """The gAMA and cHRM that say the same as cICP's primaries, curve, matrix and range. Raises
    UserError for what none say."""
    primaries, curve, matrix, full = numbers
    if curve in HDR:
        raise UserError(f"is of HDR ({HDR[curve]}, says its cICP); save it in SDR, as sRGB")
    if primaries not in PRIMARIES or curve not in CURVES or matrix or full != 1:
        told = ", ".join(map(str, numbers))
        raise UserError(f"has colours that are not read (cICP {told}); save it as sRGB")
    return CURVES[curve], PRIMARIES[primaries]


def make_profile(corners: tuple[float, ...]) -> bytes:
    """A profile of sRGB's curve with other primaries, given as cHRM has them; b"" for sRGB's own.
    Raises ValueError for what are none."""
    if np.abs(np.subtract(corners, SRGB)).max() < ALIKE:
        return b""
    x, y = np.reshape(corners, (4, 2)).T
    if y.min() < ALIKE:
        raise ValueError("a colour that gives no light")
    white, *columns = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    matrix = np.transpose(columns)  # [XYZ, RGB]
    matrix = matrix * np.linalg.solve(matrix, white)
    cones = BRADFORD @ D50 / (BRADFORD @ white)
    matrix = np.linalg.solve(BRADFORD, cones[:, None] * (BRADFORD @ matrix))
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12):
        name = profile[entry : entry + 4]
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            place = int.from_bytes(profile[entry + 4 : entry + 8]) + 8
            column = matrix[:, "rgb".index(chr(name[0]))]
            profile[place : place + 12] = np.rint(column * 2**16).astype(">i4").tobytes()
    own, other = ("sRGB".encode("utf-16-be"), "cHRM".encode("utf-16-be"))  # in its description
    return bytes(profile.replace(own, other))
