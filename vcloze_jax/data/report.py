"""What `train.py --check` shows of the data: what there is, its shapes, and some of its grids."""

from pathlib import Path

from vcloze_jax.config import Recipe
from vcloze_jax.data.sources import Source, draw_group
from vcloze_jax.inputs.pictures import save_png
from vcloze_jax.inputs.prompts import describe_unread
from vcloze_jax.inputs.sheet import tile_grids

SHOWN = 12  # grids


def show_source(source: Source, recipe: Recipe, file: Path, tokenizers) -> str:
    """Draw `SHOWN` grids as a run of this recipe would, their masks hatched, into a PNG file.
    Returns all that can be said in text: counts, sizes, tokens, and the prompts of those grids,
    with what the Tokenizers leave unread of them.

    Raises UserError where a picture cannot be learnt from or the file cannot be written.
    """
    lines = [source.summary()]
    for shape in source.shapes():
        size = f"{shape.rows} x {shape.columns} cells of {shape.width}x{shape.height}"
        lines.append(f"  {size}: {shape.tokens} tokens, {source.count(shape)} last rows")
    examples = [draw_group(source, recipe.seed, number, 1)[0] for number in range(SHOWN)]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_png(file, tile_grids([example.grid for example in examples]))
    lines.append(f"{file}: grids as they are drawn, hatched where they are masked; their texts:")
    *_, unread = tokenizers([example.prompt for example in examples])
    for i, (example, left) in enumerate(zip(examples, unread, strict=True), start=1):
        lines.append(f"  {i}: {example.prompt or 'none'}")
        lines += [f"     {sentence}" for sentence in describe_unread(left)]
    return "\n".join(lines)
