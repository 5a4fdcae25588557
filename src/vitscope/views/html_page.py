"""Pages in one HTML file: the template, tables, and images as data URIs. They need no script and no network."""

import base64
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from vitscope.views.html_table import html_table, html_text


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


def page_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """Return a table with all rows, which can be scrolled on a narrow screen; see :func:`html_table`."""
    return f'<div class="wide">{html_table(header, rows, limit=None, text=text)}</div>'


def png_image(png: bytes, description: str) -> str:
    """Return the image of a PNG file, with its description for those who cannot see it."""
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html_text(description)}" src="data:image/png;base64,{encoded}">'
