"""Look at what Graph200K's grids are drawn from.

python -m vcloze_jax.data --list                        # its nodes, groups and task lists
python -m vcloze_jax.data --degrade photo.jpg --out sheet.png
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from vcloze_jax.config import UserError
from vcloze_jax.data.degradations import DEGRADATIONS, degrade
from vcloze_jax.data.graph200k_tasks import describe_graph
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.pictures import check_writable, open_picture, save_png
from vcloze_jax.inputs.sheet import GUTTER, LABEL, stack_sheets
from vcloze_jax.inputs.spec import MAX_SEED

SHOWN = (1, 3, 5)  # severities
ACROSS = 4  # degradations beside each other
MAX_SIDE = 1024  # of a picture on a sheet of a hundred


def draw_degradations(picture, side, seed):
    """All degradations at severities 1, 3 and 5, of the same seed, labelled: uint8 [h, w, 3]."""
    strips = []
    for number, name in enumerate(tqdm(DEGRADATIONS, "degrading", leave=False, delay=2)):
        rngs = [np.random.default_rng([seed, number]) for _ in SHOWN]
        shown = [degrade(picture, name, rng, s) for rng, s in zip(rngs, SHOWN, strict=True)]
        small = [Image.fromarray(p).resize((side, side), Image.Resampling.LANCZOS) for p in shown]
        strip = Image.new("RGB", (len(SHOWN) * side + GUTTER, LABEL + side + GUTTER), "white")
        for i, cell in enumerate(small):
            strip.paste(cell, (i * side, LABEL))
        ImageDraw.Draw(strip).text((0, 1), name, fill=(0, 0, 0))
        strips.append(np.asarray(strip))
    return stack_sheets([np.hstack(strips[i : i + ACROSS]) for i in range(0, len(strips), ACROSS)])


def main(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="print nodes, groups and task lists with their shares")
    sheet = "draw all degradations of it, at severities 1, 3 and 5"
    add("--degrade", type=cli.path, metavar="PHOTO", help=sheet)
    sheet = Path("degradations.png")
    add("--out", type=cli.path, default=sheet, metavar="FILE", help="that sheet, a PNG")
    add("--side", type=cli.positive_int, default=128, help="of a picture in it, in pixels")
    add("--seed", type=int, default=0, help="of what is drawn")
    args = parser.parse_args(argv)
    if not 0 <= args.seed <= MAX_SEED:
        raise UserError(f"--seed {args.seed}: must be in 0 … {MAX_SEED}")
    if args.side > MAX_SIDE:
        raise UserError(f"--side {args.side}: at most {MAX_SIDE}")
    if not args.list and args.degrade is None:
        raise UserError("nothing to do; --list, or --degrade PHOTO")
    if args.out.is_dir() or args.out.suffix != ".png":
        raise UserError(f"--out {args.out}: name a file that ends in .png")
    if args.list:
        print(describe_graph())
    if args.degrade:
        check_writable(args.out.parent, args.out.name)
        picture = np.asarray(open_picture(args.degrade))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_png(args.out, draw_degradations(picture, args.side, args.seed))
        print(f"{args.out}: severities {', '.join(map(str, SHOWN))} of each")


if __name__ == "__main__":
    cli.run(main)
