"""Several processes, on one machine or many, as one run: how they find each other and agree.

    srun -N 2 --ntasks-per-node 8 --gpus-per-node 8 python train.py … --mesh 16 --group 16 --out …
    gcloud compute tpus tpu-vm ssh POD --worker all \\
        --command "cd vcloze-jax; python train.py … --group 32"
    xpk workload create --cluster C --workload W --tpu-type v5p-64 --docker-image IMAGE \\
        --command "python train.py … --group 32"

start one on Slurm, on a TPU pod slice, on GKE, where IMAGE has this repository and what
`pip install '.[tpu]'` brings. A group of grids needs one for each device. --out is one folder that
all of them see: a local disk, NFS, Lustre, Filestore, no bucket. If one is lost, the others end
within a minute; the same command goes on, on as many as there are.

Each runs the same program, on its own devices of one mesh, and draws the grids that these hold; all
compute previews, host 0 writes the run, and speaks for all. Of grids that are painted each encodes
what its devices hold, and decodes and writes its share. A process that is alone is host 0, and
agrees with itself at no cost.
"""

import os
import re
import threading
from collections import Counter
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # JAX has no public way to its key-value store
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vcloze_jax.config import UserError
from vcloze_jax.inputs import cli
from vcloze_jax.inputs.checks import describe_error, describe_with_file
from vcloze_jax.inputs.cluster import count_processes, is_launched
from vcloze_jax.inputs.signals import leave
from vcloze_jax.inputs.terminal import tell_error
from vcloze_jax.sharding import held_here

SILENCE = 45  # seconds without a sign of life, after which JAX ends the processes that are left
LONGEST = 1000  # characters of what a host tells the others
PATIENCE = 24 * 3600 * 1000  # milliseconds: JAX itself ends who waits for a host that is lost
ASKED = Counter()  # how often a thread has told something
STATUS = re.compile(r"[A-Z_]+: ")  # what XLA's errors begin with, of whatever class JAX makes them


class Agreed(UserError):
    """A mistake that all hosts know of."""


def join_hosts():
    """Find the processes that a launcher (Slurm, Open MPI, GKE, a TPU pod) started with this one,
    before JAX makes its devices. Alone, nothing happens. Raises UserError if they are not found.
    """
    if jax.distributed.is_initialized() or count_processes() == 1:
        return
    # JAX would take SIGTERM for itself, and wait for no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    times = dict(heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE)
    try:
        jax.distributed.initialize(**times)
    except Exception as error:
        if not is_launched():  # a machine with TPUs, and of no pod
            return
        raise UserError(
            f"the processes of this job do not find each other ({describe_error(error)}); start "
            "one alone, or all of them as vcloze_jax/hosts.py says"
        ) from error
    cli.AT_END.append(jax.distributed.shutdown)


def let_first_speak():
    """What other hosts print, all but errors and bars, is lost."""
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # also under what is not Python


def is_first():
    """Whether this is host 0, which writes."""
    return jax.process_index() == 0


def pick_share(things):
    """Those of a sequence that this host has to see to; each is one host's."""
    return things[jax.process_index() :: jax.process_count()]


def drawn_here(recipe, mesh):
    """Which grids of a group this host draws, counted from 0: those that its devices will hold."""
    held = held_here(recipe.micro_batch, mesh)
    return [i for i in range(recipe.group) if i % recipe.micro_batch in held]


def tell_all(text):
    """A text of each host -> those of all, in order, on every host. No device has a part in it, so
    that a thread may ask while devices are at work; it is answered by threads of its name."""
    if jax.process_count() == 1:
        return [text]
    store = distributed.global_state.client
    thread = threading.current_thread().name
    ASKED[thread] += 1
    key = f"vcloze_jax/{thread}/{ASKED[thread]}"
    store.key_value_set(f"{key}/{jax.process_index()}", text[:LONGEST])
    hosts = range(jax.process_count())
    return [store.blocking_key_value_get(f"{key}/{host}", PATIENCE) for host in hosts]


@contextmanager
def agreed():
    """What goes wrong inside on one host is raised, as Agreed, by all at the end of it: so
    nothing inside waits for other hosts once something can go wrong."""
    mistake = ""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        mistake = str(error) if isinstance(error, UserError) else describe_with_file(error)
    for said in tell_all(mistake):
        if said:
            raise Agreed(said)


class Poll:
    """Asks all hosts for a number, and answers with the largest one of the question before: so
    nobody waits for devices that work ahead. A process that is alone has its answer at once."""

    def __init__(self, mesh):
        self.size, self.place = mesh.size, NamedSharding(mesh, P(mesh.axis_names))
        self.largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self.asked = 0

    def __call__(self, number):
        if jax.process_count() == 1:
            return number
        answer, said = self.asked, np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback((self.size,), self.place, lambda _: said)
        self.asked = self.largest(numbers)
        return int(answer)


@contextmanager
def one_end():
    """Where this host alone meets an error inside, it ends at once, with a line: the others wait
    for it, until JAX ends them. So does what JAX says where it is another one that is gone."""
    try:
        yield
    except Exception as error:
        by_jax = STATUS.match(str(error))
        ours = isinstance(error, Agreed) or not (by_jax or isinstance(error, (UserError, OSError)))
        if jax.process_count() == 1 or ours:
            raise
        text = str(error) if isinstance(error, UserError) else describe_with_file(error)
        text += "; if another one is lost, start all of them again" if by_jax else ""
        tell_error(f"host {jax.process_index()} of {jax.process_count()}: {text}")
        leave(1 if by_jax else 2)
