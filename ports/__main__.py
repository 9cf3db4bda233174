"""`python -m ports SRC --out DST`: weights of any kind that is known, as a folder of ours.

SRC is a folder in diffusers' layout, or one with Black Forest Labs' single files beside the text
encoders' folders. Ours is diffusers' layout in bfloat16, every key checked, at most 5 GB a file: it
loads onto a mesh as it is, in diffusers too. `python -m ports lora --help` is for adapters.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from ports import engine, export
from ports.diagnose import PortError
from ports.tables.namings import NAMINGS, TARGETS, Naming
from vcloze_jax.config import UserError


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        print(run_lora(argv[1:]) if argv[:1] == ["lora"] else run_folder(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_lora(argv) -> str:
    """`python -m ports lora FILE --to NAMING --out FILE`: an adapter in another naming; FILE may be
    a run's checkpoint, too."""
    parser = argparse.ArgumentParser("python -m ports lora", description=export.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    known = "an adapter in any naming that is known, or a folder RUN/checkpoints/STEP"
    add("file", type=Path, metavar="FILE", help=known)
    add("--to", choices=TARGETS, required=True, help="the naming to write")
    add("--out", type=Path, metavar="FILE", required=True)
    args = parser.parse_args(argv)
    naming = NAMINGS[args.to]
    if args.out.suffix != naming.ending:
        ending = f"--to {args.to} writes a file that ends in {naming.ending}"
        raise UserError(f"--out {args.out}: {ending}")
    try:
        convert = export_checkpoint if args.file.is_dir() else export.convert_adapter
        count = convert(args.file, naming, args.out)
    except (PortError, OSError) as error:
        raise UserError(f"{args.file}: {error}") from error
    return f"{args.out}: {count} linear layers in {naming.title} naming"


def export_checkpoint(folder: Path, naming: Naming, out: Path) -> int:
    """Write the adapter that a run had learnt by a step, its average where it has one, as
    `write_adapter` says; UserError if the folder is not a step of a run that has an adapter."""
    step = folder.resolve().name
    if not step.isdecimal():
        raise UserError(f"{folder}: neither a file nor a checkpoint; name a RUN/checkpoints/STEP")
    from vcloze_jax.storage.checkpoint import load_group  # JAX from here on

    average = load_group(folder, "average/flux/")
    arrays = average or load_group(folder, "trainable/flux/")
    if not any(path.endswith("/lora_a") for path in arrays):
        raise UserError(f"{folder}: of a run that trains every weight; it has no adapter")
    norms = {path: array for path, array in arrays.items() if path.endswith("/scale")}
    note = {"step": step, "weights": "average" if average else "last"}
    return export.write_adapter(out, naming, export.to_branches(arrays), norms, note)


def run_folder(argv) -> str:
    """`python -m ports SRC --out DST`, as above."""
    parser = argparse.ArgumentParser("python -m ports", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="a weights folder")
    parser.add_argument("--out", type=Path, metavar="DST", required=True, help="a new folder")
    args = parser.parse_args(argv)
    write_folder(args.source, args.out)
    return f"{args.out}: a complete weights folder"


COPIED = "", ".json", ".md", ".model", ".txt"  # what lies beside the tensors: tokenizers, licences


def write_folder(source: Path, out: Path):
    """Write `out` from the weights folder `source`; UserError if either is not as it must be. The
    JSON files that the source has are kept, those that it lacks are written."""
    from vcloze_jax.storage import weights  # JAX from here on

    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    if source.resolve() in out.resolve().parents:
        raise UserError(f"{out}: is inside of {source}; name a folder beside it")
    preset = weights.check(source)
    print(f"weights: {weights.summary(source, preset)}")
    part_of = out.with_name(out.name + ".part")
    shutil.rmtree(part_of, ignore_errors=True)
    try:
        shutil.copytree(source, part_of, ignore=list_left_out)
        for file, entries in weights.described(preset, weights.MODELS).items():
            if not (part_of / file).exists():
                weights.write_json(part_of / file, entries)
        for field, (module, part) in weights.MODELS.items():
            file, _, _, leaves = weights.plan(module, getattr(preset, field), source)
            tensors = engine.convert_leaves(part.table, leaves, file)
            engine.write_shards(part_of / part.folder, part.stem, tensors, "bfloat16", 5 * 10**9)
        part_of.rename(out)
    except PortError as error:
        raise UserError(f"{file.path}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error})") from error
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
    sys.exit(main())
