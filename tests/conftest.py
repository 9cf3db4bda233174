"""Eight virtual CPU devices, set before any test touches JAX, and programs made fast, once for all.

XLA makes each program unoptimised, in a fifth of the time: most of them run once, at tiny sizes.
"""

import gc
import os
import sys
import tempfile
from contextlib import suppress

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
CACHE = os.path.join(tempfile.gettempdir(), "vcloze_jax_test_cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # of commands, too, whose programs are ours only then
os.environ["XDG_CACHE_HOME"] = CACHE  # of text embeddings: the tests' own
FAST = "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"

import pytest  # noqa: E402

from vcloze_jax.config import UserError  # noqa: E402
from vcloze_jax.devices import check_xla_flags, ready_xla  # noqa: E402
from vcloze_jax.inputs import cli  # noqa: E402


def known_flags():
    """All of FAST, or what this jaxlib knows of it; another flag would end every process."""
    for flags in (" ".join(FAST), *FAST):
        with suppress(UserError):
            check_xla_flags(flags)
            return flags
    return ""


if "XLA_FLAGS" not in os.environ:  # workers and commands that are started from here have it
    os.environ["XLA_FLAGS"] = known_flags()
ready_xla(8)  # now, so that test processes of any mesh share their compiled programs

# The files that take longest begin, so that no core works alone at the end.
LONGEST = "run mesh_step plan stopping parity_training sample painter lora mmdit".split()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    """What was imported stays, and a trace makes millions of small objects: to walk them all again
    and again, as Python does by itself, takes a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Tiny random models in diffusers' layout, float32 (tests/folders.py); not to be changed."""
    import folders

    folder = tmp_path_factory.mktemp("diffusers")
    folders.save(folder)
    return folder


@pytest.fixture(scope="session")
def bfl(saved, tmp_path_factory):
    """The same models with BFL's single files; not to be changed."""
    import folders

    folder = tmp_path_factory.mktemp("bfl")
    folders.save_bfl(saved, folder)
    return folder


@pytest.fixture(scope="session")
def adapter_tree():
    """A random adapter of the tiny transformer (tests/lorafiles.py); not to be changed."""
    import lorafiles

    return lorafiles.adapter()


@pytest.fixture
def adapter_file(adapter_tree, tmp_path):
    """The same as training writes it: the test's own."""
    import lorafiles

    return lorafiles.written(tmp_path, adapter_tree)


@pytest.fixture
def call(monkeypatch, capsys):
    """Answer a command as cli.run does: exit code, stdout and stderr. JAX cannot be imported."""

    def call(main, argv, jax=False):
        with monkeypatch.context() as patch:
            if not jax:
                patch.setitem(sys.modules, "jax", None)
            patch.setattr(sys, "argv", ["command", *argv.split()])
            code = cli.exit_code(main)
        return code, *capsys.readouterr()

    return call
