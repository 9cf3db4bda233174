"""Laws of what a run tells and where it lives: no character, reader, name or home ends it.

Each command is a process, as a user has it.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import train
from vcloze_jax.config import UserError
from vcloze_jax.inputs import cachefolder, recipeflags
from vcloze_jax.inputs.cachefolder import cache_folder
from vcloze_jax.inputs.runfolder import RunFolder
from vcloze_jax.storage import checkpoint

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(folder, line, **variables):
    """Run a line of bash in `folder`, where $P is Python and $S sample.py."""
    known = {"P": sys.executable, "S": str(ROOT / "sample.py"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=os.environ | known | variables,
        capture_output=True,
        timeout=60,
    )


# --- standard output and error ---


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, ASCII])
@pytest.mark.parametrize("line", ["$P $S --help", "$P $S --list-tasks", "$P -m ports --help"])
def test_any_character_is_printed(tmp_path, variables, line):
    """A terminal that knows only ASCII is told all the same."""
    done = shell(tmp_path, line, **variables, XDG_CACHE_HOME="/tmp/模型")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.isascii()


# sample.py for one name after the other, each in a process of its own, begun without imports.
EACH = """
import os, sys
import sample
from vcloze_jax.inputs import cli

for name in sys.argv[1:]:
    if not os.fork():
        sys.argv = ["sample.py", "--grid", name]
        cli.run(sample.main)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_mistake_is_one_line(tmp_path, encoding):
    """Whatever a file is called, its mistake is one line without control characters."""
    names = "模型.json", "a\nb.json", "a\x1b[31mb.json", "\u202egnp.json"
    for name in names:
        (tmp_path / name).write_text("{}")
    quoted = " ".join(f"'{name}'" for name in names)
    done = shell(tmp_path, f'$P -c "$EACH" {quoted}', EACH=EACH, PYTHONIOENCODING=encoding)
    *lines, rest = done.stderr.decode(encoding).split("\n")
    assert (done.returncode, rest, len(lines)) == (0, "", len(names)), done.stderr
    for line in lines:
        assert line.startswith("error: ") and line.isprintable()
        assert line.endswith(".json: image: missing; give rows of cells, the query last")


@pytest.mark.parametrize("ending", ["| true", "> /dev/full", ">&-", "2>&1 | true", ">&- 2>&- <&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_has_to_read(tmp_path, ending, unbuffered):
    """A reader that is gone, a disk that is full, a stream that is closed: the run ends as ever."""
    line = f"$P $S --list-tasks {ending}"
    done = shell(tmp_path, line, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_mistake_has_a_line_of_its_own(tmp_path):
    """A progress bar that stands on the line is left behind, not continued."""
    code = "import sys; from vcloze_jax.inputs.terminal import guard_streams, tell_error;"
    code += "guard_streams(); sys.stderr.write('50%'); tell_error('a'); tell_error('b')"
    assert shell(tmp_path, f'$P -c "{code}"').stderr == b"50%\nerror: a\nerror: b\n"


def test_closed_streams_are_nobodys_file(tmp_path):
    """What is printed where standard output was closed goes into no file that is opened later."""
    code = "from vcloze_jax.inputs.terminal import guard_streams; guard_streams()\n"
    code += "file = open('data', 'w'); print('x' * 9999); file.write('data')"
    shell(tmp_path, f'$P -c "{code}" >&- 2>&-')
    assert (tmp_path / "data").read_text() == "data"


# --- names of folders ---

NAMES = (
    *("fox [v2]", "[!a]", "a*b", "a?b", "a\\b", "gs:", "logs:", "a\udcffb"),  # not taken literally
    *(
        "{}",
        "{a,b}",
        "%d%s",
        "a%20b",
        "a b",
        " a ",
        "'",
        '"',
        "#",
        "&",
        ";",
        "a:b",
        "s3:",
        "$HOME",
        "~",
    ),
    *(
        "-a",
        "--out",
        "模型",
        "e\u0301",
        "a\nb",
        "\x1b[0m",
        "1",
        "1.tmp",
        "ocdbt.process_0",
        "n" * 250,
    ),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_is_a_name(tmp_path, name):
    """A run lives in a folder of any name, beside others that it might match as a pattern; or the
    name is refused before anything is done."""
    run, recipe = RunFolder(tmp_path / name), recipeflags.read_recipe(train.parse([]))
    state = {"a": jnp.arange(4.0), "b": jnp.float32(3)}
    try:
        run.compare(recipe)
    except UserError as error:
        assert "no checkpoint can be kept where the path holds" in str(error)
        assert not list(tmp_path.iterdir())
        return
    run.create()
    run.settle(recipe, {})
    for step in (1, 2, 3):
        checkpoint.save(run.checkpoints, step, state)
    step, restored = checkpoint.resume(run.checkpoints, state)
    assert step == 3 and np.array_equal(restored["a"], np.arange(4.0))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["2", "3"]
    assert [p.name for p in tmp_path.iterdir()] == [name]
    run.close()


# --- homes ---


@pytest.mark.parametrize("home", [None, "relative", ""])
@pytest.mark.parametrize("cache", [None, "relative", "~", "", "/absolute"])
def test_the_cache_is_never_here(monkeypatch, home, cache):
    """The cache lies where XDG says, if that is absolute; a process without a home makes none of
    its own in the working folder."""

    def nobody(_):
        raise KeyError("no entry")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name, value in (("HOME", home), ("XDG_CACHE_HOME", cache)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    folder = cache_folder()
    assert cache_folder() == folder
    assert folder.is_absolute() and "relative" not in folder.parts and "~" not in folder.parts
    assert (folder == Path("/absolute/vcloze_jax")) == (cache == "/absolute")
    monkeypatch.setenv("HOME", "/home/fox")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/fox/.cache/vcloze_jax")


@pytest.mark.parametrize("trap", ["a link", "open to all", "a file"])
def test_a_cache_that_others_may_have_filled_is_passed_over(monkeypatch, tmp_path, trap):
    """The name of a temporary cache can be foreseen: what lies there counts only if it is a folder
    of ours that nobody else can write."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cachefolder.temporary_cache.cache_clear()
    foreseen = cachefolder.temporary_cache()
    assert foreseen.parent == tmp_path and foreseen.stat().st_mode & 0o77 == 0
    foreseen.rmdir()
    (tmp_path / "theirs").mkdir()
    if trap == "a link":
        foreseen.symlink_to(tmp_path / "theirs")
    elif trap == "a file":
        foreseen.write_bytes(b"")
    else:
        foreseen.mkdir()
        foreseen.chmod(0o777)
    cachefolder.temporary_cache.cache_clear()
    assert cachefolder.temporary_cache() not in (foreseen, tmp_path / "theirs")
    cachefolder.temporary_cache.cache_clear()
