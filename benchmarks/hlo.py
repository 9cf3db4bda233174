"""What a compiled program's text says of what moves between devices."""

import math
import re

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
CALLED = r"(?:body|to_apply|calls)=%?([\w.-]+)"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def count_collectives(text):
    """{kind: [how often, bytes that come out on one chip]} of a compiled program's HLO text, all
    turns of its loops counted."""
    bodies, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and "{" in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            name = "ENTRY" if line.startswith("ENTRY") else name
        bodies.setdefault(name, []).append(line)
    found = {}

    def walk(name, turns):
        for line in bodies.get(name, []):
            if kind := re.search(rf" ({COLLECTIVES})(-start)?\(", line):
                result = line.split("=", 1)[1].split(kind[0])[0]
                arrays = re.findall(rf"({'|'.join(BYTES)})\[([\d,]*)\]", result)
                # The start of an asynchronous one gives its operands, too, and these come first.
                arrays = arrays[-1:] if kind[2] else arrays
                sizes = [BYTES[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in arrays]
                entry = found.setdefault(kind[1], [0, 0])
                entry[0] += turns
                entry[1] += turns * sum(sizes)
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            inner = turns * int(count[1]) if count else turns
            for called in re.findall(CALLED, line):
                walk(called, inner)

    walk("ENTRY", 1)
    return found
