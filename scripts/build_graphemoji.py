"""Draw GraphEmoji again from its npm packages: `python scripts/build_graphemoji.py`.

Installs the pinned packages with npm (no install scripts run), draws every emoji that has all
eight views at 64 x 64, rounds and encodes, and writes both packs into vcloze_jax/data/graphemoji.
Needs npm, `pip install resvg-py importlib_resources` (tfds imports the latter without declaring it)
and ten minutes of two cores. `--npm FOLDER` keeps the packages in a folder of yours.
"""

import argparse
import io
import json
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image

from vcloze_jax.data.graph import PACKS, VIEWS
from vcloze_jax.data.graphemoji import FOLDER, SIZE, GraphEmoji

PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "openmoji": "17.0.0",
    "emojibase-data": "17.0.0",
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
# Fluent's soft light is an SVG filter, which resvg evaluates without antialiasing: draw it larger.
OVERSAMPLE = {"fluent_color": 4}
# Red, green, blue and alpha are rounded to multiples of these divisors of 255. Lossless WebP then
# needs two thirds of its bytes at 46 dB or better; lossy WebP of that size halves the colour
# resolution, which costs an icon's edges 10 dB.
STEPS = np.array([5, 5, 5, 15], np.uint16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npm", type=Path, help="folder that has or gets node_modules")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        npm, drawings = args.npm or Path(temporary, "npm"), Path(temporary, "drawings")
        install(npm)
        draw_all(npm / "node_modules", drawings)
        for pack in PACKS:
            write(pack, drawings)


def install(folder):
    """Bring the pinned versions into folder/node_modules."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    flags = ["--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(["npm", "install", *flags, *wanted], check=True)


def draw_all(modules, folder):
    """Draw every subject that has all views; write folder/VIEW/CODEPOINT and subjects.json."""
    sources = read_sources(modules)
    subjects = [s for s in list_subjects(modules) if all(s["codepoint"] in v for v in sources)]
    for view in VIEWS:
        (folder / view).mkdir(parents=True)
    jobs = ([source[s["codepoint"]] for source in sources] for s in subjects)
    drawn = []
    with ProcessPoolExecutor() as pool:
        results = pool.map(draw_subject, jobs, chunksize=16)
        for subject, pictures in zip(subjects, results, strict=True):
            empty = [view for view, data in zip(VIEWS, pictures, strict=True) if data is None]
            if empty:
                print(f"left out {subject['name']}: nothing to see in {', '.join(empty)}")
                continue
            drawn.append(subject)
            for view, data in zip(VIEWS, pictures, strict=True):
                (folder / view / subject["codepoint"]).write_bytes(data)
    (folder / "subjects.json").write_text(json.dumps(drawn))
    print(f"drew {len(drawn)} subjects in {len(VIEWS)} views")


def list_subjects(modules):
    """All emoji without skin tone, in Unicode's order, as records of texts."""
    meta = json.loads((modules / "emojibase-data/meta/groups.json").read_text())
    emoji = json.loads((modules / "emojibase-data/en/data.json").read_text())
    return [
        {
            "codepoint": to_codepoint(e["hexcode"]),
            "name": e["label"].replace(":", ""),  # "man: red hair" reads badly in a sentence
            "group": meta["groups"][str(e["group"])],
            "subgroup": meta["subgroups"][str(e["subgroup"])],
        }
        for e in sorted((e for e in emoji if "order" in e), key=lambda e: e["order"])
    ]


def read_sources(modules):
    """For each view {codepoint: a path of a WebP, or the text of an SVG}."""
    flat, chars = read_iconify(modules / "@iconify-json/fluent-emoji-flat")
    color, _ = read_iconify(modules / "@iconify-json/fluent-emoji")  # has no codepoints of its own
    views = [
        {to_codepoint(p.stem): p for p in (modules / "@lobehub/fluent-emoji-3d/assets").iterdir()},
        {code: color[name] for code, name in chars.items() if name in color},
        {code: flat[name] for code, name in chars.items()},
    ]
    for name in ("fluent-emoji-high-contrast", "noto", "twemoji"):
        icons, chars = read_iconify(modules / "@iconify-json" / name)
        views.append({code: icons[icon] for code, icon in chars.items()})
    for kind in ("color", "black"):
        files = (modules / "openmoji" / kind / "svg").iterdir()
        views.append({to_codepoint(path.stem): path.read_text() for path in files})
    return views


def read_iconify(folder):
    """An icon set as ({name: SVG}, {codepoint: name}); aliases may mirror their parent."""
    data = json.loads((folder / "icons.json").read_text())
    chars = json.loads((folder / "chars.json").read_text())
    icons = {name: to_svg(icon, data) for name, icon in data["icons"].items()}
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in data["icons"]:
            icons[name] = to_svg(data["icons"][alias["parent"]], data, alias.get("hFlip", False))
    return icons, chars


def to_svg(icon, data, mirror=False):
    """The icon on a square canvas, as its set frames it."""
    width, height = icon.get("width", data["width"]), icon.get("height", data["height"])
    side, body = max(width, height), icon["body"]
    if mirror:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    return f'{SVG} viewBox="{box}">{body}</svg>'


def to_codepoint(name):
    """'1F468-200D-2764-FE0F' to '1f468-200d-2764': sets disagree about variation selectors."""
    return "-".join(c for c in name.lower().split("-") if c != "fe0f")


def draw_subject(sources):
    """The eight encoded pictures of one subject: a job of the pool."""
    return [encode(draw(view, source)) for view, source in zip(VIEWS, sources, strict=True)]


def draw(view, source):
    """One picture, RGBA, averaged down: Pillow resizes in premultiplied alpha."""
    if isinstance(source, Path):
        picture = Image.open(source)
    else:
        side = SIZE * OVERSAMPLE.get(view, 1)
        options = {"width": side, "height": side, "skip_system_fonts": True}
        picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=source, **options)))
    return picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BOX)


def encode(picture):
    """Round and encode a picture losslessly; None if there is next to nothing to see.

    WebP drops an alpha that is opaque everywhere; PNG keeps it, so every view has four channels.
    """
    pixels = np.asarray(picture, np.uint16)  # [64, 64, 4]
    if (pixels[..., 3] >= 128).mean() < 0.005:
        return None
    pixels = ((pixels + STEPS // 2) // STEPS * STEPS).astype(np.uint8)
    data = io.BytesIO()
    if pixels[..., 3].min() == 255:
        Image.fromarray(pixels).save(data, "PNG", optimize=True)
    else:
        Image.fromarray(pixels).save(data, "WEBP", lossless=True, quality=100, method=6)
    return data.getvalue()


def write(pack, drawings):
    """Write one pack beside its LICENSES file, which stays."""
    old = FOLDER / GraphEmoji.name / pack / str(GraphEmoji.VERSION)
    shutil.rmtree(old, ignore_errors=True)  # first: a builder takes over what it finds there
    builder = GraphEmoji(config=pack, data_dir=FOLDER, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=drawings, num_shards=1)
    builder.download_and_prepare(download_dir=drawings, download_config=config)


if __name__ == "__main__":
    main()
