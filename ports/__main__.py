"""`python -m ports SRC --out DST`: weights of any kind that is known, as a folder of ours.

SRC is a folder in diffusers' layout, or one with Black Forest Labs' single files beside the folders
of text encoders and tokenizers. Ours is diffusers' layout, every key checked, at most 5 GB a file:
it loads onto a mesh as it is, in diffusers too. Every tensor keeps its type, unless --dtype names
another; one of 8 bits is written as bfloat16, which holds its numbers, or times its scale as
float32.
`python -m ports lora --help` is for adapters.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

from vcloze_jax.config import UserError
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.checks import describe_error, describe_with_file
from vcloze_jax.inputs.cli import Parser, path
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.inputs.pictures import check_no_address, check_writable
from vcloze_jax.inputs.runfolder import read_identity
from vcloze_jax.inputs.terminal import tell_error
from vcloze_jax.ports import engine, export
from vcloze_jax.ports.adapters import open_adapter
from vcloze_jax.ports.diagnose import PortError
from vcloze_jax.ports.tables.namings import NAMINGS, TARGETS, Naming
from vcloze_jax.storage.places import find_weights


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        print(run_lora(argv[1:]) if argv[:1] == ["lora"] else run_folder(argv))
    except UserError as error:
        tell_error(error)
        return 2
    return 0


def run_lora(argv) -> str:
    """`python -m ports lora FILE --to NAMING --out FILE`: an adapter in another naming; FILE may be
    a run's checkpoint, too."""
    parser = Parser(export.__doc__, "python -m ports lora")
    add = parser.add_argument
    known = "an adapter in any naming that is known, or a folder RUN/checkpoints/STEP"
    add("file", type=path, metavar="FILE", help=known)
    add("--to", choices=TARGETS, required=True, help="the naming to write")
    add("--out", type=path, metavar="FILE", required=True)
    args = parser.parse_args(argv)
    naming = NAMINGS[args.to]
    if args.out.suffix != naming.ending:
        ending = f"--to {args.to} writes a file that ends in {naming.ending}"
        raise UserError(f"--out {args.out}: {ending}")
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; name a new file")
    check_writable(args.out.parent, args.out.name)
    try:
        is_step = args.file.is_dir() and args.file.resolve().name.isdecimal()
        if not is_step and (doubt := open_adapter(args.file).doubt):
            print(f"{args.file}: {doubt}")
        convert = export_checkpoint if is_step else export.convert_adapter
        count = convert(args.file, naming, args.out)
    except PortError as error:
        raise UserError(f"{args.file}: {error}") from error
    except OSError as error:
        # Of reading they name the file, of writing, as where the disk is full, none.
        raise UserError(describe_with_file(error, args.out)) from error
    return f"{args.out}: {count} linear layers in {naming.title} naming"


def export_checkpoint(folder: Path, naming: Naming, out: Path) -> int:
    """Write the adapter that a run had learnt by a step, its average where it has one, as
    `write_adapter` says; UserError if the folder is not a step of a run that has an adapter."""
    from vcloze_jax.storage.checkpoint import load_group  # JAX from here on
    from vcloze_jax.storage.weights import describe_placement

    average = load_group(folder, "average/flux/")
    arrays = average or load_group(folder, "trainable/flux/")
    if not any(path.endswith("/lora_a") for path in arrays):
        raise UserError(f"{folder}: of a run that trains every weight; it has no adapter")
    norms = {path: array for path, array in arrays.items() if path.endswith("/scale")}
    note = {"step": folder.resolve().name, "weights": "average" if average else "last"}
    if (config := folder.resolve().parents[1] / "config.json").is_file():
        note |= describe_placement(PLACEMENTS[read_identity(config)["placement"]])
    read = partial(export.to_branches, arrays, arrays.get)
    return export.write_adapter(out, naming, read, norms, note)


def run_folder(argv) -> str:
    """`python -m ports SRC --out DST`, as above."""
    parser = Parser(__doc__, "python -m ports")
    parser.add_argument("source", type=find_weights, metavar="SRC", help="a weights folder")
    parser.add_argument("--out", type=path, metavar="DST", required=True, help="a new folder")
    dtypes = tuple(dict.fromkeys(engine.DTYPES.values()))
    parser.add_argument("--dtype", choices=dtypes, help="of all tensors (default: the source's)")
    args = parser.parse_args(argv)
    check_no_address(args.out)
    rounded, scaled = write_folder(args.source, args.out, args.dtype)
    loss = f", {rounded or 'no'} tensors were rounded to {args.dtype}" if args.dtype else ""
    if scaled:
        loss += f", {scaled} tensors of 8 bits are times their scales, products in float32"
        loss += "" if args.dtype else " (half the size: --dtype bfloat16, which rounds them)"
    for name in ("tokenizer", "tokenizer_2"):
        if not (args.out / name).is_dir():
            print(f"{args.out}: no {name}; copy the folder of the model that the weights are of")
    return f"{args.out}: a complete weights folder{loss}"


COPIED = "", ".json", ".md", ".model", ".txt"  # what lies beside the tensors: tokenizers, licences


def write_folder(source: Path, out: Path, dtype: str | None = None) -> tuple[int, int]:
    """Write `out` from the weights folder `source`, in `dtype` or in the source's own types;
    returns how many tensors were rounded, and how many of 8 bits had a scale. UserError if either
    folder is not as it must be. The JSON files that the source has are kept, those that it lacks
    are written."""
    from vcloze_jax.storage import weights  # JAX from here on

    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    if source.resolve() in out.resolve().parents:
        raise UserError(f"{out}: is inside of {source}; name a folder beside it")
    preset = weights.checked_preset(source)
    print(f"weights: {weights.summary(source, preset)}")
    part_of, rounded, scaled = out.with_name(out.name + ".part"), 0, 0
    if part_of.exists():
        raise UserError(f"{part_of}: is in the way; remove it, or name another folder")
    try:
        shutil.copytree(source, part_of, ignore=list_left_out)
        for file, entries in weights.described(preset, weights.MODELS).items():
            if not (part_of / file).exists():
                weights.write_json(part_of / file, entries)
        for field, (module, part) in weights.MODELS.items():
            file, _, leaves = weights.match_files(module, getattr(preset, field), source)
            tensors = engine.convert_leaves(part.table, leaves, file)
            target, scaled = part_of / part.folder, scaled + len(file.scales)
            rounded += engine.write_shards(target, part.stem, tensors, dtype, 5 * 10**9)
        part_of.rename(out)
        return rounded, scaled
    except PortError as error:
        raise UserError(f"{file.path}: {error}") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({describe_error(error)})") from error
    finally:
        shutil.rmtree(part_of, ignore_errors=True)


def list_left_out(folder, names):
    """Of the names in a folder those that are not copied: tensors, their indices, hidden files."""
    files = [Path(folder, name) for name in names]
    return [
        file.name
        for file in files
        if file.name.startswith(".")
        or file.name.endswith(".safetensors.index.json")
        or (not file.is_dir() and file.suffix.lower() not in COPIED)
    ]


if __name__ == "__main__":
    cli.run(main)
