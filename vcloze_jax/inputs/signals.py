"""Signals that stop a process: at once, or where a run says that it may be stopped."""

import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import parent_process

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def leave(code):
    """End the process now."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # it may be at work in this very thread
            stream.flush()
    os._exit(code)


class Stop:
    """While it is entered, a signal only asks for a halt: `code` is then the exit code. At any
    other time it ends the process, and so does Ctrl-C after the first signal."""

    entered = None

    def __init__(self):
        self.code = None

    def __enter__(self):
        Stop.entered = self
        return self

    def __exit__(self, *_):
        Stop.entered = None

    def note(self, number):
        """Note a signal, and say what will happen; False if that was asked before."""
        if self.code is not None and number == signal.SIGINT:
            return False
        self.code = 128 + number
        print("\nstopping: the running micro-batch is the last; saving", file=sys.stderr)
        return True


def follow_parent():
    """What a process does first that works for another: signals are for that one alone, and when
    that ends, in any way, this does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if parent := parent_process():
        end = lambda: (parent.join(), os._exit(0))  # noqa: E731
        threading.Thread(target=end, daemon=True).start()


def watch_signals():
    """SIGTERM, SIGHUP, Ctrl-C end the process with 128 + number, or ask the Stop that is entered.

    A thread waits for them, since a handler waits for what runs: minutes, when XLA compiles.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def handle(number, _):
        if Stop.entered is None:
            leave(128 + number)

    def watch():
        while True:
            number = os.read(reader, 1)[0]
            stop = Stop.entered  # read once: it is the other thread's to change
            if not (stop and stop.note(number)):
                leave(128 + number)

    for number in SIGNALS:
        signal.signal(number, handle)
    threading.Thread(target=watch, daemon=True).start()
