"""The sentences of VisualCloze: layout, task and content.

Templates, phrases and named tasks are data: prompts.toml.
"""

import tomllib
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
LAYOUTS = tuple(_DATA["layouts"])
TASK_SENTENCES = tuple(_DATA["task_sentences"])
CONTENT_PREFIXES = tuple(_DATA["content_prefixes"])
EDITING_PREFIXES = tuple(_DATA["editing_prefixes"])
PHRASES: dict[str, str] = _DATA["phrases"]  # kind of picture -> what it is called
RESTORATIONS: dict[str, str] = _DATA["restorations"]  # likewise, of pictures to be restored
TASKS: dict[str, str] = _DATA["tasks"]  # name -> the kinds of its columns: "photo style -> styled"


def layout_prompt(rows: int, columns: int, template: int = 0) -> str:
    """Say how many pictures there are and how they are arranged."""
    return LAYOUTS[template].format(R=rows, C=columns, N=rows * columns)


def task_prompt(phrases: list[str], template: int = 9, targets: int = 1) -> str:
    """Say what a row does; one phrase per column, those of the targets last."""
    named = [f"[IMAGE{i}] {phrase}" for i, phrase in enumerate(phrases, start=1)]
    conditions, painted = ", ".join(named[:-targets]), ", ".join(named[-targets:])
    return TASK_SENTENCES[template].format(c=conditions, t=painted)


def content_sentence(content: str) -> str:
    """Say that `content` is what the last picture shows, unless it says so itself; "" stays ""."""
    if not content.strip():
        return ""
    known = content.startswith(CONTENT_PREFIXES + EDITING_PREFIXES)
    return content if known else CONTENT_PREFIXES[1] + content


def strip_prefix(content: str) -> str:
    """The bare content, for the second pass, which knows no grid."""
    known = filter(content.startswith, CONTENT_PREFIXES + EDITING_PREFIXES)
    return content.removeprefix(next(known, ""))


def join(*parts: str) -> str:
    """One prompt of the parts that are not empty, one space between."""
    return " ".join(part for part in parts if part)


def describe_unread(unread, name="prompt"):
    """What is not read of a text of this name, a sentence for each reason."""
    found = []
    if dropped := count_unread(unread, "dropped_tokens"):
        found.append(f"the {name} is too long: {dropped} tokens dropped")
    if unknown := count_unread(unread, "unknown_characters"):
        found.append(f"the {name} has characters that no token stands for: {unknown}")
    return found


def count_unread(unread, reason):
    """Of what is not read for this reason: "3 T5, 20 CLIP" or ""."""
    counts = unread[reason].items()
    return ", ".join(f"{count} {encoder.upper()}" for encoder, count in counts if count)
