"""A run's folder: what the run is, its metrics, and how it is asked to stop. Knows no JAX."""

import json
import signal
from dataclasses import asdict, fields
from pathlib import Path

from vcloze_jax.config import PRESETS, Recipe, UserError
from vcloze_jax.inputs.pictures import save_text

FREE = tuple(f.name for f in fields(Recipe) if f.metadata["free"])
OLDEST = {"preset", "data", "seed", "steps"}  # entries that every run has written


class RunFolder:
    """What a run writes, and where."""

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.jsonl"
        self.checkpoints, self.previews = self.path / "checkpoints", self.path / "previews"

    def compare(self, recipe):
        """Raise UserError if this is not a run's folder, or of another run, naming what differs."""
        if not self.config.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(
                    f"{self.path}: not a run of train.py, and not empty; choose another --out"
                )
            return
        old, new = read_identity(self.config), asdict(recipe)
        for key in new:
            if key not in FREE and old[key] != new[key]:
                raise UserError(
                    f"{self.config}: {key} is {old[key]!r}, this command says {new[key]!r}; "
                    "use the same flags or another --out"
                )
        if old["steps"] > new["steps"]:
            raise UserError(
                f"{self.config}: steps is {old['steps']}, and can only grow; raise --steps"
            )

    def create(self, recipe):
        """Make the folder, or let the run's free settings follow this command. Raises UserError."""
        try:
            self.previews.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror}; choose another folder") from None
        save_text(self.config, json.dumps(asdict(recipe), indent=1) + "\n")


def read_identity(file):
    """What a run was begun with, {field of Recipe: value}; what an older version did not write has
    the preset's default. Raises UserError."""
    try:
        entries = json.loads(file.read_text())
        if missing := OLDEST - entries.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        known = asdict(PRESETS[entries["preset"]].recipe)
        if unknown := entries.keys() - known:
            raise ValueError(f"{', '.join(sorted(unknown))} is of a newer version")
        entries |= {key: tuple(x) for key, x in entries.items() if isinstance(x, list)}
        return known | entries | {"steps": int(entries["steps"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a run's settings ({error}); move the folder away") from None


class Log:
    """metrics.jsonl: one object per step, each once. Lines past the restored step are cut."""

    def __init__(self, path, start):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        save_text(path, "".join(line + "\n" for line in lines[:start]))

    def write(self, record):
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Stop:
    """While it is entered, SIGTERM and Ctrl-C ask for a halt; `code` is then the exit code."""

    def __init__(self):
        self.code = None

    def __enter__(self):
        def ask(number, _):
            self.code = 128 + number

        self.before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
