"""Marks in photos, as text: boxes, polygons and masks of objects and regions."""

import re
from pathlib import Path
from typing import Any

from vitscope.cli.inputs import check_file_name, parse_numbers


def parse_name(text: str, default: str) -> tuple[str, str]:
    """Return the name and the value of a text such as ``dog=76,12,90,108``."""
    name, equals, value = text.partition("=")
    return (name, value) if equals else (default, text)


def parse_mark(text: str, option: str) -> dict[str, Any]:
    """Return a box, a polygon or the path of a mask as a keyword argument of :func:`vitscope.object_mask`.

    Args:
        text: ``x,y,width,height``, the corners ``x,y,x,y,x,y,…``, or the path of a mask.
        option: name of the option, for errors.

    Raises:
        CallError: it is none of these.
    """
    if Path(text).suffix and not re.fullmatch(r"[-+\d.,\s]+", text):
        check_file_name(text, option)
        return {"mask": text}
    coordinates = parse_numbers(text, option)
    if len(coordinates) > 4 and len(coordinates) % 2 == 0:
        return {"polygon": list(zip(coordinates[::2], coordinates[1::2], strict=True))}
    return {"box": coordinates}
