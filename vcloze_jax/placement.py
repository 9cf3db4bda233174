"""How the cells of a grid are placed in the MMDiT's sequence: what papers differ in, as data.

They make four choices: how a segment of the grid enters (noise beside the channels of a condition,
or clean latents), which time its modulation is told, which modulation that is, and whom its tokens
attend to; and one more, what axis 0 of the positions counts. Another paper is another Placement.
"""

from dataclasses import dataclass
from functools import cached_property

SEGMENTS = ("text", "example", "example's target", "query", "target")  # of tokens, by number
TEXT, EXAMPLE, EXAMPLE_TARGET, QUERY, TARGET = range(len(SEGMENTS))  # five more for each row above
ALL = ("11111",) * len(SEGMENTS)


def kind_of(segments):
    """Which of SEGMENTS, by number, tokens of some `segments` are, in whatever row."""
    return segments % len(SEGMENTS)


@dataclass(frozen=True)
class Placement:
    """Tables over SEGMENTS, in their order, and the rule of axis 0. The default is VisualCloze's.

    Only a token with a masked pixel is of the segment "target". What is not said to be otherwise
    costs nothing: one vector modulates all tokens, and attention has no mask.
    """

    name: str
    # "beside": noise, latent and mask beside it, FLUX.1-Fill's 384 channels; of 64 "noise", "clean"
    enters: tuple[str, ...] = ("text", "beside", "beside", "beside", "beside")
    time: tuple[str, ...] = ("t",) * 5  # or "0", of what is clean
    branch: tuple[str, ...] = ("mod",) * 5  # or "cond_mod", which begins as a copy of "mod"
    attends: tuple[str, ...] = ALL  # a row: whom a segment's tokens see
    # "row", its number; "page", always 0, y running on; of cells apart, each a picture by itself:
    # "frame", its number, or "reference", 1, 2, … for what is given and 0 for the target.
    axis0: str = "row"
    embeds: bool = False  # whether a learnt vector, zero at birth, is added to what is clean

    @cached_property
    def clean(self) -> tuple[bool, ...]:
        """Whether a segment is never noisy."""
        return tuple(how == "clean" for how in self.enters)

    @cached_property
    def channels(self) -> int:
        """That a base of this placement reads."""
        return 384 if "beside" in self.enters else 64

    @property
    def apart(self) -> bool:
        """Whether cells are encoded apart, not as rows."""
        return self.axis0 in ("frame", "reference")

    @cached_property
    def vectors(self) -> tuple[tuple[str, str], ...]:
        """The K pairs (branch, time) of vectors that modulate."""
        return tuple(dict.fromkeys(zip(self.branch, self.time, strict=True)))

    @cached_property
    def vector_of(self) -> tuple[int, ...]:
        """Which of them modulates a segment."""
        return tuple(map(self.vectors.index, zip(self.branch, self.time, strict=True)))

    @property
    def masked(self) -> bool:
        """Whether some segment does not see all."""
        return self.attends != ALL

    @property
    def sees(self) -> list[list[bool]]:
        """`attends` as a matrix: who sees whom."""
        return [[entry == "1" for entry in row] for row in self.attends]

    @property
    def by_segment(self) -> bool:
        """Whether the MMDiT has to know a token's segment."""
        return any(self.clean) or len(self.vectors) > 1 or self.masked


# The paper, section 3 and 4; lzyhha/VisualCloze:train.py.
FILL = Placement("fill")
