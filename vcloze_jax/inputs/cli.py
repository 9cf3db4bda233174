"""What the commands share: flags, one-line errors and exit codes."""

import argparse
import gc
import os
import re
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from vcloze_jax.config import PRESETS, UserError
from vcloze_jax.inputs.cachefolder import cache_folder
from vcloze_jax.inputs.checks import DASHES, describe_error, describe_with_file
from vcloze_jax.inputs.signals import leave, watch_signals
from vcloze_jax.inputs.terminal import guard_streams, tell_error
from vcloze_jax.storage.places import (
    MINI_FOLDER,
    download_weights,
    file_and_scale,
    find_weights,
    named_preset,
)

DOWNLOAD = "fetch --weights OWNER/NAME from Hugging Face, where it is not in its cache"
# Variables of libraries that change where and how fast they compute, and what they tell, and that
# never make them fail.
HARMLESS = re.compile(
    "TQDM_(DISABLE|ASCII|NCOLS|DYNAMIC_NCOLS|POSITION|COLOUR)|JAX_(PLATFORMS|PLATFORM_NAME|"
    "NUM_CPU_DEVICES|NUM_PROCESSES|PROCESS_ID|LOCAL_DEVICE_IDS|ENABLE_X64|DEFAULT_MATMUL_PRECISION|"
    "TRACEBACK_FILTERING|ENABLE_COMPILATION_CACHE|COMPILATION_CACHE_DIR|THREEFRY_PARTITIONABLE|"
    "PERSISTENT_CACHE_.*|COORDINATOR_.*|CPU_.*|LOG.*|.*VISIBLE_DEVICES)"
)
UNSET = "", "0", "false", "no", "off"  # as JAX reads a switch
AT_END = []  # functions to call before the process ends by itself


class Once(argparse.Action):
    """Keeps the value of a flag: what is given again would silently take the first one's place."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self in parser.given:
            raise UserError(f"{option_string}: given twice; keep one")
        parser.given.add(self)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as help and turns a wrong flag into a UserError; a flag of one
    value is given once."""

    def __init__(self, description, prog=None):
        form = argparse.RawDescriptionHelpFormatter
        epilog = (
            f"Compiled programs, texts and derived pictures are kept in {cache_folder()}\n"
            "(XDG_CACHE_HOME moves it); all of it may be deleted at any time."
        )
        super().__init__(prog, None, description, epilog, formatter_class=form, allow_abbrev=False)
        self.register("action", None, Once)  # what an argument without an action does
        self.given = set()

    def error(self, message):
        if DASHES.search(message):
            message += "; a dash was typed as another sign, write -- anew"
        raise UserError(f"{message}; --help lists the flags")

    def parse_args(self, argv):
        """The flags, --weights as a folder on this machine, or with --download as it was given
        where it is not here yet: `fetch_weights` comes after all that can be checked without."""
        args = super().parse_args(argv)
        if getattr(args, "weights", None):
            args.asked, args.weights = args.weights, find_weights(args.weights, args.download)
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
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def word(text, what="text"):
    """A text as a type of argparse; an empty one is what a variable leaves that is not set."""
    if not text:
        raise argparse.ArgumentTypeError(f"an empty {what}; is a variable not set?")
    return text


def expand(text):
    """A path as a type of argparse: ~ is the home also in --out=~/x, which no shell expands."""
    return os.path.expanduser(word(text, "path"))


def path(text):
    """`expand` as a Path."""
    return Path(expand(text))


