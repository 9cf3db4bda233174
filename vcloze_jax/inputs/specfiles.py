"""Specs of a command: the files that hold them, the flags that change them, and what they write.

A file holds a spec, a list of specs, or a record that painting one wrote, whose spec it is again.
"""

import codecs
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from vcloze_jax.config import PRESETS, Preset, UserError
from vcloze_jax.grid import Spec
from vcloze_jax.inputs.cells import find_resolution
from vcloze_jax.inputs.checks import (
    WRAPPED,
    check_integer,
    check_type,
    describe_error,
    error_context,
    parse_json,
    read_key,
)
from vcloze_jax.inputs.cli import Parser, add_model_flags, add_plan_flags, check_plan_flags
from vcloze_jax.inputs.cli import path as expanded
from vcloze_jax.inputs.cluster import count_processes
from vcloze_jax.inputs.pictures import URL, check_file, check_writable, save_png, save_text
from vcloze_jax.inputs.spec import MAX_SEED, NUMBERS, read_spec
from vcloze_jax.storage.places import adapter_and_name, split_bank

MAX_BYTES = 2**22  # of a spec file
MAX_SPECS = 1024  # of one command
IMAGES = "num_images_per_prompt"
CHECKS = NUMBERS | {IMAGES: (check_integer, 1, MAX_SPECS)}
FLAGS = {
    "--seed": ("seed", "of the noise"),
    "--steps": ("num_inference_steps", "Euler steps"),
    "--guidance": ("guidance_scale", "of the distilled guidance"),
    "--images": (IMAGES, "pictures of each spec, of as many seeds; written as NAME_seedK"),
}


def parse_sampling(argv, description=""):
    """The flags of sample.py, which --help describes so. Raises UserError where neither specs nor
    names are asked for."""
    parser = Parser(description)
    add = parser.add_argument
    add("--grid", nargs="+", action="extend", type=expanded, metavar="SPEC.json")
    add_model_flags(parser, adapter_and_name)
    add_spec_flags(parser)
    add("--out", type=expanded, default=Path("outputs"), metavar="DIR")
    add("--film", action="store_true", help="NAME_film.webp, too: all steps of a grid")
    add("--dial", action="store_true", help="record how far examples and noise move it")
    add("--list-tasks", action="store_true", help='names for "task" in a spec')
    add("--check", action="store_true", help="validate everything, paint nothing")
    add("--offload", action="store_true", help="slower; FLUX paints on 24 GB")
    add_plan_flags(parser, PRESETS)
    args = parser.parse_args(argv)
    check_plan_flags(args)
    if not args.grid and not args.list_tasks:
        parser.error("--grid SPEC.json is needed")
    return args


def add_spec_flags(parser):
    """The flags that change what every spec says."""
    group = parser.add_argument_group("instead of what the specs say")
    for flag, (key, help) in FLAGS.items():
        kind = float if key == "guidance_scale" else int
        group.add_argument(flag, type=kind, metavar="N", help=f"{help} ({key})")


def read_changes(args) -> dict:
    """{key of a spec: value} of the flags that were given. Raises UserError naming the flag."""
    changes = {}
    for flag, (key, _) in FLAGS.items():
        if (value := getattr(args, flag[2:])) is not None:
            with error_context(f"{flag} {value}"):
                check, *limits = CHECKS[key]
                changes[key] = check(value, *limits)
    return changes


def read_specs(sources: list, preset: Preset, changes=None, first=0) -> list[Spec]:
    """Read every spec of every source: a path, or what a file would hold; `changes` {key: value}
    holds for all of them. What no file holds is called by its number, from `first` on.

    Raises UserError naming the file and the key, also when two specs would write the same file.
    """
    specs = []
    for number, source in enumerate(sources, first):
        if isinstance(source, dict):
            specs += read_pictures(source, preset, f"grid-{number}", Path(), changes)
            continue
        if not isinstance(source, str | os.PathLike):
            kind = type(source).__name__
            raise UserError(f"a {kind} is no spec: a file's path, or a dict with the image's rows")
        path = Path(source)
        with error_context(path):
            content = parse_json(_read_bytes(path))
            _refuse_wrapped(content)
            if content == []:
                raise UserError("an empty list; give at least one spec")
            _check_count(len(specs) + (len(content) if isinstance(content, list) else 1))
            if not isinstance(content, list):
                specs += read_pictures(content, preset, path.stem, path, changes)
                continue
            for i, item in enumerate(content):
                with error_context(f"[{i}]"):
                    specs += read_pictures(item, preset, f"{path.stem}-{i}", path, changes)
    _check_count(len(specs))
    _check_names(specs)
    return specs


def read_pictures(table, preset, name, source, changes) -> list[Spec]:
    """The specs of one spec, a picture each: as many as it says, of successive seeds."""
    table = _spec_of(check_type(table, dict)) | (changes or {})
    table = {key: v for key, v in table.items() if key != IMAGES or v is not None}
    count = read_key(table, IMAGES, None, *CHECKS[IMAGES])
    spec = read_spec({k: v for k, v in table.items() if k != IMAGES}, preset, name, source)
    if "seed" in (changes or {}) and spec.latents is not None and not spec.upsampling:
        raise UserError("seed: with latents given nothing is drawn; remove either")
    if count is None:
        return [spec]
    if spec.latents is not None and count > 1:
        raise UserError(f"{IMAGES}: with latents given, all would be one picture; remove either")
    seeds = range(spec.seed, spec.seed + count)
    if seeds[-1] > MAX_SEED:
        raise UserError(f"{IMAGES}: the last seed would be {seeds[-1]}, above {MAX_SEED}")
    return [
        replace(spec, seed=k, name=f"{name}_seed{k}", resolved=spec.resolved | {"seed": k})
        for k in seeds
    ]


