"""Where the models of a weights folder lie, and their sizes, told by what its files hold.

A model is in its own folder, as diffusers and transformers write it, or it is a single file beside
those folders, as Black Forest Labs publish theirs and ComfyUI's users download the text encoders.
The name of a single file means nothing. It
may hold several models, each under a prefix of its own, as ComfyUI's checkpoints do.
"""

import re
from contextlib import suppress
from itertools import count
from pathlib import Path

from vcloze_jax.ports.diagnose import (
    PortError,
    describe_header,
    describe_start,
    in_brackets,
    list_faults,
    say_fetch,
)
from vcloze_jax.ports.engine import SafetensorsFile, spell_table
from vcloze_jax.ports.shards import list_variants
from vcloze_jax.ports.tables import LEAVES, Part, Table, find_row, order_axes
from vcloze_jax.ports.tables.folder import PARTS, UNREAD

OPENED = ".safetensors", ".sft"
REFUSED = ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth"
UNKNOWN = "of a kind that is not known"


def locate(folder: Path, part: Part) -> tuple[SafetensorsFile, Table]:
    """A model's open source and the table that it is named by, spelled as it is there. PortError if
    it is not there, or in two files; files that are broken are named only if it is not there."""
    inside = folder / part.folder
    if list_variants(inside):
        try:
            source = open_part(inside, part)
        except PortError as error:
            raise PortError(f"{part.folder}/: {error}") from error
        return source, recognise_table(part, source) or part.table
    found, others = [], []
    for file in list_files(folder, inside, OPENED):
        try:
            source = open_part(file, part)
        except (PortError, OSError) as error:
            others.insert(0, str(error))
            continue
        if table := recognise_table(part, source):
            found.append((source, table))
        else:
            others.append(f"{file.name} is {describe_header(source.header) or UNKNOWN}")
    if len(found) == 1:
        return found[0]
    if found:
        names = list_faults([source.path.name for source, _ in found])
        raise PortError(f"holds more than one {part.name}: {names}; leave one")
    for file in list_files(folder, inside, REFUSED):
        others.append(f"{file.name} is {describe_start(file) or UNKNOWN}")
    more = f"; {list_faults(others)}" if others else ""
    place = f"{part.folder}/{part.stem}.safetensors"
    if list_variants(folder.parent / part.folder):
        more += f"; give the folder above it, {folder.parent}"
    more += find_astray(folder, part) + say_fetch(folder)
    raise PortError(f"holds no {part.name}: no {place}, and no single file of one{more}")


def find_astray(folder: Path, part: Part) -> str:
    """A model's single file in a folder of another name, as ComfyUI's own folder has it, and what
    to do about it, as the tail of a message; "" where there is none."""
    for file in sorted(folder.glob("[!.]*/[!.]*")):
        if file.suffix.lower() in OPENED and file.is_file():
            with suppress(PortError, OSError):
                if recognise_table(part, open_part(file, part)):
                    there = file.relative_to(folder)
                    return f"; {there} is one: move or link it into the weights folder itself"
    return ""


def open_part(path: Path, part: Part) -> SafetensorsFile:
    """A file, or a folder of shards, as if it held one model alone: what begins with the prefix of
    another is left out, and its own taken off. What is of no model stays, and is unknown then."""
    source, others = SafetensorsFile(path), [*UNREAD]
    for other in PARTS.values():
        others += other.prefixes if other != part else ()
    for prefix in part.prefixes:
        if any(key.startswith(prefix) for key in source.header):
            for name in ("header", "home", "scales"):
                pairs = vars(source)[name].items()
                kept = {k.removeprefix(prefix): x for k, x in pairs if not k.startswith((*others,))}
                setattr(source, name, kept)
            break
    return source


