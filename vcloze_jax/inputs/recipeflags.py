"""The flags of train.py: one for each value of a run's recipe, and what holds of it."""

import math
from dataclasses import fields, replace
from pathlib import Path

from vcloze_jax.config import DATA, PRESETS, Recipe, UserError
from vcloze_jax.data.sources import is_own
from vcloze_jax.inputs.checks import flag
from vcloze_jax.inputs.cli import (
    DOWNLOAD,
    PackageFlag,
    Parser,
    add_plan_flags,
    check_plan_flags,
    expand,
    path,
    positive_int,
    word,
)
from vcloze_jax.inputs.papers import PLACEMENTS
from vcloze_jax.inputs.pictures import check_no_address
from vcloze_jax.inputs.runfolder import ORIGINS

PATHS = "weights", "lora", "data", "data_dir", "cache"  # of the recipe
TABLES = {"preset": PRESETS, "placement": PLACEMENTS}  # fields of it that name a row of one
# What a preset's recipe has otherwise for the user's own data: of twenty pairs mini learns a simple
# task in about two minutes. All of it is free to change, so that runs which began before go on.
OWN = {"mini": dict(lr=3e-3, steps=200, save_every=100, preview_every=100)}


def parse_training(argv, description=""):
    """The flags of train.py, which --help describes so."""
    parser = Parser(description)
    add = parser.add_argument
    add("--out", type=path, metavar="RUN", help="the run's folder (default: runs/PRESET)")
    add("--check", action="store_true", help="validate everything, train nothing")
    add_plan_flags(parser)
    accept = "go on with a run although these are not those that it was begun with"
    add("--accept", nargs="+", action="extend", choices=ORIGINS, default=[], help=accept)
    add("--tensorboard", action=PackageFlag, const="tensorboardX", help="into RUN/tensorboard")
    trace = "trace so many steps into RUN/profile"
    add("--profile", type=positive_int, default=0, metavar="STEPS", help=trace)
    add_recipe_flags(parser)
    args = parser.parse_args(argv)
    check_plan_flags(args)
    return args


def add_recipe_flags(parser):
    """A flag for every field of Recipe; one that is not given stays None: the preset's holds."""
    parser.add_argument("--download", action="store_true", help=DOWNLOAD)
    groups = {}
    for f in fields(Recipe):
        options = {key: f.metadata[key] for key in ("help", "choices") if f.metadata[key]}
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        elif isinstance(f.default, tuple):
            options |= dict(type=float, nargs=len(f.default))
        elif f.name in PATHS:
            options["type"] = expand
        elif f.default is not None:
            options["type"] = word if isinstance(f.default, str) else type(f.default)
        if f.name in TABLES:
            options["choices"] = TABLES[f.name]
        section = f.metadata["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        groups[section].add_argument(flag(f.name), default=None, **options)


def read_recipe(args):
    """The Recipe that flags ask for, over the defaults of their preset, and of the user's own
    data. Raises UserError."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    preset = PRESETS[given.get("preset", "mini")]
    defaults = preset.recipe
    if is_own(given.get("data", defaults.data)):
        defaults = replace(defaults, **OWN.get(preset.name, {}))
    if "weights" not in given and preset.name != "mini" and not args.plan:
        raise UserError(f"--preset {preset.name}: its weights are yours; add --weights DIR")
    for name in {"weights", "lora"} & given.keys():
        path = Path(given[name])
        given[name] = str(path.resolve() if path.exists() else path)
    if "guidance_range" in given:
        given["guidance_range"] = tuple(given["guidance_range"])
    if given.get("from_scratch"):
        given.setdefault("rank", 0)
    batch = max(given.get("batch", defaults.batch), 1)
    for part in ("group", "micro_batch"):
        if default := getattr(defaults, part):
            given.setdefault(part, math.gcd(batch, default))
    return check_recipe(replace(defaults, **given))


LARGEST = 2**31  # above what a device counts in int32
SHARE = (lambda x: 0 <= x <= 1), "from 0 to 1"
RANGES = {  # field of Recipe: what holds of its value, and that in words; NaN fails each
    "lr": (lambda x: 0 < x < 1, "above 0, below 1"),
    "clip": (lambda x: x > 0, "above 0"),
    "ema": (lambda x: 0 <= x < 1, "at least 0, below 1"),
    "mask_fill": (lambda x: -1 <= x <= 1, "from -1 to 1"),
    "time_mean": (math.isfinite, "a finite number"),
    "guidance_range": (lambda x: 0 < x[0] <= x[1] <= 1000, "LOW HIGH, above 0, to 1000"),
    "seed": (lambda x: 0 <= x < 2**32, "in 0 … 2^32-1"),
}


def check_recipe(recipe):
    """The recipe; UserError where a value, or two together, cannot be."""
    for f in fields(recipe):
        value, least = getattr(recipe, f.name), f.metadata["least"]
        if least is not None and not least <= value < LARGEST:  # NaN is neither
            words = "below 2^31" if value >= LARGEST else f"at least {least}"
            raise UserError(f"{flag(f.name)} {value}: must be {words}")
        share = SHARE if f.metadata["section"] == DATA and isinstance(value, float) else None
        holds, words = RANGES.get(f.name, share or (None, None))
        if holds and not holds(value):
            shown = " ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else value
            raise UserError(f"{flag(f.name)} {shown}: must be {words}")
    if 0 < recipe.decay_steps <= recipe.warmup:
        reason = f"must be 0, or more than --warmup {recipe.warmup}"
        raise UserError(f"--decay-steps {recipe.decay_steps}: {reason}")
    for part in ("micro_batch", "group"):
        size = getattr(recipe, part)
        if size and recipe.batch % size:
            raise UserError(f"--batch {recipe.batch}: not a multiple of {flag(part)} {size}")
    placement = PLACEMENTS[recipe.placement]
    if recipe.loss_region == "grid" and any(placement.clean):
        reason = "all but the target is clean, and has no loss; leave it at target"
        raise UserError(f"--loss-region grid: with --placement {placement.name} {reason}")
    if recipe.time_shift and any(placement.clean):
        reason = "times are shifted by a grid's noisy tokens, which training does not count"
        raise UserError(f"--time-shift: with --placement {placement.name} {reason}; leave it away")
    if not recipe.rank and "cond_mod" in placement.branch:
        reason = "its conditions' modulations are of an adapter, and --rank 0 has none"
        raise UserError(f"--placement {recipe.placement}: {reason}")
    if recipe.from_scratch and (recipe.rank or recipe.lora):
        raise UserError("--from-scratch trains every weight: leave --rank and --lora away")
    if recipe.optimizer == "muon" and recipe.rank:
        reason = "an adapter learns by adam: leave --optimizer away"
        raise UserError(f"--optimizer muon is for --rank 0 or --from-scratch; {reason}")
    if recipe.from_scratch and recipe.offload:
        raise UserError("--from-scratch trains the text encoders, too: leave --offload away")
    if recipe.cache:
        check_cache(recipe)
    return recipe


def check_cache(recipe):
    """Raise UserError where no cache can hold what a run reads."""
    if not is_own(recipe.data):
        reason = f"the grids of {recipe.data} are drawn without end, and their texts"
        raise UserError(f"--cache {recipe.cache}: {reason}; it is for your own files and folders")
    if recipe.from_scratch:
        raise UserError(f"--cache {recipe.cache}: text encoders are learnt, too; leave it away")
    check_no_address(Path(recipe.cache), "--cache")