def write_spec(file: Path, spec: Spec, resolution: int) -> None:
    """Write a Spec of a grid to learn from as sample.py reads it: null where it is masked, and what
    is given beside it, as NAME/ROW_COLUMN.png. Raises UserError if the disk refuses."""
    folder = file.with_suffix("")
    folder.mkdir(exist_ok=True)
    image = []
    for r, row in enumerate(spec.grid.rows):
        cells = zip(spec.grid.split(row.pixels), spec.grid.split(row.mask), strict=True)
        image.append([_write_cell(folder / f"{r}_{c}.png", *cell) for c, cell in enumerate(cells)])
    table = {"image": image, "layout_prompt": "", "task_prompt": spec.prompt}
    table |= {"resolution": find_resolution(spec.grid, resolution)}
    table |= {"num_inference_steps": spec.num_inference_steps}
    table |= {"guidance_scale": spec.guidance_scale, "seed": spec.seed}
    save_text(file, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def check_commands(args, specs: list[Spec]) -> None:
    """Raise UserError where the flags of sample.py cannot do what specs ask: an adapter that no
    --lora names, or as `check_outputs` does."""
    _, bank = split_bank(args.lora)
    for spec in specs if args.preset is None else ():  # which is planned without adapters
        check_picked(spec, bank)
    check_outputs(args.out, specs, args.film)


def check_picked(spec: Spec, names) -> None:
    """Raise UserError where a spec picks an adapter that is none of these."""
    adapter = spec.resolved.get("adapter")
    if adapter is not None and adapter not in names:
        known = ", ".join(filter(None, names))
        remedy = f"one of {known}" if known else f"add --lora {adapter}=FILE"
        raise UserError(f"{spec.name}: adapter: there is no {adapter!r}; {remedy}")


def check_outputs(out: Path, specs: list[Spec], film: bool = False) -> None:
    """Raise UserError where an output cannot be written, or would replace an input, but for a
    record that is painted again."""
    names = [
        name for spec in specs for name in output_names(spec.name, len(spec.grid.targets), film)
    ]
    if count_processes() != 1 and not URL.search(str(out)):
        # Or one would take away again what it made to try, under the others.
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out, max(names, key=lambda name: len(os.fsencode(name))))
    inputs = set()
    for spec in specs:
        cells = (cell for row in spec.resolved["image"] for cell in row if cell)
        inputs.add(spec.source.resolve())
        for cell in cells:
            paths = cell.values() if isinstance(cell, dict) else [cell]
            inputs.update(Path(path).resolve() for path in paths)
    for name in names:
        if (out / name).resolve() in inputs and not _is_record(out / name):
            raise UserError(f"--out {out}: {name} is an input; choose another")
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} is a folder; choose another")


def output_names(name: str, targets: int, film: bool = False) -> list[str]:
    """The files that painting a spec writes: grid, targets in column order, the film if there is
    one, and last the record."""
    pictures = [f"{name}.png", *(f"{name}_target{i}.png" for i in range(targets))]
    return [*pictures, *([f"{name}_film.webp"] if film else []), f"{name}.json"]


def _write_cell(file, pixels, mask):
    """One cell as a spec in the folder above has it, its picture and what is masked in files."""
    if mask.all():
        return None
    name = f"{file.parent.name}/{file.name}"
    mask_file = file.with_stem(f"{file.stem}_mask")
    save_png(file, pixels)
    if not mask.any():
        return name
    save_png(mask_file, np.uint8(255) * mask)
    return {"image": name, "mask": f"{file.parent.name}/{mask_file.name}"}


def _spec_of(table: dict) -> dict:
    """The spec of a record; any other table is one itself."""
    return check_type(table["spec"], dict) if {"spec", "boxes"} <= table.keys() else table


def _refuse_wrapped(content) -> None:
    """Raise UserError for specs that stand within an object, which is none itself."""
    there = content.items() if isinstance(content, dict) and "image" not in content else ()
    for key, value in there:
        if isinstance(value, dict) and "image" in value and _spec_of(content) is content:
            raise UserError(f"{key!r}: holds the spec; give what stands under it as the file")
        items = value if isinstance(value, list) else ()
        if any(isinstance(item, dict) and "image" in item for item in items):
            raise UserError(f"{key!r}: {WRAPPED}")


def _is_record(file: Path) -> bool:
    if file.suffix != ".json":
        return False
    content = parse_json(_read_bytes(file))
    return isinstance(content, dict) and _spec_of(content) is not content


def _check_count(count: int) -> None:
    if count > MAX_SPECS:
        raise UserError(f"grid {count} of at most {MAX_SPECS} at once; split them up")


def _check_names(specs: list[Spec]) -> None:
    owners = {}
    for spec in specs:
        names = output_names(spec.name, len(spec.grid.targets))
        for name in dict.fromkeys(Path(name).stem for name in names):
            if name in owners:
                raise UserError(
                    f"{spec.source}: output {name!r} is also that of {owners[name]}; rename one"
                )
            owners[name] = spec.source


def _read_bytes(path: Path) -> bytes:
    if check_file(path).stat().st_size > MAX_BYTES:
        raise UserError(f"more than {MAX_BYTES} bytes; this is no spec")
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"cannot be read: {describe_error(error)}") from None
