"""Compiled programs, counted and timed, so that a record can tell compiling from computing."""

import time
from collections import Counter
from contextlib import contextmanager

import jax


class Programs:
    """Jitted functions, with the number of their programs and the seconds spent compiling them.

    A call that compiles is counted whole: the devices are then given their work, not waited for.
    """

    def __init__(self):
        self.jitted, self.seconds = [], 0.0

    @property
    def count(self):
        """Programs compiled so far, or fetched from the cache on disk."""
        return sum(f._cache_size() for f in self.jitted)

    def jit(self, function, **options):
        """jax.jit(function, **options), counted and timed."""
        jitted = jax.jit(function, **options)
        self.jitted.append(jitted)

        def call(*args):
            before, start = jitted._cache_size(), time.perf_counter()
            out = jitted(*args)
            if jitted._cache_size() > before:
                self.seconds += time.perf_counter() - start
            return out

        return call

    @contextmanager
    def timed(self, seconds: Counter, part: str):
        """Add the seconds inside to `part`, but those of compiling to "compile"."""
        start, before = time.perf_counter(), self.seconds
        yield
        compiling = self.seconds - before
        seconds["compile"] += compiling
        seconds[part] += time.perf_counter() - start - compiling
