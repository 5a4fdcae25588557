"""Checks of single values in the JSON files of a model."""

import math
from typing import Any


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
