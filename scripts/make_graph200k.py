"""Write a tiny dataset of Graph200K's shape: `python scripts/make_graph200k.py FOLDER`.

Crops of photographs that scikit-image ships, saved as Hugging Face's datasets would (FOLDER/train,
FOLDER/test), with every column of the published dataset and nulls in most. `--json` writes what the
authors' processing.py makes of it instead: pictures as files, and a data.json of paths. Annotations
are stand-ins of the right look: a Canny map is one, but depth and poses are painted, not estimated.
It is for tests and first steps: 8 items, which show all of the task lists, in less than 100 KB.
"""

import argparse
import colorsys
import io
import json
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy import ndimage
from skimage.feature import canny
from skimage.segmentation import slic
from skimage.transform import probabilistic_hough_line

SPLITS = {"train": (5, 2), "test": (3, 1)}  # items, shards
PHOTOS = {
    "astronaut": ("woman", "an astronaut in an orange suit"),
    "chelsea": ("cat", "a tabby cat that looks into the camera"),
    "coffee": ("cup", "a cup of coffee on a wooden table"),
    "rocket": ("rocket", "a rocket on its launch pad at night"),
}
MISSING = {  # columns that item i lacks, by i mod 8
    0: ["openpose"],
    1: ["FillEdit_image_3", "qwen_2_5_mask"],
    2: ["ReduxStyle_image_0", "DepthEdit"],
    3: ["mlsd", "quality_assessment", "InstantStyle_ref_1"],
    5: ["foreground", "qwen_2_5_bounding_box", "qwen_2_5_meta"],
    7: ["hed", "FillEdit_meta", *(f"FillEdit_image_{i}" for i in range(5))],
}
PICTURES = [
    *("ref target canny depth hed normal mlsd openpose sam2_mask uniformer foreground".split()),
    *("qwen_2_5_mask", "qwen_2_5_bounding_box", "DepthEdit"),
    *(f"FillEdit_image_{i}" for i in range(5)),
    *(
        f"{s}Style_{part}_{i}"
        for s in ("Instant", "Redux")
        for part in ("image", "ref")
        for i in range(3)
    ),
]


def draw_item(number, side):
    """One record: {column: Pillow picture, text or table}; columns that it lacks are None."""
    name = [*PHOTOS][number % len(PHOTOS)]
    photo, rng = Image.fromarray(getattr(skimage.data, name)()), np.random.default_rng(number)
    target, ref = (crop(photo, rng, side) for _ in range(2))
    item = {"ref": ImageOps.mirror(ref), "target": target}
    item |= annotate(target, rng) | edit(target, item_box(side)) | style(target, photo, side)
    subject, text = PHOTOS[name]
    levels = rng.integers(3, 6, 3).tolist()
    if number % 8 == 6:
        levels[1] = 2  # a reference that is not like its target
    quality = ("compositeStructure", "objectConsistency", "imageQuality")
    item |= {
        "qwen_2_5_meta": json.dumps({"boxes": [{"name": subject, "box": item_box(side)}]}),
        "FillEdit_meta": {"name": f"blue {subject}", "description": f"{text}, in blue"},
        "quality_assessment": dict(zip(quality, levels, strict=True)),
        "description": {
            "item": subject,
            "description_0": f"{text}.",
            "description_1": f"Another view of {text}.",
            "category": name,
            "description_valid": True,
        },
        "collection": "scikit-image",
    }
    return item | dict.fromkeys(MISSING.get(number % 8, ()))


def crop(photo, rng, side):
    """A square of 70 % to 100 % of the photograph's shorter side."""
    edge = int(min(photo.size) * rng.uniform(0.7, 1))
    left, top = (int(rng.integers(length - edge + 1)) for length in photo.size)
    return photo.resize(
        (side, side), Image.Resampling.LANCZOS, (left, top, left + edge, top + edge)
    )


