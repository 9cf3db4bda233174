"""Laws of the cache: it gives what would be computed now, and never stands in the way."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vcloze_jax.data import graphemoji
from vcloze_jax.data.graphemoji import derive_nodes, read_nodes, read_subjects
from vcloze_jax.inputs.cachefolder import keep_array

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arrays(monkeypatch, tmp_path):
    """The folder of kept arrays, and a function that counts how often it makes one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(*values):
        made.append(values)
        return np.array(values)

    return tmp_path / "vcloze_jax/arrays", make, made


def test_an_array_is_made_once(arrays):
    """It is made where there is none of its key, then read; nobody can write into it, and the file
    of an older key is gone."""
    folder, make, made = arrays
    for _ in range(2):
        kept = keep_array("x", "1", partial(make, 1, 2))
        assert kept.tolist() == [1, 2]
    assert made == [(1, 2)] and not kept.flags.writeable
    assert keep_array("x", "2", partial(make, 3)).tolist() == [3]
    assert keep_array("y", "1", partial(make, 4)).tolist() == [4]
    assert {file.name for file in folder.iterdir()} == {"x-2.npy", "y-1.npy"}


def test_a_file_that_is_no_array_is_made_again(arrays):
    """Whatever lies under the name, torn or strange, is replaced."""
    folder, make, made = arrays
    folder.mkdir(parents=True)
    whole = folder / "x-1.npy"
    for content in (b"", b"fox", None):
        whole.write_bytes(whole.read_bytes()[:-1] if content is None else content)
        assert keep_array("x", "1", partial(make, 1)).tolist() == [1]
    assert len(made) == 3 and keep_array("x", "1", make).tolist() == [1]


def test_a_disk_that_does_not_take_it(arrays):
    """Then the array is made each time, and nothing is said or left behind."""
    folder, make, made = arrays
    folder.parent.mkdir()
    folder.write_text("not a folder")
    for _ in range(2):
        assert keep_array("x", "1", partial(make, 1)).tolist() == [1]
    assert len(made) == 2 and folder.read_text() == "not a folder"


def test_nodes_are_those_that_are_derived(monkeypatch, tmp_path):
    """GraphEmoji out of the cache is what deriving it gives; its key changes with the code."""
    names, nodes = read_nodes("held_out")
    subjects = read_subjects("held_out")
    assert names == subjects.names and np.array_equal(nodes, derive_nodes(subjects))
    key, changed = graphemoji.digest_derivation(), tmp_path / "conditions.py"
    changed.write_bytes(Path(graphemoji.conditions.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(graphemoji.conditions, "__file__", str(changed))
    assert graphemoji.digest_derivation() != key


def test_small_programs_are_kept(tmp_path):
    """A command keeps also what compiles in an instant: mini is made of such."""
    code = (
        "from vcloze_jax.inputs import cli\n"
        "def main(argv):\n"
        "    import jax\n"
        "    print(jax.jit(lambda x: x + 1)(1))\n"
        "cli.run(main)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert any((tmp_path / "vcloze_jax/programs").iterdir())
