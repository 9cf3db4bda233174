"""The house: which room may know which, how long a file may be, and who needs no JAX."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from strictly lower floors. config.py lies below all, for its UserError.
FLOORS = {
    "vcloze_jax": -2,  # __init__.py: imports nothing of ours before it is asked to
    "vcloze_jax.config": -1,
    "vcloze_jax.grid": 0,
    "vcloze_jax.prompts": 0,
    "vcloze_jax.inputs.pictures": 0,
    "vcloze_jax.inputs.checks": 0,
    "vcloze_jax.storage.textreader": 0,
    "vcloze_jax.programs": 0,
    "vcloze_jax.upsample": 0.5,
    "vcloze_jax.inputs.cli": 0,
    "vcloze_jax.inputs.spec": 1,
    "vcloze_jax.inputs.runfolder": 1,
    "vcloze_jax.model.ops": 1,
    "vcloze_jax.flow": 1,
    "vcloze_jax.sharding": 1,
    "vcloze_jax.model.layers": 2,
    "vcloze_jax.model.mmdit": 3,
    "vcloze_jax.model.vae": 3,
    "vcloze_jax.model.text": 3,
    "vcloze_jax.model.lora": 3,
    "vcloze_jax.conditioning": 4,
    "vcloze_jax.data.jsonlines": 1.5,
    "vcloze_jax.data.graph": 4.1,
    "vcloze_jax.data.graphemoji": 4.2,
    "vcloze_jax.data.conditions": 4.3,
    "vcloze_jax.data.loader": 4.4,
    "vcloze_jax.storage.preset": 4.5,
    "vcloze_jax.storage.weights": 5,
    "vcloze_jax.storage.adapters": 5.1,
    "vcloze_jax.storage.checkpoint": 5,
    "vcloze_jax.painter": 5.2,
    "vcloze_jax.pipeline": 5.3,
    "vcloze_jax.plan": 5.3,
    "vcloze_jax.trainer": 5,
    "vcloze_jax.evaluate": 6,
    "vcloze_jax.run": 6,
    "ports.rows": 0,
    "ports.flux": 1,
    "ports.vae": 1,
    "ports.text": 1,
    "ports.pipeline": 2,
    "ports.read": 3,
    "ports.folder": 4,
    "ports.namings": 3.1,
    "ports.torchfile": 3.1,
    "ports.lora": 3.2,
    "ports.exchange": 3.3,
    "ports.__main__": 6,
    "train": 7,
    "sample": 7,
}
JAX_FREE = (
    "config",
    "grid",
    "prompts",
    "images",
    "checks",
    "upsample",
    "cli",
    "spec",
    "runfolder",
    "data.jsonlines",
)


def modules():
    """{dotted name: file} of all our modules but the packages themselves."""
    files = [*ROOT.glob("vcloze_jax/**/*.py"), *ROOT.glob("ports/*.py"), *ROOT.glob("*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name: file for name, file in names.items() if not name.endswith("__init__")}


def imported(file):
    """Dotted names that a file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FLOORS else node.module for name in inside)


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name):
    """A module imports only from strictly lower floors."""
    for other in imported(modules()[name]):
        if other.partition(".")[0] in ("vcloze_jax", "ports", "train", "sample"):
            assert FLOORS[other] < FLOORS[name], f"{name} imports {other}"


def test_ports_stand_alone():
    """ports/ knows neither JAX nor vcloze_jax, but for its command; of the package only configs.py,
    weights.py and adapters.py know ports."""
    knowing = [f"vcloze_jax.{name}" for name in ("configs", "weights", "adapters")]
    for name, file in modules().items():
        tops = {other.partition(".")[0] for other in imported(file)}
        if name.startswith("ports.") and name != "ports.__main__":
            assert tops.isdisjoint({"jax", "jaxlib", "flax", "vcloze_jax"}), name
        elif name not in (*knowing, "ports.__main__"):
            assert "ports" not in tops, name


def test_files_are_short():
    """No file of the package, of ports or beside them has more than 320 lines."""
    lines = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert max(lines.values()) <= 320, max(lines, key=lines.get)


def test_inputs_are_validated_without_jax(tmp_path):
    """What reads specs, pictures and flags imports where JAX cannot be, so that the user's mistakes
    are told before seconds of start-up; train.py refuses a flag there."""
    (tmp_path / "jax.py").write_text("raise ImportError('jax is poisoned')\n")
    commands = [name for name in ("train", "sample") if (ROOT / f"{name}.py").exists()]
    lines = [f"import vcloze_jax.{name}" for name in JAX_FREE]
    lines += [f"import {name}" for name in commands]
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
