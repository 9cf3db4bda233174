"""The law of the house: a story that is read, and wings that serve it, each with its own law.

the story   train.py, sample.py and the files of STORY: what must be read
kernels     compute what model/ops has as a formula, and know nothing else
optimizers  make an update of a gradient, and know paths and shapes alone
model/      knows no file and no flag           inputs/     knows no JAX
data/       knows no model                      storage/    alone knows ports and orbax
ports/      knows neither JAX nor us       study/      nobody knows it
"""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from vcloze_jax.config import Recipe

ROOT = Path(__file__).parents[1]
ENTRIES = ("train", "sample")
STORY = tuple(
    f"vcloze_jax.{name}"
    for name in (
        "config placement grid flow conditioning sharding painter step trainer "
        "model.ops model.layers model.mmdit model.vae model.text"
    ).split()
)
PORTS = "vcloze_jax.ports"  # where a link is to them
LONGEST_STORY = 2400  # lines
LONGEST_FILE = 320
SAME = {"main", "parse", "load", "save", "check"}  # the same done to different things


@cache
def modules():
    """{dotted name: file} of all our modules, but packages that are empty, and links."""
    files = [*ROOT.glob("vcloze_jax/**/*.py"), *ROOT.glob("ports/**/*.py"), *ROOT.glob("*.py")]
    files = [file for file in files if not file.is_symlink()]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    names = {re.sub(r"^ports\b", PORTS, name): file for name, file in names.items()}
    return {name: file for name, file in names.items() if file.stat().st_size}


@cache
def imports(name):
    """All that a module imports anywhere, functions included: dotted names, as deep as they are
    modules of ours."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if n in modules() else node.module for n in inside}
    return found


def within(*rooms):
    """Names of the modules in some packages, or of those modules themselves."""
    return [n for n in modules() if any(n == room or n.startswith(f"{room}.") for room in rooms)]


def importers(*tops):
    """Names of the modules that import one of some packages, or anything in it."""
    knows = lambda n: {i for i in imports(n) for t in tops if i == t or i.startswith(f"{t}.")}  # noqa: E731
    return {name for name in modules() if knows(name)}


def ours(name):
    """What a module imports of ours; the package itself, which holds a version, left out."""
    tops = {"vcloze_jax", *ENTRIES}
    return {i for i in imports(name) if i.partition(".")[0] in tops} - {"vcloze_jax"}


def test_the_story_is_short():
    """What must be read is at most 2,400 lines."""
    lines = {name: len(modules()[name].read_text().splitlines()) for name in (*ENTRIES, *STORY)}
    assert sum(lines.values()) <= LONGEST_STORY, lines


@pytest.mark.parametrize("name", STORY)
def test_the_story_is_closed(name):
    """It imports only itself: models, batches and readers are handed to it. Kernels are looked up
    by name, where there is a use for them."""
    assert ours(name) <= set(STORY)


def test_models_know_no_file_and_no_flag():
    """What is in model/ computes: it reads no file, no argument and no environment."""
    outside = {"argparse", "io", "json", "os", "pathlib", "safetensors", "sys", "transformers"}
    assert set(within("vcloze_jax.model")).isdisjoint(importers(*outside))
    for name in within("vcloze_jax.model"):
        assert "open(" not in modules()[name].read_text(), name


def test_kernels_know_the_formula_alone():
    """A kernel for an accelerator stands for ops.attention: it needs no room beside it."""
    assert ours("vcloze_jax.kernels") <= {"vcloze_jax.model.ops", "vcloze_jax.sharding"}


def test_optimizers_know_paths_alone():
    """Whose a weight is its path says: they need no room beside them, and the story is handed one
    of them."""
    assert not ours("vcloze_jax.optimizers")


def test_data_knows_no_model():
    """Grids are drawn without JAX and without anything that is made of it."""
    models = "vcloze_jax.model", "vcloze_jax.conditioning", "vcloze_jax.painter"
    others = "vcloze_jax.trainer", "vcloze_jax.storage", "jax", "flax"
    assert set(within("vcloze_jax.data")).isdisjoint(importers(*models, *others))


def test_nobody_knows_the_study():
    """It looks at all of the house, and nothing in the house needs it."""
    assert importers("vcloze_jax.study") <= set(within("vcloze_jax.study"))


def test_storage_alone_knows_ports_and_orbax():
    """Names of foreign tensors and files of checkpoints are storage's affair."""
    knowing = importers(PORTS, "orbax") - set(within(PORTS))
    assert knowing <= set(within("vcloze_jax.storage"))


