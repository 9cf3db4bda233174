"""Tables of a model card, which an evaluation writes between two markers: no figure is typed by
hand. Knows no JAX."""

import re

from vcloze_jax.config import UserError
from vcloze_jax.inputs.pictures import check_file, save_text

MARKERS = ("<!-- evaluation -->", "<!-- end of evaluation -->")  # around the tables


def split_card(file):
    """What a model card says before and after its evaluation; the markers belong to it.

    Raises UserError if the file cannot be read, or does not hold both markers once and in order.
    """
    try:
        text = check_file(file).read_text("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--card {file}: {error}") from None
    if re.findall("|".join(MARKERS), text) != list(MARKERS):
        raise UserError(f"--card {file}: add the lines {' and '.join(MARKERS)}, each once")
    before, _, rest = text.partition(MARKERS[0])
    return before + MARKERS[0], MARKERS[1] + rest.partition(MARKERS[1])[2]


def write_card(file, table):
    """Put a table between the markers of a model card, atomically; see split_card."""
    before, after = split_card(file)
    save_text(file, f"{before}\n\n{table}\n{after}")


def format_table(rows):
    """Lines of a Markdown table, the first its header."""
    header, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{'---|' * len(rows[0])}", *rest])
