"""What the commands share: flags, one-line errors and exit codes."""

import argparse
import math
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from vcloze_jax.config import PRESETS, Recipe, UserError, flag
from vcloze_jax.inputs.checks import describe_with_file
from vcloze_jax.inputs.terminal import guard_streams, tell_error
from vcloze_jax.storage.places import cache_folder, file_and_scale, find_weights

DOWNLOAD = "fetch --weights OWNER/NAME from Hugging Face, where it is not in its cache"
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
AT_END = []  # functions to call before the process ends by itself


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

    def parse_args(self, argv):
        """The flags, --weights as a folder on this machine."""
        args = super().parse_args(argv)
        if args.weights:
            args.weights = find_weights(args.weights, args.download)
        return args


class PackageFlag(argparse.Action):
    """A switch for what needs a package that not everybody has: its `const`."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=0, default=False, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        if find_spec(self.const) is None:
            raise UserError(f"{option_string}: pip install {self.const}, please")
        setattr(namespace, self.dest, True)


def positive_int(text):
    """A whole number from 1, as a type of argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def local_folder(text):
    """A folder of a file system, as a type of argparse. Raises UserError for an address."""
    if re.match(r"\w+://", text):
        raise UserError(
            f"--out {text}: no folder of a file system; give one that all hosts share, and copy it "
            "when it is done: in an object store nothing can be renamed, so nothing is ever whole"
        )
    return Path(text)


def add_model_flags(parser):
    """The flags that say what to paint with, and where."""
    add = parser.add_argument
    default = "folder in diffusers' layout, or an id of Hugging Face (default: mini, adapted)"
    add("--weights", metavar="DIR", help=default)
    add("--download", action="store_true", help=DOWNLOAD)
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
    parser.add_argument("--download", action="store_true", help=DOWNLOAD)
    groups = {}
    for f in fields(Recipe):
        options = {key: f.metadata[key] for key in ("help", "choices") if f.metadata[key]}
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        elif isinstance(f.default, tuple):
            options |= dict(type=float, nargs=len(f.default))
        elif f.default is not None:
            options["type"] = type(f.default)
        if f.name == "preset":
            options["choices"] = PRESETS
        section = f.metadata["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        groups[section].add_argument(flag(f.name), default=None, **options)


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
    batch = max(given.get("batch", preset.recipe.batch), 1)
    for part in ("group", "micro_batch"):
        if default := getattr(preset.recipe, part):
            given.setdefault(part, math.gcd(batch, default))
    return check_recipe(replace(preset.recipe, **given))


def check_recipe(recipe):
    """The recipe; UserError where a value, or two together, cannot be."""
    for f in fields(recipe):
        value, least = getattr(recipe, f.name), f.metadata["least"]
        if least is not None and value < least:
            raise UserError(f"{flag(f.name)} {value}: must be at least {least}")
    if recipe.rank < 0 or not 0 <= recipe.seed < 2**32 or not 0 < recipe.lr < 1:
        raise UserError("--rank from 0, --seed in 0 … 2^32-1, --lr between 0 and 1")
    for part in ("micro_batch", "group"):
        size = getattr(recipe, part)
        if size and recipe.batch % size:
            raise UserError(f"--batch {recipe.batch}: not a multiple of {flag(part)} {size}")
    if not 0 <= recipe.ema < 1 or not 0 <= recipe.caption_dropout <= 1:
        raise UserError("--ema from 0, below 1; --caption-dropout from 0 to 1")
    if recipe.from_scratch and (recipe.rank or recipe.lora):
        raise UserError("--from-scratch trains every weight: leave --rank and --lora away")
    return recipe


def run(main):
    """Run main(argv) and end the process with what `exit_code` says.

    It ends at once, without the interpreter's tear-down: XLA's threads may still be at work, and
    would crash in it.
    """
    guard_streams()
    watch_signals()
    # Transformers says at import that torch is missing, which is as intended.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    code = exit_code(main)
    for function in AT_END:
        with suppress(Exception):  # what ended this process may have ended others before
            function()
    leave(code)


def exit_code(main):
    """Call main(argv) -> exit code: 0 done, 2 the user's mistake, 1 not finite. A mistake is one
    line on stderr, as is what the file system refuses."""
    try:
        return main(sys.argv[1:]) or 0
    except SystemExit as error:  # of --help
        return error.code or 0
    except UserError as error:
        tell_error(error)
        return 2
    except OSError as error:
        tell_error(describe_with_file(error))
        return 2
    except FloatingPointError as error:
        tell_error(error)
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def leave(code):
    """End the process now."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # it may be at work in this very thread
            stream.flush()
    os._exit(code)


class Stop:
    """While it is entered, a signal only asks for a halt: `code` is then the exit code. At any
    other time, and the second time, it ends the process."""

    entered = None

    def __init__(self):
        self.code = None

    def __enter__(self):
        Stop.entered = self
        return self

    def __exit__(self, *_):
        Stop.entered = None

    def note(self, number):
        """Note a signal, and say what will happen; False if that was asked before."""
        if self.code is not None and number == signal.SIGINT:
            return False
        self.code = 128 + number
        print("\nstopping: the running micro-batch is the last; saving", file=sys.stderr)
        return True


def watch_signals():
    """SIGTERM, SIGHUP, Ctrl-C end the process with 128 + number, or ask the Stop that is entered.

    A thread waits for them, since a handler waits for what runs: minutes, when XLA compiles.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def handle(number, _):
        if Stop.entered is None:
            leave(128 + number)

    def watch():
        while True:
            number = os.read(reader, 1)[0]
            stop = Stop.entered  # read once: it is the other thread's to change
            if not (stop and stop.note(number)):
                leave(128 + number)

    for number in SIGNALS:
        signal.signal(number, handle)
    threading.Thread(target=watch, daemon=True).start()
