"""How many programs XLA compiled in this process, and how long that took."""

import time
from collections import Counter
from contextlib import contextmanager

import jax

COMPILE = "/jax/core/compile/backend_compile_duration"  # one event a program, also of the cache's
LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
spent = Counter()  # "programs", and "seconds" of lowering and compiling them


def _listen(event, seconds, **_):
    if event in (LOWER, COMPILE):
        spent["seconds"] += seconds
        spent["programs"] += event == COMPILE


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def timed(seconds: Counter, part: str):
    """Add the seconds inside to `part`, but those of compiling to "compile", so that a record can
    tell compiling from computing."""
    start, before = time.perf_counter(), spent["seconds"]
    yield
    compiling = spent["seconds"] - before
    seconds["compile"] += compiling
    seconds[part] += time.perf_counter() - start - compiling
