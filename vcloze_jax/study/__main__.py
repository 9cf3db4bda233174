"""What the model does, measured and shown: a page of its own making.

    python -m vcloze_jax.study --out REPORT              # all parts, mini
    python -m vcloze_jax.study --quick walk              # one part, in seconds

REPORT/index.html holds all pictures in itself; study.md has its tables, study.json its numbers.
The parts:
    walk       one grid, followed from cells to tokens, noise, velocity and the painted cell
    ambiguity  error and its spread with 0 to 4 examples (the paper's first finding)
    dial       how far a picture moves when its examples do; how often a seed fails; with --grid
               (specs, or records of sample.py) how far those of your own move
    unseen     tasks that were never trained (2), and photographs where emoji were
    unions     several targets, or two tasks in a row, asked at once (3)
    choice     best and worst examples, and a rule that chooses them (4)
    reverse    from the target back to its conditions (5)
    looks      where the painted tokens look (and looks.csv); which demonstration is followed
    tables     the paper's Tables 1 to 3: of emoji, or with --data-dir of Graph200K's test items
    ablations  short trainings that differ in one choice (--quick leaves them out)
    placements the same task learnt in every way to place cells (likewise)

Subjects are held out, seeds fixed: on as many cores the same command gives the same bytes, but for
the seconds that it took, which end the page.
"""

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from vcloze_jax.config import MINI, UserError
from vcloze_jax.data.graph200k import open_graph200k
from vcloze_jax.data.graphemoji import open_tasks
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.pictures import check_writable, save_text
from vcloze_jax.inputs.specfiles import check_picked, read_specs
from vcloze_jax.storage import places
from vcloze_jax.storage.places import describe_pairs
from vcloze_jax.study.judges import FLAGS, check_judge
from vcloze_jax.study.page import Chapter, TextTable, write_html, write_markdown
from vcloze_jax.study.parts import Lab, check_parts, choose_parts, run_part
from vcloze_jax.study.photographs import photograph_files
from vcloze_jax.study.trainings import count_cores

# What one part alone is told, by the name of its flag.
OF_PART = {"photographs": "unseen", "data_dir": "tables", "grid": "dial"}
OF_PART |= dict.fromkeys(FLAGS, "tables")
TITLE = "A study of a model that reads examples"
LEAD = (
    "Of `{model}`, by `{command}`, which gives the same page again on as many CPU cores, but for "
    "the seconds at its end."
)
TOOK = (
    "Seconds of each part, {minutes:.1f} minutes in all; CPU cores: {cores}. What an earlier part "
    "had painted, or an earlier run compiled or trained, is not in them."
)


def main(argv):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="one or more of the parts (default: all)")
    cli.add_model_flags(parser)
    add("--out", type=cli.path, default=Path("study"), metavar="REPORT")
    add("--quick", action="store_true", help="few tasks, subjects and noises")
    add("--num-inference-steps", type=cli.positive_int, default=12)
    folder = "pictures of yours in place of the photographs of unseen"
    add("--photographs", type=cli.path, metavar="FOLDER", help=folder)
    folder = "Graph200K, whose test items tables is asked of"
    add("--data-dir", type=cli.path, metavar="FOLDER", help=folder)
    for name, what in FLAGS.items():
        help = f"{what} of yours, in transformers' layout, for tables"
        add(f"--{name}", type=cli.path, metavar="FOLDER", help=help)
    help = "of your own, for dial, in as many steps as they say"
    add("--grid", nargs="+", action="extend", default=[], type=cli.path, metavar="SPEC", help=help)
    args = parser.parse_args(argv)
    parts = choose_parts(args.parts, args.quick)
    check_writable(args.out, "index.html")

    for name, part in OF_PART.items():
        if vars(args)[name] and part not in parts:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: {part} alone reads it, and was not asked for; add {part}")
    if args.photographs:
        photograph_files(args.photographs)  # now, not after the painting
    preset = places.named_preset(args.weights or places.MINI_FOLDER)
    items = open_test_items(args.data_dir, preset) if args.data_dir else None
    grids = read_specs(args.grid, preset)
    for spec in grids:
        check_picked(spec, ())  # of a bank, which is sample.py's
    judges = {name: check_judge(name, folder) for name in FLAGS if (folder := vars(args)[name])}

    from vcloze_jax.pipeline import load_painter  # JAX from here on

    source = open_tasks("", MINI.recipe).held_out()
    painter = load_painter(cli.fetch_weights(args), args.lora, args.mesh)
    check_parts(parts, painter.preset.flux.placement)
    how = args.num_inference_steps, args.quick, bar_below, args.out
    lab = Lab(painter, source, *how, args.photographs, items, grids, judges)
    model = args.asked if args.weights else "mini"
    lead = LEAD.format(model=model, command=describe_command(args, parts))
    chapters, seconds = {}, {}
    with tqdm(parts, unit="part", dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description(name)
            start = time.perf_counter()
            chapters[name] = run_part(name, lab)
            seconds[name] = time.perf_counter() - start
            # so far: who stops it keeps what there is
            write_report(args.out, lead, chapters, tell_seconds(seconds))
    print(f"{', '.join(parts)}: {args.out}/index.html")


def tell_seconds(seconds):
    """Chapter of the {part: seconds} that it took."""
    rows = [["part", "seconds"], *([name, f"{x:.0f}"] for name, x in seconds.items())]
    says = TOOK.format(cores=count_cores(), minutes=sum(seconds.values()) / 60)
    return Chapter([says, TextTable(rows)], {})


def write_report(folder, lead, chapters, took):
    """Write {name: (title, Chapter)} as a page that ends with the Chapter of what it took, as its
    tables, as its numbers; and what lies beside it. Files that are there are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: part.numbers for name, (_, part) in chapters.items()}
    pages = TITLE, lead, dict(chapters.values()) | {"What it took": took}
    save_text(folder / "study.json", json.dumps(numbers, indent=1) + "\n")
    save_text(folder / "study.md", write_markdown(*pages))
    for _, part in chapters.values():
        for name, text in part.files.items():
            save_text(folder / name, text)
    save_text(folder / "index.html", write_html(*pages))


def open_test_items(folder, preset):
    """The items of Graph200K that are held out, at the size of a preset's cells. Raises UserError,
    also where too few are: trained ones are not asked in their place."""
    source = open_graph200k("", replace(preset.recipe, data_dir=str(folder)))
    if (held_out := source.held_out()) is source:
        raise UserError(f"--data-dir {folder}: its test folder has too few items; fetch it again")
    return held_out


def bar_below(steps, label):
    """Steps of a batch, or trainings, as a bar below that of the parts, gone when they are done."""
    return tqdm(steps, label, position=1, leave=False, dynamic_ncols=True)


def describe_command(args, parts):
    """The command that makes this report, wherever it is written."""
    words = ["python", "-m", "vcloze_jax.study", "--num-inference-steps", args.num_inference_steps]
    words += ["--weights", args.asked] if args.weights else []
    words += ["--mesh", args.mesh] if args.mesh else []
    for file, scale in args.lora or ():
        words += ["--lora", describe_pairs([(file, scale)])]
    words += ["--photographs", args.photographs] if args.photographs else []
    words += ["--data-dir", args.data_dir] if args.data_dir else []
    for name in FLAGS:
        words += [f"--{name}", vars(args)[name]] if vars(args)[name] else []
    words += ["--grid", *args.grid] if args.grid else []
    return shlex.join(map(str, [*words, *["--quick"] * args.quick, *parts]))


if __name__ == "__main__":
    cli.run(main)
