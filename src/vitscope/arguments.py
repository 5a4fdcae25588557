"""Numbers as callers pass them: numpy's and torch's whole numbers count, truth values and 1.5 do not."""

import operator
from typing import Any

from vitscope.errors import CallError


def whole_number(value: Any, what: str) -> int:
    """The value as an int, or one line that says it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise CallError(f"{what} is {value!r}, a whole number is expected") from None


def ratio(value: Any, what: str) -> float:
    """The value as a float between 0 and 1."""
    try:
        number = float(value) if not isinstance(value, str) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise CallError(f"{what} is {value!r}, a share between 0 and 1 is expected")
    return number
