"""What the commands share: flags, one-line errors and exit codes."""

import argparse
import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

from vcloze_jax.config import PRESETS, Recipe, UserError, flag
from vcloze_jax.storage.places import cache_folder, file_and_scale


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as help and turns a wrong flag into a UserError."""

    def __init__(self, description):
        form = argparse.RawDescriptionHelpFormatter
        epilog = (
            f"Compiled programs and text embeddings are kept in {cache_folder()}\n"
            "(XDG_CACHE_HOME moves it); all of it may be deleted at any time."
        )
        super().__init__(None, None, description, epilog, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def add_model_flags(parser):
    """The flags that say what to paint with, and where."""
    add = parser.add_argument
    default = "folder in diffusers' layout (default: mini, with its adapter)"
    add("--weights", type=Path, metavar="DIR", help=default)
    add(
        "--lora",
        action="append",
        type=file_and_scale,
        metavar="FILE[:SCALE]",
        help="adapter to fold in, repeatable; on mini it replaces mini's own",
    )
    add("--mesh", help="8, or data=2,fsdp=2,tensor=2 (default: all accelerators, or one CPU)")


def add_recipe_flags(parser):
    """A flag for every field of Recipe; one that is not given stays None: the preset's holds."""
    groups = {}
    for f in fields(Recipe):
        options = dict(f.metadata)
        title, free = options.pop("group"), options.pop("free")
        options.pop("least", None)
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        elif isinstance(f.default, tuple):
            options |= dict(type=float, nargs=len(f.default))
        elif f.default is not None:
            options["type"] = type(f.default)
        if f.name == "preset":
            options["choices"] = PRESETS
        options["help"] += "; may change when a run goes on" if free else ""
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        group.add_argument(flag(f.name), default=None, **options)


def read_recipe(args):
    """The Recipe that flags ask for, over the defaults of their preset. Raises UserError."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    preset = PRESETS[given.get("preset", "mini")]
    if "weights" not in given and preset.name != "mini":
        raise UserError(f"--preset {preset.name}: its weights are yours; add --weights DIR")
    for name in {"weights", "lora"} & given.keys():
        given[name] = str(Path(given[name]).resolve())
    if "guidance_range" in given:
        given["guidance_range"] = tuple(given["guidance_range"])
    if given.get("from_scratch"):
        given.setdefault("rank", 0)
    batch = given.get("batch", preset.recipe.batch)
    given.setdefault("micro_batch", min(preset.recipe.micro_batch, max(batch, 1)))
    return replace(preset.recipe, **given)


def run(main):
    """Call main(argv) and exit: 0 done, 2 the user's mistake, 1 not finite, 130 Ctrl-C,
    143 SIGTERM. A mistake is exactly one line on stderr.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Transformers says at import that torch is missing, which is as intended.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