def byte_count(text):
    """'24GiB' or '80GB' -> bytes, as a type of argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(i?)B", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 24GiB, or 80GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1))


def add_plan_flags(parser, presets=()):
    """The flags that plan, also for devices and for the weights of presets that are not here."""
    add = parser.add_argument
    add("--plan", action="store_true", help="print tokens, FLOPs and bytes, and exit")
    device = "--plan for accelerators of that memory, as 24GiB, which need not be here"
    add("--device", type=byte_count, metavar="SIZE", help=device)
    if presets:
        add("--preset", choices=presets, help="--plan or --list-tasks for it, without weights")


def check_plan_flags(args):
    """Raise UserError for a --device where nothing is planned, and what is planned by none."""
    if args.device and not args.plan:
        raise UserError("--device: is of --plan; add that, or leave it away")
    if getattr(args, "list_tasks", False) and args.grid:
        raise UserError("--grid: nothing is painted where tasks are listed; leave either away")
    if args.plan and getattr(args, "dial", False):
        raise UserError("--dial: is not planned, it paints each grid several times; leave it away")


def read_preset(args):
    """The preset of --weights, or that of --preset. Raises UserError where both are given, or a
    preset is to do more than to plan or to list its tasks, or to do that with an adapter."""
    if args.preset is None:
        return named_preset(args.weights or MINI_FOLDER)
    if args.weights or not (args.plan or args.list_tasks):
        remedy = "it is for --plan and --list-tasks; weights say theirs themselves"
        raise UserError(f"--preset {args.preset}: {remedy}")
    if args.lora:
        raise UserError("--lora: a preset is planned without adapters; leave it away")
    return PRESETS[args.preset]


def fetch_weights(args):
    """The folder of --weights, or None where none are named; with --download all of its files are
    fetched now. Raises UserError, also where what is fetched is of another preset than the one that
    was taken for it before."""
    if args.download and not args.weights:
        raise UserError("--download: is of --weights; name those, or leave it away")
    if not args.download:
        return args.weights
    folder = download_weights(args.asked)
    if named_preset(folder) != named_preset(args.weights):
        raise UserError(f"{folder}: is here now; give the same command again, without --download")
    return folder


def add_model_flags(parser, read_adapter=file_and_scale):
    """The flags that say what to paint with, and where; `read_adapter` is told what --lora says."""
    add = parser.add_argument
    default = "folder in diffusers' layout, or an id of Hugging Face (default: mini, adapted)"
    add("--weights", type=expand, metavar="DIR", help=default)
    add("--download", action="store_true", help=DOWNLOAD)
    add(
        "--lora",
        action="append",
        type=lambda text: read_adapter(expand(text)),
        metavar="FILE[:SCALE]" if read_adapter is file_and_scale else "[NAME=]FILE[:SCALE]",
        help="adapter to fold in, repeatable; on mini it replaces mini's own",
    )
    devices = "8, or data=2,fsdp=2,tensor=2 (default: all accelerators, or one CPU)"
    add("--mesh", type=word, help=devices)


def run(main, huge_pages=False):
    """Run main(argv), on `huge_pages` of memory where that pays, and end the process with what
    `exit_code` says.

    It ends at once, without the interpreter's tear-down: XLA's threads may still be at work, and
    would crash in it.
    """
    if huge_pages:
        use_huge_pages()
    guard_streams()
    watch_signals()
    # Transformers says at import that torch is missing, which is as intended.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Compiled programs are kept, also those of less than a second: mini's are many.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Tracing makes millions of small objects that live: to look through them for garbage, as often
    # as Python would, is a tenth of a start.
    gc.set_threshold(20_000, 20, 20)
    code = exit_code(main)
    for function in AT_END:
        with suppress(Exception):  # what ended this process may have ended others before
            function()
    leave(code)


def use_huge_pages():
    """Start this process anew with a C library (glibc 2.35 or later) that asks Linux for huge
    pages: it is told so by its environment only, unless that holds settings of it already.

    At each call of a program XLA takes memory from it for what is between, and gives it back; of
    small pages a step of mini's touches ninety thousand anew, which takes a third of its time.
    """
    words = sys.orig_argv[1:]
    if (
        sys.platform == "linux"
        and "GLIBC_TUNABLES" not in os.environ
        and words[:1] not in ([], ["-"])
    ):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        with suppress(OSError):  # then pages are small
            os.execv(sys.executable, [sys.executable, *words])


def run_command():
    """`run` of the module that a console command is named after: vcloze-sample, vcloze-train …"""
    name = Path(sys.argv[0]).stem.removeprefix("vcloze-")
    run(import_module(f"vcloze_jax.{name}").main, huge_pages=name == "train")


def name_command(name):
    """The words that call another command as this one was called: python sample.py, or
    vcloze-sample."""
    called = Path(sys.argv[0])
    if called.stem.startswith("vcloze-"):
        return [f"vcloze-{name}"]
    return ["python", str(called.with_name(f"{name}.py"))]


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
    except Exception as error:
        if said := describe_variable(error) or describe_odd_variables(error):
            tell_error(said)
            return 2
        traceback.print_exc()
        return 1


def describe_variable(error):
    """Which variable of the environment JAX cannot read, where an error is that; "" of others."""
    refused = r"""Invalid value "(?P<value>.*)" for JAX flag (?P<name>\w+)"""
    refused += r"""|invalid truth value '(?P<truth>.*)' for environment '(?P<switch>\w+)'"""
    if not isinstance(error, ValueError) or not (found := re.match(refused, str(error))):
        return ""
    name, value = found["name"] or found["switch"], found["value"] or found["truth"] or ""
    return f"{name.upper()}={value}: a variable of the environment that JAX cannot read; unset it"


def describe_odd_variables(error):
    """What JAX or tqdm was told by the environment that may be why it raises what nobody expects,
    as JAX_NO_EXECUTION or JAX_REMAT3 make it; "" where they were told nothing of that kind."""
    odd = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("JAX_", "TQDM_"))}
    odd = [
        f"{k}={v}" for k, v in odd.items() if not HARMLESS.fullmatch(k) and v.lower() not in UNSET
    ]
    told = " and ".join(odd)
    reason = f"{type(error).__name__}: {describe_error(error)}"
    return (
        told and f"{told}: a variable of the environment may be why this fails; unset it ({reason})"
    )
