"""What is raised by others reaches the user as one line with a remedy that is true."""

import errno
import os

import folders
import pytest

from vcloze_jax.inputs import cli
from vcloze_jax.inputs.checks import describe_error, describe_with_file
from vcloze_jax.ports import shards
from vcloze_jax.storage import weights

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.png")


def test_a_foreign_message_is_one_line():
    """Whatever an exception says becomes one line of a bounded length; one that says nothing, its
    kind."""
    assert describe_error(ValueError("\n\n  a\n  b\tc\n")) == "a b c"
    assert describe_error(KeyError()) == "KeyError"
    assert len(describe_error(RuntimeError("tensorstore " * 500))) < 400


def test_the_file_system_has_remedies():
    """What the file system refuses names what helps, alone or within a library's own message, and
    the file that it knows."""
    full = "No space left on device (free some space)"
    assert describe_error(FULL) == full
    assert describe_with_file(FULL, "other") == f"out/a.png: {full}"
    wrapped = ValueError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]\nat x")
    assert describe_with_file(wrapped, "runs/fox") == f"runs/fox: {full}"
    assert describe_with_file(wrapped) == full


def test_no_traceback_of_the_file_system(monkeypatch, capsys):
    """An OSError that nobody expected ends a command as the user's mistakes do: a line, code 2."""

    def main(argv):
        raise FULL

    monkeypatch.setattr(cli.sys, "argv", ["sample.py"])
    assert cli.exit_code(main) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: out/a.png: No space left on device (") and error.count("\n") == 1
    )


@pytest.mark.parametrize("layout", ["saved", "bfl"])
def test_a_file_that_may_not_be_read_is_not_broken(request, layout, tmp_path, monkeypatch):
    """Weights that are another user's are not called damaged."""
    folder = folders.copy(request.getfixturevalue(layout), tmp_path)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shards, "describe_start", refuse)
    message = folders.refusal(folder, weights.checked_preset)
    assert "Permission denied" in message and "not a whole" not in message
    assert ".safetensors" in message
