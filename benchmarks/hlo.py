"""What a compiled program's text says of what moves between devices."""

import math
import re

COLLECTIVE = re.compile(
    r"= (.*) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")


def count_collectives(text):
    """{kind: [how often, bytes that come out on one device]} of a compiled program's HLO text, all
    turns of its loops counted. A collective that is done in pieces, while something else is, stands
    in several computations under one channel, and counts once."""
    bodies = split_computations(text)
    by_channel = {}

    def walk(name, turns):
        for line in bodies.get(name, []):
            if found := COLLECTIVE.search(line):
                result, kind, starts = found.groups()
                arrays = ARRAY.findall(result)
                arrays = arrays[-1:] if starts else arrays  # behind its operands
                size = sum(BYTES[t] * math.prod(map(int, s.split(","))) for t, s in arrays if s)
                channel = re.search(r"channel_id=(\d+)", line)
                by_channel[channel[1] if channel else line] = kind, turns, turns * size
            inner = turns * count_turns(line, bodies) if " while(" in line else turns
            for called in CALLED.findall(line):
                walk(called, inner)

    walk("ENTRY", 1)
    totals = {}
    for kind, count, size in by_channel.values():
        before = totals.get(kind, (0, 0))
        totals[kind] = [before[0] + count, before[1] + size]
    return totals


def split_computations(text):
    """{name: lines} of the computations; that of the program is ENTRY."""
    bodies, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            name = line.split()[0].lstrip("%")
        bodies.setdefault(name, []).append(line)
    return bodies


def count_turns(line, bodies):
    """Of a loop: as its line says or, where the compiler does not, as its condition's limit is."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = bodies[re.search(r"condition=%?([\w.-]+)", line)[1]]
    limits = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(limits[0]) if limits else 1
