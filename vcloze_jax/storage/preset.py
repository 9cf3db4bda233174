"""The preset of a weights folder: every size, from its JSON files or from its tensors' shapes.

What those cannot say, the defaults of sampling and training, is of the preset that `vcloze.json`
names; without that file, of FLUX.1-Fill.
"""

import codecs
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vcloze_jax.config import PRESETS, CLIPConfig, FluxConfig, Preset, UserError, VAEConfig
from vcloze_jax.inputs.checks import check_type, describe_with_file, error_context, parse_json
from vcloze_jax.ports.diagnose import PortError, refuse_entries
from vcloze_jax.ports.locate import SIZES, describe_file, locate
from vcloze_jax.ports.tables.folder import PARTS, SCHEDULER_FIXED, SHIFT, STATIC
from vcloze_jax.storage.places import named_preset

NULLABLE = "out_channels", "model_max_length"  # null: as many as in_channels; as the encoder reads


@contextmanager
def translate_errors(path):
    """Errors of ports and of files become the user's, with the path in front."""
    try:
        yield
    except PortError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(describe_with_file(error, path)) from error


def load_preset(folder: Path) -> Preset:
    """The preset that a weights folder names, with all sizes that its files give. UserError if it
    is no weights folder of a kind that we read, or a file or entry cannot be ours."""
    with translate_errors(folder):
        if folder.is_file():
            raise UserError(
                f"{folder}: {describe_file(folder)}; give the folder that holds all models"
            )
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    preset = named_preset(folder)
    configs = {field: read_config(folder, field, getattr(preset, field)) for field in PARTS}
    for field, read in (("t5", configs["flux"].text_width), ("clip", configs["flux"].vec_width)):
        if (width := configs[field].width) != read:
            reason = f"its {PARTS[field].name} is {width} wide, its transformer reads {read}"
            raise UserError(f"{folder}: {reason}; take both from one model")
    configs["t5"] = read_text_length(folder, configs["t5"])
    file = folder / "scheduler" / "scheduler_config.json"
    flow = read_flow(file, preset.flow) if file.is_file() else preset.flow
    return replace(preset, flow=flow, **configs)


def read_text_length(folder, t5):
    """The T5Config that reads as many tokens as its tokenizer says, and no more than it did."""
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    limit = t5.max_length
    entries = read_json(file) if file.is_file() else {}
    told = read_fields(file, entries, {"model_max_length": "max_length"}, t5)
    return replace(t5, max_length=min(told.get("max_length", limit), limit))


def read_flow(file, default):
    """The FlowConfig of a scheduler's config. A static shift s is a dynamic one between log s and
    log s. UserError for a scheduler that is not ours."""
    entries = read_json(file)
    with translate_errors(file):
        refuse_entries(entries, {*SHIFT, *STATIC}, SCHEDULER_FIXED, "_.*")
    if typed(file, STATIC[0], entries.get(STATIC[0], True), True):
        flow = replace(default, **read_fields(file, entries, SHIFT, default))
        if flow.base_tokens == flow.max_tokens:
            both = "base_image_seq_len and max_image_seq_len"
            raise UserError(f"{file}: {both} are {flow.max_tokens}; they must differ")
        return flow
    shift = typed(file, STATIC[1], entries.get(STATIC[1], 1.0), 1.0)
    if shift <= 0:
        raise UserError(f"{file}: shift is {shift}, must be above 0")
    return replace(default, base_shift=math.log(shift), max_shift=math.log(shift))


def read_config(folder: Path, field: str, default):
    """One model's sizes as our dataclass: from its config.json, where an entry that is absent keeps
    the default; without that file from its tensors' shapes, where they tell."""
    part = PARTS[field]
    file = folder / part.folder / "config.json"
    if file.is_file():
        entries = read_json(file)
        with error_context(file):
            entries = check_type(entries.get(part.nested, entries), dict)
        with translate_errors(file):
            refuse_entries(entries, part.config, part.fixed, part.harmless)
        ours = read_fields(file, entries, part.config, default)
    else:
        file = folder
        with translate_errors(folder):
            ours = SIZES[field](*locate(folder, part))
    if field == "flux":
        ours.setdefault("out_channels", ours.get("in_channels", default.in_channels))
        head_dim = ours.pop("head_dim", default.head_dim)
        ours["width"] = head_dim * ours.get("heads", default.heads)
        ours.setdefault("axes_dim", axes(head_dim, default))
    if field == "clip" and ours.get("eos") == 2:  # transformers: then it pools at the highest id
        ours["eos"] = ours.get("vocab", default.vocab) - 1
    config = replace(default, **ours)
    for fault in find_size_faults(config):
        raise UserError(f"{file}: {fault}")
    return config


def find_size_faults(c):
    """What of a model's sizes cannot be, in words."""
    if isinstance(c, FluxConfig | CLIPConfig) and c.width % c.heads:
        yield f"width {c.width} is not divisible by {c.heads} heads"
    elif isinstance(c, FluxConfig) and sum(c.axes_dim) != c.head_dim:
        yield f"axes_dim {c.axes_dim} must sum to the head dim {c.head_dim}"
    if isinstance(c, VAEConfig) and len(c.channels) != 4:
        yield f"channels {c.channels} must be 4: a latent is an eighth in size"
    elif isinstance(c, VAEConfig) and any(width % c.groups for width in c.channels):
        yield (
            f"channels {c.channels} are not divisible by {c.groups} groups; "
            "the autoencoder's config.json says how many it has"
        )


def axes(head_dim, default):
    """The RoPE axes (row, y, x) of a head where no config.json gives them: those of the named
    preset, of a preset with such heads, or else in the proportions of FLUX, 1 : 3.5 : 3.5."""
    known = (default.axes_dim, *(preset.flux.axes_dim for preset in PRESETS.values()))
    side = head_dim * 7 // 32 * 2
    return next(
        (dims for dims in known if sum(dims) == head_dim), (head_dim - 2 * side, side, side)
    )


def read_fields(file, entries, names, default):
    """The entries, of a JSON file, that `names` pairs with our fields, as {field: value}. UserError
    for one that is null where its library would take that for no default of its own."""
    return {
        field: typed(file, name, entries[name], getattr(default, field))
        for name, field in names.items()
        if entries.get(name) is not None or (name in entries and name not in NULLABLE)
    }


def read_json(file):
    """A JSON object, or UserError."""
    try:
        with error_context(file):
            return check_type(parse_json(file.read_bytes().removeprefix(codecs.BOM_UTF8)), dict)
    except OSError as error:
        raise UserError(describe_with_file(error, file)) from error


def typed(file, name, value, example):
    """`value` as the type of `example` (positive where that is an integer), or UserError."""
    if isinstance(example, tuple) and isinstance(value, list):
        return tuple(typed(file, name, item, example[0]) for item in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, int) and value > 0,
        float: number and math.isfinite(value),
    }
    if not fits.get(type(example), False):
        said = "null" if value is None else repr(value)
        raise UserError(f"{file}: {name} cannot be {said}; {example!r} is one that can")
    return type(example)(value)
