"""Two processes on this machine, started as Slurm would start them: two hosts."""

import os
import socket
import subprocess
import sys

from runs import ROOT

CHILD = "import train; train.cli.run(train.main)"


def start(code, argv, number, port):
    """A process of two, as Slurm starts them; they find each other on this port."""
    job = dict(JOB_ID=1, STEP_NODELIST="localhost", NTASKS=2, PROCID=number, LOCALID=number)
    env = {f"SLURM_{key}": str(value) for key, value in job.items()}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": f"{port}"}
    ours = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        cwd=ROOT,
        env=ours | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_pair(argv, codes=(CHILD, CHILD)):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(code, argv, number, port) for number, code in enumerate(codes)]


def ends(pair, seconds=600):
    """The exit codes of two processes, and what they wrote to stdout and stderr."""
    try:
        outs = [process.communicate(timeout=seconds) for process in pair]
    finally:
        for process in pair:  # it may wait for ever
            process.kill()
    return [process.returncode for process in pair], [out for out, _ in outs], [e for _, e in outs]
