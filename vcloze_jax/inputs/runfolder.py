"""A run's folder: what the run is, who writes it, and its metrics. Knows no JAX."""

import fcntl
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from vcloze_jax.config import PRESETS, Recipe, UserError
from vcloze_jax.inputs.checks import check_type, parse_json
from vcloze_jax.inputs.cluster import count_processes
from vcloze_jax.inputs.pictures import (
    check_no_address,
    check_writable,
    describe_error,
    save_text,
)

FREE = tuple(f.name for f in fields(Recipe) if f.metadata["free"])
OLDEST = {"preset", "data", "seed", "steps"}  # entries that every run has written
# What the library that writes checkpoints takes for a pattern, a separator or a cloud's address, or
# cannot spell at all.
NOT_LITERAL = re.compile(r"[*?\[\\\ud800-\udfff]|^/(gs|s3|az|hf)/|(gs|s3|az|hf):/")
LONGEST = "/".join(["checkpoints" * 9] * 2)  # as long as a path inside a run can be
ORIGINS = ("weights", "lora", "data", "dtype")  # known by their content, wherever it lies


class RunFolder:
    """What a run writes, and where.

    `config` holds the recipe, and under "origins" digests of what it learns from, the compute dtype
    and the versions that ran it last. Where several processes are one run, one of them `writes`; as
    long as it is not known which one, none. What only plans `begins` no run, and is compared with
    none.
    """

    def __init__(self, path, begins=True):
        self.path, absolute = Path(path), Path(path).absolute()  # "." has no name
        self.sheet = absolute.with_name(f"{absolute.name}-check.png")  # of --check, beside it
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.jsonl"
        self.validation, self.curves = self.path / "validation.jsonl", self.path / "losses.png"
        self.checkpoints, self.previews = self.path / "checkpoints", self.path / "previews"
        self.question = self.path / "question.json"
        self.held, self.writes, self.begins = None, count_processes() == 1, begins

    def compare(self, recipe):
        """Raise UserError if this cannot be a run's folder, or is of another run, naming what
        differs; what `ORIGINS` names is compared by content, in `compare_origins`."""
        check_no_address(self.path)
        if not (self.begins and self.writes):
            return
        if found := NOT_LITERAL.search(str(self.checkpoints.absolute())):
            raise UserError(
                f"--out {self.path}: no checkpoint can be kept where the path holds {found[0]!r}; "
                "choose another folder"
            )
        begun = os.path.exists(self.config)
        if not begun and os.path.exists(self.path):
            if not self.path.is_dir() or any(self.find_foreign(recipe.cache)):
                raise UserError(
                    f"{self.path}: not a run of train.py, and not empty; choose another --out"
                )
        check_writable(self.path, LONGEST)
        if not begun:
            return
        old, new = read_identity(self.config), asdict(recipe)
        for key in new:
            if key not in (*FREE, *ORIGINS) and old[key] != new[key]:
                raise UserError(
                    f"{self.config}: {key} is {old[key]!r}, this command says {new[key]!r}; "
                    "use the same flags or another --out"
                )
        if old["steps"] > new["steps"]:
            raise UserError(
                f"{self.config}: steps is {old['steps']}, and can only grow; raise --steps"
            )

    def find_foreign(self, cache):
        """Files that no run has put here. What is hidden is of the system's, as macOS's .DS_Store;
        a run that was refused before it began leaves empty folders, and its `cache`."""
        cache = Path(cache).resolve() if cache else None
        for folder, below, files in os.walk(self.path):
            shown = (name for name in below if not name.startswith("."))
            below[:] = (name for name in shown if Path(folder, name).resolve() != cache)
            yield from (name for name in files if not name.startswith("."))

    def compare_origins(self, recipe, origins, accepted):
        """Raise UserError where the run was begun with something else than `origins`, {name: digest
        or dtype}, by name, unless that name is among the `accepted`."""
        if not (self.begins and self.config.exists()):
            return
        old = read_identity(self.config)
        for key in ORIGINS:
            before = old["origins"].get(key, origins.get(key))
            if before != origins.get(key) and key not in accepted:
                was = describe_origin(old.get(key), before)
                now = describe_origin(asdict(recipe).get(key), origins.get(key))
                raise UserError(
                    f"{self.config}: {key} was {was}, and is {now}; bring back what it was, choose "
                    f"another --out, or go on all the same with --accept {key}"
                )

    def create(self):
        """Make the folder, and be who writes it. Raises UserError."""
        if not self.writes:
            return
        try:
            self.previews.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror}; choose another folder") from None
        self.lock()

    def settle(self, recipe, origins):
        """Write what the run is; of one that goes on the free settings follow this command, and the
        rate is told if it does. Nothing can be refused from here on. Raises UserError."""
        if self.writes:
            before = read_identity(self.config)["lr"] if self.config.exists() else recipe.lr
            if before != recipe.lr:
                print(f"{self.path}: goes on with --lr {recipe.lr:g}, after {before:g}")
            entries = asdict(recipe) | {"origins": origins}
            save_text(self.config, json.dumps(entries, indent=1) + "\n")

    def lock(self):
        """Be the only process that writes this run, until `close` or the process's end, however
        that comes. Raises UserError."""
        if self.writes and self.path.is_dir() and self.held is None:
            try:
                self.held = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
                fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise UserError(
                    f"--out {self.path}: another train.py writes this run; stop it first, or "
                    "choose another folder"
                ) from None
            except OSError as error:
                self.close()
                reason = f"cannot be locked: {describe_error(error)}"
                raise UserError(f"--out {self.path}: {reason}; choose another folder") from None

    def close(self):
        """Let others write this run."""
        if self.held is not None:
            os.close(self.held)
            self.held = None


def describe_origin(name, content):
    """What a run learns from, in words: what it holds counts, not where it lies."""
    if not content:
        return "none"
    return f"{name} of digest {content}" if name else content


def read_identity(file):
    """What a run was begun with, {field of Recipe: value} and its "origins"; what an older version
    did not write has the preset's default. Raises UserError."""
    try:
        entries = parse_json(file.read_bytes())
        if missing := OLDEST - entries.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        known = asdict(PRESETS[entries["preset"]].recipe) | {"origins": {}}
        if unknown := entries.keys() - known:
            raise ValueError(f"{', '.join(sorted(unknown))} is of a newer version")
        entries |= {key: tuple(x) for key, x in entries.items() if isinstance(x, list)}
        origins = check_type(entries.get("origins", {}), dict)
        return known | entries | {"steps": int(entries["steps"]), "origins": origins}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{file}: not a run's settings ({error}); move the folder away") from None


class Log:
    """A JSON-lines file with one object a step, each once: what lies past step `start` is cut, and
    a torn line. JSON has no number that is not finite: null stands for it, in a step that was
    skipped."""

    def __init__(self, path, start):
        self.path, kept = path, []
        for line in path.read_text().splitlines() if start and path.exists() else []:
            with suppress(ValueError, TypeError, KeyError):
                kept += [line] if json.loads(line)["step"] <= start else []
        save_text(path, "".join(line + "\n" for line in kept))

    def write(self, record):
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {describe_error(error)}") from None
