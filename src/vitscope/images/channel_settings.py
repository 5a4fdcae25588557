"""Settings of a preprocessing: sizes and numbers for each channel, checked."""

import math
import operator
from typing import Any

from vitscope.errors import CallError


def require_sides(value: Any, what: str, most: int) -> tuple[int, int]:
    """Return (height, width) in whole pixels from 1 to ``most``, or refuse it in one line."""
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError):
        height = width = 0
    if not (1 <= height <= most and 1 <= width <= most):
        raise CallError(f"{what} is {_short(value)}: (height, width) in whole pixels from 1 to {most:,} is expected")
    return height, width


def require_finite(values: Any, what: str) -> tuple[float, ...]:
    """Return finite numbers, at least one, or refuse them in one line."""
    try:
        numbers = () if isinstance(values, str | bytes) else tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise CallError(f"{what} is {_short(values)}: one finite number for each channel is expected")
    return numbers


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"
