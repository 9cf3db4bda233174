"""What the commands share: one-line errors, exit codes, and where mini and the cache are."""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

from vcloze_jax.config import FLUX_FILL, PRESETS, UserError

MINI = Path(__file__).parent / "mini"  # shipped weights: the base, lora.safetensors beside it
LORA = MINI / "lora.safetensors"


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


def model_of(weights, lora):
    """Weights folder and adapters [(file, scale)] that those flags name, or their absence; an
    adapter may also be a path, or "FILE:SCALE"."""
    if not lora and not weights:
        return MINI, [(LORA, 1.0)]
    lora = [lora] if isinstance(lora, str | Path) else lora or []
    pairs = [file_and_scale(str(x)) if isinstance(x, str | Path) else x for x in lora]
    return Path(weights or MINI), pairs


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


def cache_folder():
    """Where compiled programs and text embeddings are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "vcloze_jax"


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
