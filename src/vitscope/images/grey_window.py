"""Grey windows: the two values that become black and white, as radiologists choose them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitscope.errors import CallError, ImageError, warn
from vitscope.validation import require_integer, short_repr

if TYPE_CHECKING:
    NativePath = Path
else:
    NativePath = type(Path())  # pathlib.Path itself has no subclasses before Python 3.12

_announces = ContextVar("announces", default=True)  # each thread has its own value

GreyWindow = tuple[float, float]
MIN_USE = 1 / 8  # share of the range of deep pixels below which a warning is issued
HOW_TO_WINDOW = (
    "pass the values of black and white as vitscope.read_image(image, window=(low, high)) or --window low,high"
)
HOW_TO_SLICE = "vitscope.read_image(image, slice=N) or --slice N"


class ImageFile(NativePath):
    """The path of an image, with the window and the slice with which its pixels are read."""

    window: GreyWindow | None = None
    slice: int | None = None


def require_window(window: Any) -> GreyWindow | None:
    """Return a window as two numbers; None stays None.

    Raises:
        CallError: it is not a pair of finite numbers, the smaller one first.
    """
    if window is None:
        return None
    try:
        low, high = (math.nan if isinstance(value, str | bool) else float(value) for value in window)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise CallError(
            f"window is {short_repr(window)}: two numbers are expected, the values of black and white, smaller first"
        )
    return low, high


def require_slice(index: Any, count: int, name: str, kind: str) -> int:
    """Return the index of a slice or frame, from 0.

    Raises:
        CallError: there is no such slice.
    """
    number = require_integer(index, "slice")
    if not 0 <= number < count:
        raise CallError(f"slice is {number}, but {name} has {count} {kind}: pass 0 to {count - 1}")
    return number


def describe_choice(window: GreyWindow | None, index: int | None) -> str:
    """Return the window and the slice of an image, for its name in results; ``""`` if neither was chosen."""
    notes = [] if index is None else [f"slice {index}"]
    if window is not None:
        notes.append(f"window {window[0]:g} to {window[1]:g}")
    return f"({', '.join(notes)})" if notes else ""


def windowed(values: np.ndarray, window: GreyWindow, name: str) -> np.ndarray:
    """Return grey values as uint8: the window's lower value becomes 0, its upper one 255, with clipping.

    Raises:
        ImageError: a value is NaN.
    """
    low, high = window
    share = (values.astype(np.float64) - low) / (high - low)
    check_no_nan(share, name)
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def check_no_nan(values: np.ndarray, name: str) -> None:
    """Refuse values that have no grey.

    Raises:
        ImageError: a value is NaN.
    """
    count = int(np.isnan(values).sum())
    if count:
        raise ImageError(f"{name} holds {count} pixels that are NaN: replace them with a number first")


@contextmanager
def range_warnings(enabled: bool) -> Iterator[None]:
    """Enable or disable the warnings of :func:`warn_if_narrow`, which a data set would repeat for each image."""
    token = _announces.set(enabled)
    try:
        yield
    finally:
        _announces.reset(token)


def warn_if_narrow(values: np.ndarray, full_range: GreyWindow, name: str) -> None:
    """Warn if deep pixels use less than :data:`MIN_USE` of their range, so that they are almost a single grey.

    Args:
        values: the pixels, at least one.
        full_range: the values of black and white.
        name: name of the image.
    """
    least, greatest = float(values.min()), float(values.max())
    low, high = full_range
    if greatest - least < (high - low) * MIN_USE and _announces.get():
        warn(
            f"{name} uses only the values {least:g} to {greatest:g} of {low:g} to {high:g}, so it is almost a single "
            f"grey: {HOW_TO_WINDOW}"
        )
