"""Checks of preprocessing settings: sizes, and one number per channel."""

import math
import operator
from typing import Any

from vitscope.errors import CallError
from vitscope.validation import short_repr

MAX_QUOTE = 80  # characters of a value in a message


def require_sides(value: Any, name: str, maximum: int) -> tuple[int, int]:
    """Return a setting as (height, width) in pixels.

    Raises:
        CallError: it does not consist of two whole numbers from 1 to ``maximum``.
    """
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError):
        height = width = 0
    if not (1 <= height <= maximum and 1 <= width <= maximum):
        raise CallError(
            f"{name} is {short_repr(value, MAX_QUOTE)}: (height, width) in whole pixels from 1 to {maximum:,} is "
            "expected"
        )
    return height, width


def require_finite(values: Any, name: str) -> tuple[float, ...]:
    """Return a setting as one number per channel.

    Raises:
        CallError: it is empty, or not all its values are finite numbers.
    """
    try:
        numbers = () if isinstance(values, str | bytes) else tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise CallError(f"{name} is {short_repr(values, MAX_QUOTE)}: one finite number for each channel is expected")
    return numbers
