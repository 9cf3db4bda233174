"""Standard output and error that never end a run, whatever is printed and whoever reads it; and how
numbers are told there.
"""

import io
import os
import sys


class _Stream(io.FileIO):
    """A descriptor whose reader may be gone, or whose disk be full: what it refuses is dropped."""

    last = b"\n"  # byte written

    def write(self, data):
        self.last = bytes(data[-1:]) or self.last
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def guard_streams():
    """Replace the process's standard output and error: a character that the terminal does not know
    is written as its escape, and what cannot be written at all is dropped, line by line."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a stream that is closed: were it left so, its number would go to the next file
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)  # None: it was closed; by now the number may be a file's
        buffer = io.BufferedWriter(_Stream(number if stream else os.dup(null), "w"))
        encoding = stream.encoding if stream else "utf-8"
        guarded = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, guarded)
    os.close(null)


def tell_error(error):
    """Print a mistake on one line of standard error, whatever the names in it hold, and although a
    progress bar may stand there."""
    sys.stderr.flush()
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
    if getattr(raw, "last", b"\n") not in b"\r\n":
        print(file=sys.stderr)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    print(f"error: {text}", file=sys.stderr)


def si(count, unit):
    """12_345_678, "B" -> "12.3 MB"."""
    prefixes = iter(" kMGTP")
    while (prefix := next(prefixes, "E")) != "E" and count >= 999.5:
        count /= 1000
    return f"{count:.3g} {prefix.strip()}{unit}"