def item_box(side):
    """Where the subject is said to be: left, top, right, bottom."""
    return [side // 5, side // 6, side - side // 5, side - side // 8]


def annotate(target, rng):
    """The columns that tell what is where in the target."""
    pixels, gray = np.asarray(target), np.asarray(target.convert("L"), np.float32)
    side, box = target.width, item_box(target.width)
    edges = canny(gray, 1, 20, 60)
    depth = ndimage.gaussian_filter(gray, side / 32) / 2 + np.linspace(0, 127, side)[:, None]
    slope = np.stack([*np.gradient(depth)[::-1], np.full_like(depth, 4)], -1)
    normal = 127.5 + 127.5 * slope / np.linalg.norm(slope, axis=-1, keepdims=True)
    segments, classes = (slic(pixels, n, start_label=0) for n in (24, 6))
    mask = Image.new("L", target.size)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    colors = rng.integers(64, 256, (64, 3))
    named = Image.composite(
        Image.new("RGB", target.size, tuple(colors[0].tolist())), black(side), mask
    )
    boxed, lines = target.copy(), black(side)
    ImageDraw.Draw(boxed).rectangle(box, outline=(255, 0, 0), width=2)
    for ends in probabilistic_hough_line(edges, line_length=side // 6, line_gap=2, rng=0):
        ImageDraw.Draw(lines).line([*ends[0], *ends[1]], fill="white")
    drawn = dict(
        canny=255 * edges,
        depth=depth,
        hed=255 * np.tanh(ndimage.gaussian_gradient_magnitude(gray, 1) / 30),
        normal=normal,
        sam2_mask=colors[segments],
        uniformer=colors[::-1][classes],
    )
    pictures = {name: Image.fromarray(np.uint8(p)).convert("RGB") for name, p in drawn.items()}
    return pictures | dict(
        mlsd=lines,
        openpose=draw_pose(side),
        foreground=mask,
        qwen_2_5_mask=named,
        qwen_2_5_bounding_box=boxed,
    )


def black(side):
    return Image.new("RGB", (side, side))


def draw_pose(side):
    """A stick figure."""
    joints = (
        np.array([(50, 25), (50, 60), (35, 95), (65, 95), (50, 35), (30, 60), (70, 60)])
        * side
        / 100
    )
    pose = black(side)
    for i, (a, b) in enumerate([(0, 1), (1, 2), (1, 3), (4, 5), (4, 6)]):
        color = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / 5, 1, 1))
        ImageDraw.Draw(pose).line([*joints[a], *joints[b]], fill=color, width=max(side // 32, 1))
    return pose


def edit(target, box):
    """DepthEdit: all in other colours; FillEdit: the subject alone, in five."""
    mask = Image.new("L", target.size)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    fills = [Image.composite(turn_hue(target, 40 * (i + 1)), target, mask) for i in range(5)]
    pictures = {f"FillEdit_image_{i}": picture for i, picture in enumerate(fills)}
    return pictures | {"DepthEdit": turn_hue(target, 128)}


def turn_hue(picture, by):
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point(lambda h: (h + by) % 256)
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def style(target, photo, side):
    """Three manners, each with a sample of it; ReduxStyle's pictures are mirrored besides."""
    manners = (
        lambda p: ImageOps.posterize(p, 2),
        lambda p: ImageOps.colorize(p.convert("L"), (60, 20, 10), (255, 230, 180)),
        lambda p: p.filter(ImageFilter.ModeFilter(7)),
    )
    sample, columns = photo.resize((side, side)).transpose(Image.Transpose.TRANSPOSE), {}
    for i, paint in enumerate(manners):
        columns |= {
            f"InstantStyle_image_{i}": paint(target),
            f"InstantStyle_ref_{i}": paint(sample),
        }
        columns |= {f"ReduxStyle_image_{i}": ImageOps.mirror(paint(target))}
        columns |= {f"ReduxStyle_ref_{i}": paint(ImageOps.flip(sample))}
    return columns


def encode(picture):
    """A picture as the bytes of a WebP file: of one this small a JPEG's tables are the most."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=30, method=6)
    return file.getvalue()


# --- as Arrow shards ---


def write_arrow(folder, items, shards=2, batch=3):
    """One split as `save_to_disk` leaves it, in batches of at most so many records; `encode`d
    pictures in a struct of bytes and path."""
    import pyarrow as pa

    def convert(column, value):
        return {"bytes": encode(value), "path": None} if column in PICTURES and value else value

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    records = [{c: convert(c, v) for c, v in item.items()} for item in items]
    others = pa.Table.from_pylist(
        [{c: v for c, v in r.items() if c not in PICTURES} for r in records]
    )
    schema = pa.schema([(c, picture) for c in PICTURES] + [*others.schema])
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for name, part in zip(names, np.array_split(records, shards), strict=True):
        with pa.ipc.new_stream(folder / name, schema) as writer:
            writer.write_table(pa.Table.from_pylist([*part], schema), max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "scikit-image"}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    state |= {"_output_all_columns": False, "_split": folder.name}
    features = {c: {"_type": "Image"} for c in PICTURES}
    features |= {field.name: describe_type(field.type) for field in others.schema}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def describe_type(kind):
    """A column's type, as datasets writes it."""
    if hasattr(kind, "names"):
        return {name: describe_type(kind.field(name).type) for name in kind.names}
    return {"_type": "Value", "dtype": str(kind)}


# --- as the authors' JSON of paths ---


def write_json(folder, items):
    """One split as processing.py leaves it: pictures as files, and data.json."""
    folder.mkdir(parents=True)
    table = []
    for number, item in enumerate(items):
        paths = {c: folder / f"{number}_{c}.webp" for c in PICTURES if item[c]}
        for column, path in paths.items():
            path.write_bytes(encode(item[column]))
        table.append(describe_item(item, {c: str(p.resolve()) for c, p in paths.items()}))
    (folder / "data.json").write_text(json.dumps(table, ensure_ascii=False))


def describe_item(item, paths):
    """One entry of data.json; sets of pictures are there whole or not at all."""
    names = {"ref": "reference", "qwen_2_5_mask": "mask", "qwen_2_5_bounding_box": "bbox"}
    condition = {names.get(c, c): path for c, path in paths.items() if not c[-1].isdigit()}
    fills = [paths.get(f"FillEdit_image_{i}") for i in range(5)]
    if all(fills) and item["FillEdit_meta"]:
        condition["FillEdit"] = {"image_path": fills} | item["FillEdit_meta"]
    for name in ("InstantStyle", "ReduxStyle"):
        pair = {k: [paths.get(f"{name}_{k}_{i}") for i in range(3)] for k in ("image", "ref")}
        if all(pair["image"] + pair["ref"]):
            condition[name] = {"image_path": pair["image"], "style_path": pair["ref"]}
    others = ("quality_assessment", "description", "collection")
    return {name: item[name] for name in others} | {"condition": condition}


def write_dataset(folder, side=28, as_json=False):
    """Both splits of it."""
    start = 0
    for split, (count, shards) in SPLITS.items():
        items = [draw_item(number, side) for number in range(start, start + count)]
        if as_json:
            write_json(folder / split, items)
        else:
            write_arrow(folder / split, items, shards)
        start += count
    if not as_json:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*SPLITS]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--side", type=int, default=28, help="of a picture, in pixels")
    parser.add_argument("--json", action="store_true", help="files and paths, no shards")
    args = parser.parse_args()
    write_dataset(args.folder, args.side, args.json)
