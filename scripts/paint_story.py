"""Paint examples/result.png, the first picture of the README: `python scripts/paint_story.py`.

One query, one noise, no text; only the examples differ. Subjects and tasks were chosen before
anything was painted: those of examples/1 to 3, then the same subjects in other tasks.
"""

from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vcloze_jax.data.graph import NODES
from vcloze_jax.data.graphemoji import read_nodes
from vcloze_jax.pipeline import Pipeline

FILE = Path(__file__).parents[1] / "examples/result.png"
QUERY, EXAMPLES = "backpack", ("crab", "mushroom")
COLUMNS = (  # label, examples, what they show
    ("the query alone", 0, "mask"),
    ("one example", 1, "mask"),
    ("two examples", 2, "mask"),
    ("two others: gray", 2, "gray"),
    ("two others: edges", 2, "edges"),
    ("two others: blur", 2, "blur"),
)
SCALE = 2  # of the pictures, beside labels at their own size
ROW, MOST = 32, 96  # tokens of one, and of three
LABEL = 26  # pixels above a column


def main():
    names, pictures = read_nodes("held_out")
    cell = lambda name, node: pictures[names.index(name), NODES.index(node)]  # noqa: E731
    grids = [
        [[cell(name, "fluent_3d"), cell(name, node)] for name in EXAMPLES[:count]]
        + [[cell(QUERY, "fluent_3d"), None]]
        for _, count, node in COLUMNS
    ]
    noise = np.asarray(jax.random.normal(jax.random.key(0), (MOST, 64), np.float32))  # its end each
    specs = [{"image": g, "layout_prompt": "", "latents": noise[-len(g) * ROW :]} for g in grids]
    paintings = Pipeline.load().paint(specs)
    sheets = [painting.grid for painting in paintings]
    width, height = max(s.width for s in sheets), max(s.height for s in sheets)
    size = width * SCALE * len(sheets), height * SCALE + LABEL
    story = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(story), ImageFont.load_default(16)
    for i, (sheet, (label, *_)) in enumerate(zip(sheets, COLUMNS, strict=True)):
        left, bottom = i * width * SCALE, size[1]
        larger = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.LANCZOS)
        story.paste(larger, (left, bottom - larger.height))
        draw.text((left + width * SCALE // 2, 4), label, "black", font, anchor="ma")
    story.quantize().save(FILE, optimize=True)  # 256 colours: a third of the bytes


if __name__ == "__main__":
    main()
