"""Small HTML tables for notebooks."""

from collections.abc import Sequence
from html import escape

from vitscope.views.plain_text import visible

MAX_ROWS = 60


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table as HTML; texts are escaped, and rows after the first 60 are only counted.

    Examples:
        >>> html_table(["label"], [["<b>"]], "Classes")
        '<table><caption>Classes</caption><tr><th>label</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[:MAX_ROWS])
    hidden = len(rows) - MAX_ROWS
    rest = f'<tr><td colspan="{len(header)}">… {hidden:,} more</td></tr>' if hidden > 0 else ""
    return f"<table><caption>{_text(caption)}</caption><tr>{head}</tr>{body}{rest}</table>"


def _text(value: str) -> str:
    return escape(visible(value))
