"""A run's folder: what the run is, its metrics, and how it is asked to stop. Knows no JAX."""

import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from vcloze_jax.config import UserError
from vcloze_jax.inputs.pictures import save_text

FREE = ("mesh", "steps", "save_every", "preview_every")  # may change when a run goes on


@dataclass(frozen=True)
class Settings:
    """What a run is. All of it but `FREE` is its identity, and must be the same on resume."""

    preset: str
    weights: str
    lora: str | None
    from_scratch: bool
    data: str
    rank: int
    lr: float
    batch: int
    micro_batch: int
    steps: int
    resolution: int
    loss_region: str
    seed: int
    save_every: int
    preview_every: int
    mesh: str


def compare(out, settings):
    """Raise UserError if `out` is not a run's folder, or of another run, naming what differs."""
    out, new = Path(out), asdict(settings)
    file = out / "config.json"
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: not a run of train.py, and not empty; choose another --out")
        return
    try:
        old = asdict(Settings(**json.loads(file.read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a run's settings ({error}); move the folder away") from None
    for key in new:
        if key not in FREE and old[key] != new[key]:
            raise UserError(
                f"{file}: {key} is {old[key]!r}, this command says {new[key]!r}; "
                "use the same flags or another --out"
            )
    if old["steps"] > new["steps"]:
        raise UserError(f"{file}: steps is {old['steps']}, and can only grow; raise --steps")


def create(out, settings):
    """Make the folder, or let the run's free settings follow this command. Raises UserError."""
    try:
        (Path(out) / "previews").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from None
    save_text(Path(out) / "config.json", json.dumps(asdict(settings), indent=1) + "\n")


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
