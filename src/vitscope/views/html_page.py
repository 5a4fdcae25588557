"""Pages in one HTML file: the template, tables, and images as data URIs. They need no script and no network."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from vitscope.views.plain_text import visible


def html_page(title: str, note: str, sections: Sequence[str]) -> str:
    """Return a page.

    Args:
        title: as text, which is escaped.
        note: below the title, as text.
        sections: HTML.
    """
    resources = files("vitscope.views")
    template = Template((resources / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html_text(title),
        note=html_text(note),
        style=(resources / "page.css").read_text(encoding="utf-8"),
        body="\n".join(sections),
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """Return a table of text cells, which are escaped.

    Args:
        header: one name for each column.
        rows: one cell for each column.
        text: the cells are texts, which are aligned to the left and may be broken into lines.
    """
    head = "".join(f"<th>{html_text(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="text"' if text else ""
    return f'<div class="wide"><table{kind}>\n<tr>{head}</tr>\n{body}\n</table></div>'


def png_image(png: bytes, description: str) -> str:
    """Return the image of a PNG file, with its description for those who cannot see it."""
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html_text(description)}" src="data:image/png;base64,{encoded}">'


def html_text(text: str) -> str:
    """Return a text for HTML; its control characters are spelled out."""
    return escape(visible(text))
