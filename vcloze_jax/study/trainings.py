"""Short trainings of the study, each a command of train.py's in a process of its own. On CPUs they
run side by side, a thread each: no core waits for another, and a run is the same run, to the bit,
on every number of cores.

A run's folder is the report's: a finished one is not trained again, one that was stopped goes on.
Ctrl-C stops those that run, too; a SIGTERM to the study alone leaves them running.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from vcloze_jax.config import UserError
from vcloze_jax.data import graph

TASK = graph.parse_task("gray->fluent_flat")  # mini never saw it
AT_ONCE = 4  # at most, where there are cores: each takes 1.4 GB
QUICK_STEPS = 2


def train_all(runs, steps, bar):
    """Train {folder: flags of train.py}, so many steps each, as many at once as there are cores; on
    accelerators one after another. `bar(folders, label)` counts those that are done. Raises
    UserError with the last line of a run that fails, once those beside it have ended."""
    import jax  # slow, and flags are checked without it

    # On an accelerator this process holds most of the memory: the other takes what it needs.
    env, at_once = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 1
    if jax.default_backend() == "cpu":
        env, at_once = {"PJRT_NPROC": "1"}, min(count_cores(), AT_ONCE)
    train = partial(train_variant, steps=steps, env=os.environ | env)
    with ThreadPoolExecutor(at_once) as pool:
        finished = pool.map(train, runs.values(), runs)
        for _ in zip(bar([*runs], "trainings"), finished, strict=False):
            pass


def count_cores():
    """How many cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def train_variant(flags, run, steps, env):
    """Run train.py with these flags, in a process of its own, whose environment is `env`. Raises
    UserError with its last line if it fails."""
    flags = ["--data", f"graphemoji:{TASK.spelling}", *flags, "--out", f"{run}"]
    for name in ("steps", "save-every", "preview-every"):
        flags += [f"--{name}", f"{steps}"]
    command = [sys.executable, "-m", "vcloze_jax.train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"python train.py {shlex.join(flags)}: {said}")
