"""Docstrings as data: options are described once, in a dataclass, and shown wherever they are taken."""

import inspect
import re


def attribute_entries(owner: type) -> dict[str, str]:
    """Return the text about each attribute in the docstring of a class, on one line; empty under ``python -OO``.

    Args:
        owner: a class with a section ``Attributes:`` in Google style.
    """
    section = (inspect.getdoc(owner) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
