"""Make a folder of 20 pairs, to try `train.py --data FOLDER` with.

    python scripts/make_pairs.py examples/pairs --icons        # those that ship
    python scripts/make_pairs.py pairs [--task invert]

Photographs are cut from those that scikit-image and matplotlib install, and each comes with a
NAME.txt that says what it shows; icons are Fluent's (MIT), of subjects that mini never saw. A pair
is in/NAME and the same picture in shades of blue, or inverted, as out/NAME.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps

SKIMAGE, MATPLOTLIB = "skimage/data", "matplotlib/mpl-data/sample_data"
PHOTOGRAPHS = {  # file: (what it shows, boxes [left, top, right, bottom] of the cuts)
    f"{SKIMAGE}/astronaut.png": ("an astronaut", [(0, 0, 512, 512), (120, 0, 350, 300)]),
    f"{SKIMAGE}/chelsea.png": ("a cat", [(0, 0, 451, 300), (100, 0, 400, 300)]),
    f"{SKIMAGE}/coffee.png": (
        "a cup of coffee",
        [(0, 0, 600, 400), (150, 50, 450, 350), (300, 100, 600, 400)],
    ),
    f"{SKIMAGE}/motorcycle_left.png": (
        "a motorcycle in a garage",
        [(0, 0, 741, 497), (0, 0, 370, 370), (370, 0, 741, 371), (200, 100, 560, 460)],
    ),
    f"{SKIMAGE}/rocket.jpg": ("a rocket on its pad", [(0, 0, 640, 427), (200, 0, 500, 400)]),
    f"{SKIMAGE}/hubble_deep_field.jpg": ("galaxies", [(0, 0, 500, 500), (500, 300, 900, 700)]),
    f"{SKIMAGE}/retina.jpg": ("a retina", [(0, 0, 1411, 1411)]),
    f"{SKIMAGE}/ihc.png": ("stained tissue", [(0, 0, 512, 512)]),
    f"{MATPLOTLIB}/grace_hopper.jpg": ("an officer", [(0, 0, 512, 600), (100, 60, 400, 360)]),
    f"{SKIMAGE}/color.png": ("coloured patches", [(0, 0, 370, 371)]),
}
ICONS = (
    "woman astronaut,superhero,student,skier,raccoon,tiger,peacock,dragon,crab,lotus,mushroom,"
    "waffle,cup with straw,ferris wheel,trolleybus,rocket,snowman,backpack,t-shirt,magnet"
).split(",")
TASKS = {
    "tint": lambda cut: ImageOps.colorize(
        cut.convert("L"), black=(0, 20, 140), mid=(90, 150, 255), white=(255, 255, 255)
    ),
    "invert": ImageOps.invert,
}


def cut_photographs():
    """Yield (name, picture, what it shows)."""
    for file, (text, boxes) in PHOTOGRAPHS.items():
        package, _, path = file.partition("/")
        with Image.open(Path(find_spec(package).origin).parent / path) as picture:
            photograph = picture.convert("RGB")
        for i, box in enumerate(boxes):
            yield f"{Path(file).stem}-{i}.jpg", photograph.crop(box), text


def draw_icons():
    """Yield (name, picture of 64 x 64, nothing that it is said to show)."""
    from vcloze_jax.data.graph import NODES
    from vcloze_jax.data.graphemoji import read_nodes

    names, pictures = read_nodes("held_out")
    for name in ICONS:
        icon = pictures[names.index(name), NODES.index("fluent_3d")]
        yield f"{name.replace(' ', '_')}.png", Image.fromarray(icon), ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--icons", action="store_true", help="not photographs")
    parser.add_argument("--task", choices=TASKS, default="tint")
    args = parser.parse_args()
    for side in ("in", "out"):
        (args.folder / side).mkdir(parents=True, exist_ok=True)
    for name, picture, text in draw_icons() if args.icons else cut_photographs():
        picture.save(args.folder / "in" / name, quality=95, optimize=True)
        TASKS[args.task](picture).save(args.folder / "out" / name, quality=95, optimize=True)
        if text:
            (args.folder / name).with_suffix(".txt").write_text(text)


if __name__ == "__main__":
    main()
