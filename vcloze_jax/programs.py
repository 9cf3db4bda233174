"""How many programs this process made, how many XLA compiled for it, and how long that took."""

import time
from collections import Counter
from contextlib import contextmanager

import jax

COMPILE = "/jax/core/compile/backend_compile_duration"  # one event a program, also of the cache's
LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
CACHED = "/jax/compilation_cache/cache_hits"
tally = Counter()  # "programs", those "compiled", and "seconds" of lowering, compiling, loading


def _listen(event, seconds=0.0, **_):
    tally["seconds"] += seconds if event in (LOWER, COMPILE) else 0
    tally["programs"] += event == COMPILE
    tally["compiled"] += (event == COMPILE) - (event == CACHED)


jax.monitoring.register_event_duration_secs_listener(_listen)
jax.monitoring.register_event_listener(_listen)


@contextmanager
def timed(seconds: Counter, part: str):
    """Add the seconds inside to `part`, but those that compiling takes to "compile"."""
    start, before = time.perf_counter(), tally["seconds"]
    yield
    compiling = tally["seconds"] - before
    seconds["compile"] += compiling
    seconds[part] += time.perf_counter() - start - compiling