def list_files(folder: Path, inside: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with one of some suffixes in a weights folder or in a model's, sorted; not those
    that are hidden, as what macOS leaves beside each file on a foreign disk ("._NAME")."""
    every = sorted(folder.glob("[!.]*")) + sorted(inside.glob("[!.]*"))
    return [file for file in every if file.suffix.lower() in suffixes and file.is_file()]


def recognise_table(part: Part, source: SafetensorsFile) -> Table | None:
    """The table by whose sign a source is one of `part`, spelled as there."""
    tables = (t for t in part.tables if any(re.fullmatch(t.sign, key) for key in source.header))
    table = next(tables, None)
    return table and spell_table(table, source)


def describe_file(file: Path) -> str:
    """What a file is, in words. PortError if it is broken."""
    if file.suffix.lower() not in OPENED:
        return describe_start(file) or UNKNOWN
    return describe_start(file) or describe_header(SafetensorsFile(file).header) or UNKNOWN


def flux_sizes(source: SafetensorsFile, table: Table) -> dict:
    """Fields of our FluxConfig, and head_dim, from the shapes of its tensors."""
    in_channels, width = find_shape(source, table, "img_in/kernel", 2)
    (head_dim,) = find_shape(source, table, "double/img/q_norm/scale", 1)
    if width % head_dim:
        key = first_key(table, "double/img/q_norm/scale")
        raise PortError(f"{key} is [{head_dim}], which does not divide the width {width}")
    return {
        "in_channels": in_channels,
        "out_channels": find_shape(source, table, "final/linear/kernel", 2)[1],
        "heads": width // head_dim,
        "head_dim": head_dim,
        "double_blocks": count_layers(source, table, "double/img/qkv/kernel"),
        "single_blocks": count_layers(source, table, "single/linear1/kernel"),
        "text_width": find_shape(source, table, "txt_in/kernel", 2)[0],
        "vec_width": find_shape(source, table, "vector_in/in_layer/kernel", 2)[0],
        "guidance_embed": first_key(table, "guidance_in/in_layer/kernel") in source.header,
    }


def vae_sizes(source: SafetensorsFile, table: Table) -> dict:
    """Fields of our VAEConfig from the shapes of its tensors; groups and scale leave no trace."""
    first = "encoder/down/{}/res/{}/conv1/bias".format
    levels = next(i for i in count() if first_key(table, first(i, 0)) not in source.header)
    blocks = next(j for j in count() if first_key(table, first(0, j)) not in source.header)
    return {
        "channels": tuple(find_shape(source, table, first(i, 0), 1)[0] for i in range(levels)),
        "layers": blocks,
        "latent_channels": find_shape(source, table, "decoder/conv_in/kernel", 4)[2],
    }


def t5_sizes(source: SafetensorsFile, table: Table) -> dict:
    """Fields of our T5Config from the shapes of its tensors; max_distance leaves no trace."""
    vocab, width = find_shape(source, table, "embed", 2)
    buckets, heads = find_shape(source, table, "relative_bias", 2)
    return {
        "vocab": vocab,
        "width": width,
        "head_dim": find_shape(source, table, "blocks/q/kernel", 2)[1] // heads,
        "heads": heads,
        "mlp": find_shape(source, table, "blocks/wi_0/kernel", 2)[1],
        "layers": count_layers(source, table, "blocks/norm1/scale"),
        "buckets": buckets,
    }


def clip_sizes(source: SafetensorsFile, table: Table) -> dict:
    """Fields of our CLIPConfig from the shapes of its tensors; heads leave no trace. The end token
    is the last of the vocabulary."""
    vocab, width = find_shape(source, table, "embed", 2)
    return {
        "vocab": vocab,
        "width": width,
        "mlp": find_shape(source, table, "blocks/fc1/kernel", 2)[1],
        "layers": count_layers(source, table, "blocks/norm1/scale"),
        "max_length": find_shape(source, table, "positions", 2)[0],
        "eos": vocab - 1,
    }


# field of Preset -> its sizes by shapes
SIZES = {"flux": flux_sizes, "vae": vae_sizes, "t5": t5_sizes, "clip": clip_sizes}


def first_key(table: Table, path: str) -> str:
    """The foreign key of our leaf, or of the first part and layer of it."""
    parts, leaf, _ = find_row(table, path)
    return parts[0][0].replace("{i}", "0") + LEAVES.get(leaf, "")


def find_shape(source: SafetensorsFile, table: Table, path: str, ndim: int) -> tuple[int, ...]:
    """Our shape of a leaf that is one tensor of the source, in each layer. PortError."""
    key = first_key(table, path)
    there, _ = source.header.get(key, ((), None))
    if len(there) != ndim or 0 in there:
        found = f"is {in_brackets(there)}" if there else "is missing"
        raise PortError(f"{key} {found}; the model's sizes are told by it")
    _, leaf, _ = find_row(table, path)
    axes = sum(order_axes(leaf, ndim, inputs=int(ndim != 4)), ())
    return tuple(there[axes.index(axis)] for axis in range(ndim))


def count_layers(source: SafetensorsFile, table: Table, path: str) -> int:
    """How many layers of a stacked leaf the source counts: the highest number, plus one."""
    name = re.escape(find_row(table, path)[0][0][0]).replace(r"\{i\}", r"(\d{1,3})")
    found = (re.match(rf"{name}\.", key) for key in source.header)
    return max((int(match[1]) + 1 for match in found if match), default=1)
