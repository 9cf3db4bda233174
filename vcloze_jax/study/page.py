"""Chapters as one page that needs nothing beside it, as Markdown, and as JSON. Knows no JAX."""

import base64
import html
import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from vcloze_jax.inputs.card import format_table

STYLE = """
body { max-width: 50rem; margin: auto; padding: 0 1rem 4rem; font: 1rem/1.5 system-ui, sans-serif }
h3 { margin-top: 3rem; border-top: 1px solid #bbb; padding-top: 1rem }
img { max-width: 100%; height: auto; image-rendering: pixelated }
figure { margin: 1rem 0 }
figcaption, caption { color: #555; font-size: .9rem; text-align: left }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0; text-align: left }
td, th { vertical-align: top }
code { background: #f3f3f3 }
td code { white-space: nowrap }
td:last-child { min-width: 12rem }
"""


class Heading(NamedTuple):
    """A title inside a chapter."""

    text: str


class Figure(NamedTuple):
    """A picture, and what is seen in it."""

    pixels: np.ndarray  # uint8 [h, w, 3]
    caption: str
    scale: int = 1  # pixels of the page to one of it, where there is room


class TextTable(NamedTuple):
    """Rows of text, the first its header."""

    rows: list[list[str]]
    caption: str = ""


class Chapter(NamedTuple):
    """What a part of the study gives: blocks, each a Heading, a paragraph (text, in which `x` is
    code), a TextTable or a Figure; its numbers, as JSON; and what lies beside
    the page, {name: text}."""

    blocks: list
    numbers: dict
    files: dict = {}


def tabulate_records(records):
    """Records of what was found, {column: text, a number, or what has a text}, as rows of a table;
    a record need not have all columns."""
    columns = [*dict.fromkeys(column for record in records for column in record)]
    show = lambda x: f"{x:.3f}" if isinstance(x, float) else f"{x}"  # noqa: E731
    return [columns, *([show(record.get(c, "–")) for c in columns] for record in records)]


def list_records(records):
    """The same for a program: what has fields is an object of them."""
    return [
        {key: x._asdict() if hasattr(x, "_asdict") else x for key, x in record.items()}
        for record in records
    ]


def write_html(title, lead, chapters):
    """A page of {title: Chapter}: a list of links to them, then one below the other. Its pictures
    are inside it, and it runs nothing."""
    links = [f'<li><a href="#{i}">{mark_up(name)}</a></li>' for i, name in enumerate(chapters)]
    contents = "\n".join(["<ol>", *links, "</ol>"])
    parts = [f"<h1>{mark_up(title)}</h1>", f"<p>{mark_up(lead)}</p>", contents]
    for number, (name, chapter) in enumerate(chapters.items()):
        inside = [f'<h2 id="{number}">{mark_up(name)}</h2>', *map(show_block, chapter.blocks)]
        parts.append("\n".join(["<section>", *inside, "</section>"]))
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    head += '\n<meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    whole = f'<html lang="en">\n<head>{head}\n</head>\n<body>\n{body}\n</body>\n</html>'
    return f"<!DOCTYPE html>\n{whole}\n"


def write_markdown(title, lead, chapters):
    """The same without its pictures."""
    lines = [f"# {title}", lead]
    for name, chapter in chapters.items():
        lines.append(f"## {name}")
        for block in chapter.blocks:
            if isinstance(block, Heading):
                lines.append(f"### {block.text}")
            elif isinstance(block, TextTable):
                lines += [*filter(None, [block.caption]), format_table(block.rows)]
            elif isinstance(block, str):
                lines.append(block)
    return "\n\n".join(lines) + "\n"


def show_block(block):
    """One block of a chapter as HTML."""
    if isinstance(block, Heading):
        return f"<h3>{mark_up(block.text)}</h3>"
    if isinstance(block, TextTable):
        header, *rows = block.rows
        lines = ["".join(f"<th>{mark_up(cell)}</th>" for cell in header)]
        lines += ["".join(f"<td>{mark_up(cell)}</td>" for cell in row) for row in rows]
        inside = "\n".join(f"<tr>{line}</tr>" for line in lines)
        caption = f"<caption>{mark_up(block.caption)}</caption>" if block.caption else ""
        return f'<div class="wide"><table>{caption}\n{inside}</table></div>'
    if isinstance(block, Figure):
        caption = mark_up(block.caption)
        width = block.pixels.shape[1] * block.scale
        image = f'<img width="{width}" alt="" src="{data_address(block.pixels)}">'
        return f"<figure>{image}\n<figcaption>{caption}</figcaption></figure>"
    return f"<p>{mark_up(block)}</p>"


def mark_up(text):
    """Text as HTML, `x` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def data_address(pixels):
    """uint8 pixels [h, w, 3] as an address that holds them, a PNG."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
