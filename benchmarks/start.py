"""How soon do the commands start, on a CPU?

    python benchmarks/start.py  # a second time: all programs come out of the cache
    python benchmarks/start.py --cold --commands train  # with a cache that is empty

Each command is a process of its own: sample.py --help; one grid painted; all eight examples; and
train.py --mesh 8 until its first step is written. Prints seconds of wall and of CPU time; the
latter holds under load, within a fifth.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(str(file) for file in (ROOT / "examples").glob("*.json"))
COMMANDS = {
    "help": ["sample.py", "--help"],
    "grid": ["sample.py", "--grid", EXAMPLES[0]],
    "examples": ["sample.py", "--grid", *EXAMPLES],
    "train": ["train.py", "--mesh", "8"],
}


def measure(argv, folder):
    """Seconds of wall and of CPU time of a command that writes into `folder`; one that trains is
    ended when its first step is written. RuntimeError if it fails."""
    first, start = folder / "metrics.jsonl", time.perf_counter()
    out = [] if "--help" in argv else ["--out", str(folder)]
    command = [sys.executable, *argv, *out]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=ROOT, **silent)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not (os.waitid(os.P_PID, process.pid, ended) or first.is_file() and first.read_text()):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    os.kill(process.pid, signal.SIGKILL)  # Popen's own kill would take what os.wait4 tells
    _, status, usage = os.wait4(process.pid, 0)
    if status and not first.is_file():
        raise RuntimeError(f"{' '.join(command)}: ended with {status}")
    return seconds, usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--cold", action="store_true", help="with an empty cache, once")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.cold:
            os.environ["XDG_CACHE_HOME"] = folder
        for name in args.commands:
            for turn in ("cold",) if args.cold else ("filling the cache", "warm"):
                seconds, cpu = measure(COMMANDS[name], Path(folder, f"{name} {turn}"))
            print(f"{name}, {turn}: {seconds:.2f} s, {cpu:.2f} of CPU time", flush=True)


if __name__ == "__main__":
    main()
