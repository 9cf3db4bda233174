"""What launchers tell the processes that they start, of others beside them. Knows no JAX."""

import os

SIGNS = (
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",  # an indexed job of Kubernetes
    "TPU_WORKER_HOSTNAMES",  # GKE's TPUs
)
COUNTS = "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"
CHIPS = "/dev/accel0", "/dev/vfio/0"  # a machine with TPUs may be one of a pod


def count_processes():
    """How many processes were started as one job: 1 without a launcher, 0 where it does not say."""
    if not is_launched():
        return 0 if any(map(os.path.exists, CHIPS)) else 1
    return next((int(os.environ[name]) for name in COUNTS if name in os.environ), 0)


def is_launched():
    """Whether a launcher started this process."""
    return any(sign in os.environ for sign in SIGNS)
