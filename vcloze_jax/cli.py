"""What the commands share: one-line errors, exit codes, and where mini and the cache are."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from vcloze_jax.config import FLUX_FILL, PRESETS, UserError

MINI = Path(__file__).parent / "mini"  # shipped weights: the base, lora.safetensors beside it
LORA = MINI / "lora.safetensors"


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as help and turns a wrong flag into a UserError."""

    def __init__(self, description):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

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


def model_of(args):
    """Weights folder and adapters [(file, scale)] that those flags name."""
    if args.lora or args.weights:
        return args.weights or MINI, args.lora or []
    return MINI, [(LORA, 1.0)]


def file_and_scale(text):
    """'FILE[:SCALE]' -> path and scale; a name of a file that is there is never split."""
    file, colon, tail = text.rpartition(":")
    try:
        scale = float(tail)
    except ValueError:
        colon = ""
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {text}: the scale must be finite")
    return Path(file), scale


def named_preset(folder):
    """The preset that FOLDER/vcloze.json names, without it FLUX.1-Fill's. Raises UserError."""
    file = Path(folder) / "vcloze.json"
    if not file.is_file():
        return FLUX_FILL
    try:
        return PRESETS[json.loads(file.read_text())["preset"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = ", ".join(PRESETS)
        raise UserError(f'{file}: must say {{"preset": NAME}} with a name of {names}') from None


def run(main):
    """Call main(argv) and exit: 0 done, 2 the user's mistake, 1 not finite, 130 Ctrl-C.

    A mistake is exactly one line on stderr.
    """
    # Transformers says at import that torch is missing, which is as intended.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vcloze_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
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
