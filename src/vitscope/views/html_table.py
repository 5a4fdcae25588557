"""Tables as HTML, for notebooks and for pages."""

from collections.abc import Sequence
from html import escape

from vitscope.views.plain_text import visible

MAX_ROWS = 60  # of a table in a notebook


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    *,
    limit: int | None = MAX_ROWS,
    text: bool = False,
) -> str:
    """Return a table of text cells as HTML, which are escaped.

    Args:
        header: one name for each column.
        rows: one cell for each column.
        caption: above the table.
        limit: number of rows, after which the others are only counted; None for all.
        text: the cells are texts, which a page aligns to the left and may break into lines.

    Examples:
        >>> html_table(["label"], [["<b>"]], "Classes")
        '<table><caption>Classes</caption><tr><th>label</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    title = f"<caption>{html_text(caption)}</caption>" if caption else ""
    head = "".join(f"<th>{html_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[:limit])
    hidden = 0 if limit is None else len(rows) - limit
    rest = f'<tr><td colspan="{len(header)}">… {hidden:,} more</td></tr>' if hidden > 0 else ""
    kind = ' class="text"' if text else ""
    return f"<table{kind}>{title}<tr>{head}</tr>{body}{rest}</table>"


def html_text(text: str) -> str:
    """Return a text for HTML; its control characters are spelled out."""
    return escape(visible(text))
