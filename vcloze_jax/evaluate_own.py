"""How well a model does on people's own data: `python -m vcloze_jax.evaluate --data PAIRS`.

What training holds out of a folder of pairs or of a JSON-lines file is asked with 0, 1 and 2
examples, which are held out, too; a sample is asked from the same seed each time. RMSE and SSIM
are those of the painted cells to the truth, in [0, 1]. Beside the model stand two pictures that
need none: a given cell of the question left as it is (the nearest to the truth, where there are
several), and the truth's own mean colour.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from vcloze_jax.config import Recipe, UserError
from vcloze_jax.data.owndata import open_own
from vcloze_jax.grid import PATCH, Spec
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.card import format_table
from vcloze_jax.inputs.checks import flag
from vcloze_jax.inputs.measures import rmse, ssim
from vcloze_jax.inputs.pictures import save_png, save_text
from vcloze_jax.inputs.sheet import label_cells, stack_sheets
from vcloze_jax.pipeline import load_painter, steps_bar
from vcloze_jax.storage import places

SETTINGS = {"0 examples": 0, "1 example": 1, "2 examples": 2}
NONE = "0 examples"
SHOWN = 6  # questions on the sheet


def add_own_flags(parser):
    """--data, and what part of it."""
    own = "a file or a folder of your own, as train.py --data has it"
    parser.add_argument("--data", type=cli.expand, metavar="PAIRS", help=own)
    share = "of --data, as train.py has it; 0 asks all of it (default: 0.1)"
    parser.add_argument("--held-out", type=float, metavar="SHARE", help=share)
    cells = "of the cells of --data (default: that of the preset)"
    parser.add_argument("--resolution", type=cli.positive_int, help=cells)


def check_flags(args):
    """Raise UserError for flags of evaluate that cannot be, or not together."""
    if args.data is None:
        for name in ("held_out", "resolution"):
            if getattr(args, name) is not None:
                raise UserError(f"{flag(name)}: is of --data; add that, or leave it away")
        return
    if args.card:
        raise UserError("--card: holds mini's own table; leave it or --data away")
    if args.subjects < 1:
        raise UserError(f"--subjects {args.subjects}: must be at least 1")
    if not 0 <= share_held_out(args) <= 1:
        raise UserError(f"--held-out {args.held_out}: must be from 0 to 1")
    if args.resolution is not None and args.resolution < PATCH:
        raise UserError(f"--resolution {args.resolution}: must be at least {PATCH}")
    if not Path(args.data).exists():
        raise UserError(f"--data {args.data}: there is no such file or folder")


def share_held_out(args):
    """--held-out, or what train.py has where it is left out."""
    return Recipe.held_out if args.held_out is None else args.held_out


def evaluate_own(args):
    """Ask what --data holds out, and write table.md, table.json and sheet.png.

    `args` are evaluate's flags. Raises UserError for data that cannot be read, before any model is.
    """
    preset = places.named_preset(args.weights or places.MINI_FOLDER)
    resolution = args.resolution or preset.resolution
    recipe = dict(data=args.data, held_out=share_held_out(args), resolution=resolution)
    source = open_own(args.data, replace(preset.recipe, **recipe))
    asked = ask_all(source.held_out(), args.subjects)
    painter = load_painter(cli.fetch_weights(args), args.lora, args.mesh)
    painted = {
        name: paint_examples(painter, examples, args.num_inference_steps)
        for name, examples in asked.items()
    }
    given, truth = split_queries(asked[NONE])
    pictures = painted | {
        "a given cell": {n: [nearest(x, t) for t in truth[n]] for n, x in given.items() if x},
        "its mean colour": {n: [flatten(t) for t in cells] for n, cells in truth.items()},
    }
    scores = {name: score(cells, truth) for name, cells in pictures.items() if cells}
    text = describe_scores(scores)
    models = painter.models
    record = {
        **recipe,
        "digest": source.digest(),
        "weights": str(models.folder),
        "adapters": places.describe_adapters(models.folder, models.loras),
        "num_inference_steps": args.num_inference_steps,
        "scores": scores,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_png(args.out / "sheet.png", draw_sheet(given, painted, truth))
    save_text(args.out / "table.md", text + "\n")
    save_text(args.out / "table.json", json.dumps(record, indent=1) + "\n")
    print(text)


def ask_all(source, most):
    """{setting: {number of a sample: its Example}}, of at most so many samples, spread evenly."""
    numbers = np.sort(np.concatenate([*source.buckets.values()]))
    chosen = numbers[np.linspace(0, len(numbers) - 1, most).astype(int)]
    asked = {name: source.questions(count, chosen) for name, count in SETTINGS.items()}
    return {name: examples for name, examples in asked.items() if examples}


def paint_examples(painter, examples, steps):
    """{number: Example} -> {number: its targets as painted, uint8 [h, w, 3] each}."""
    guidance = painter.preset.guidance_scale
    jobs = [Spec(e.grid, e.prompt, steps, guidance, seed=n) for n, e in examples.items()]
    canvases = painter(jobs, steps_bar)
    return {n: canvas.targets for n, canvas in zip(examples, canvases, strict=True)}


def split_queries(examples):
    """{number: the cells of its query of which nothing is to be painted} and {number: the truth of
    the others}, uint8 [h, w, 3] each."""
    given, truth = {}, {}
    for n, (grid, *_) in examples.items():
        cells = enumerate(grid.split(grid.query.pixels))
        given[n] = [cell for i, cell in cells if i not in grid.targets]
        truth[n] = grid.cut(grid.query.pixels)
    return given, truth


def nearest(cells, target):
    """That of some cells which is nearest to a target by RMSE."""
    return min(cells, key=lambda cell: errors(cell, target)[0])


def flatten(target):
    """Its mean colour, everywhere: uint8 [h, w, 3]."""
    return np.broadcast_to(np.rint(target.mean((0, 1))).astype(np.uint8), target.shape)


def errors(cell, truth):
    """RMSE and SSIM of two cells, uint8 [h, w, 3]."""
    a, b = (np.float32(x)[None] / 255 for x in (cell, truth))
    return float(rmse(a, b)[0]), float(ssim(a, b)[0])


def score(cells, truth):
    """How many questions, and the means of their targets' errors."""
    each = [errors(*pair) for n in cells for pair in zip(cells[n], truth[n], strict=True)]
    of_rmse, of_ssim = np.mean(each, 0)
    return {"questions": len(cells), "rmse": float(of_rmse), "ssim": float(of_ssim)}


def describe_scores(scores):
    """Scores as a table."""
    rows = [["painted by", "questions", "RMSE", "SSIM"]]
    for name, found in scores.items():
        who = f"the model, {name}" if name in SETTINGS else name
        rows.append([who, f"{found['questions']}", f"{found['rmse']:.3f}", f"{found['ssim']:.2f}"])
    return format_table(rows)


def draw_sheet(given, painted, truth):
    """Some questions, a strip each: what is given, what was painted in each setting, the truth."""
    strips = []
    for n in [*truth][:SHOWN]:
        cells = [("given", cell) for cell in given[n]]
        for k, target in enumerate(truth[n]):
            cells += [(name, of[n][k]) for name, of in painted.items() if n in of]
            cells.append(("truth", target))
        strips.append(label_cells(cells))
    return stack_sheets(strips)