def test_ports_stand_alone():
    """Weight tables and their engine are NumPy; only their command knows the rest."""
    alone = set(within(PORTS)) - {f"{PORTS}.__main__"}
    assert alone.isdisjoint(importers("jax", "jaxlib", "flax"))
    for name in alone:
        assert ours(name) <= set(within(PORTS)) | {PORTS}, name


def test_what_is_installed_has_our_name():
    """All of it lies in one package: where ports/, sample.py and train.py are not, links are; and
    nobody imports ports by the name that only the repository knows."""
    for name in ("ports", "sample.py", "train.py"):
        assert (ROOT / "vcloze_jax" / name).resolve() == ROOT / name
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {name.partition(".")[0] for name in settings["packages"]} == {"vcloze_jax"}
    assert not importers("ports")


def test_docs_say_what_can_be_done():
    """Every extra that a text has installed is there, and every mesh of the README's trainings
    divides its groups, which have a grid at least for each device."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*.py"), ROOT / ".ci/run"]
    texts = [*dict.fromkeys([*texts, *modules().values()])]
    named = [re.findall(r"(?:\.|vcloze-jax)\[([\w,-]+)\]['\"]", x.read_text()) for x in texts]
    named = {extra for found in named for some in found for extra in some.split(",")}
    assert {"test", "tpu-aot"} <= named <= extras.keys()
    lines = [ROOT / "README.md", ROOT / "vcloze_jax/hosts.py"]
    lines = "\n".join(file.read_text() for file in lines).splitlines()
    meshes = 0
    for line in lines:
        if mesh := re.search(r"train\.py .*--mesh (\d+)", line):
            group = re.search(r"--group (\d+)", line)
            assert (int(group[1]) if group else Recipe.group) % int(mesh[1]) == 0, line
            meshes += 1
    assert meshes >= 4


def test_inputs_need_no_jax(tmp_path):
    """What reads flags, specs and pictures, and data, imports where JAX cannot be, so that a
    mistake is told before seconds of start-up; train.py refuses a flag there."""
    (tmp_path / "jax.py").write_text("raise ImportError('jax is poisoned')\n")
    names = [*within("vcloze_jax.inputs", "vcloze_jax.data"), *ENTRIES]
    lines = [f"import {name}" for name in names]
    lines += ["from vcloze_jax.config import UserError", "try: train.main(['--steps', '0'])"]
    lines += ["except UserError as error: print(error)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "--steps 0: must be at least 1\n"


def test_rooms_and_doors_are_small():
    """No file has more than 320 lines, no function more than six positional arguments."""
    for name, file in modules().items():
        text = file.read_text()
        assert len(text.splitlines()) <= LONGEST_FILE, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in node.args.posonlyargs + node.args.args]
                count = len(set(names) - {"self", "cls"})
                assert count <= 6, f"{name}: {node.name} takes {count}"


def test_names_are_found_once():
    """A search for a public function or class leads to one room."""
    homes = {}
    for name, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(name)
    twice = {name: rooms for name, rooms in homes.items() if len(rooms) > 1}
    assert set(twice) <= SAME, twice


TOOLS = [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]


@pytest.mark.parametrize("file", TOOLS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_tools_import_what_there_is(file):
    """Scripts and benchmarks, which no other test may run, name nothing of ours that is gone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in modules():
            there = set(vars(importlib.import_module(node.module)))
            there |= {n.rpartition(".")[2] for n in within(node.module)}
            assert {alias.name for alias in node.names} <= there, node.module
