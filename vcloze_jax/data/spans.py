"""Where the objects of a file of JSON lie, so that none is held until it is asked for."""

import json
import mmap
import os
import re
import weakref

from vcloze_jax.config import UserError
from vcloze_jax.inputs.checks import describe_error

BETWEEN = re.compile(r"[\s,\[\]\xef\xbb\xbf]*")  # objects; at most a byte order mark before them


class SpanReader:
    """Spans of a file, by any threads: of one that was cut since they were found what is left of
    it, where a map of all of it would end the process."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def map(self):
        """All of the file, for as long as nobody changes it."""
        return mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)

    def __getitem__(self, span):
        start, stop = map(int, span)
        return os.pread(self.descriptor, stop - start, start)


def scan_objects(data, block=2**20):
    """Walk over the objects of a JSON array or of JSON lines: ((start, stop), object) each.

    Bytes are read as Latin-1, in which one is a character, so that places are those of bytes; text
    outside ASCII is therefore to be read again. Raises UserError where no object can be read.
    """
    decoder, text, before, place = json.JSONDecoder(), "", 0, 0  # text is data[before:…]
    while True:
        place = BETWEEN.match(text, place).end()
        read = before + len(text)
        if place == len(text) and read == len(data):
            return
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            if read == len(data):
                raise UserError(f"byte {before + error.pos}: {error.msg}") from None
            added = data[read : read + max(block, len(text))].decode("latin-1")
            text, before, place = text[place:] + added, before + place, 0
        except (RecursionError, ValueError) as error:  # nested too deeply; too many digits
            raise UserError(f"byte {before + place}: {describe_error(error)}") from None
        else:
            yield (before + place, before + end), value
            place = end
