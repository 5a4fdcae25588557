"""Numbers as callers pass them: numpy's and torch's whole numbers count, truth values and 1.5 do not."""

import math
import operator
import os
from pathlib import Path
from typing import Any

from vitscope.errors import CallError

LONGEST_NAME = 255  # bytes, in the file systems of Linux, macOS and Windows
SHORT = 100  # letters of a value in a message or a repr
MOST_SEED = 2**32 - 1  # numpy's generators take no more


def whole_number(value: Any, what: str) -> int:
    """The value as an int, or one line that says it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise CallError(f"{what} is {value!r}, a whole number is expected") from None


def at_least(least: int, value: Any, what: str) -> int:
    """The value as an int that is not below ``least``."""
    whole = whole_number(value, what)
    if whole < least:
        raise CallError(f"{what} is {whole}, at least {least} is expected")
    return whole


def seed_number(value: Any) -> int:
    """The value as a seed for random numbers."""
    seed = whole_number(value, "seed")
    if not 0 <= seed <= MOST_SEED:
        raise CallError(f"seed is {seed}, a whole number from 0 to {MOST_SEED} is expected")
    return seed


def number(value: Any, what: str) -> float:
    """The value as a finite float."""
    try:
        found = float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not math.isfinite(found):
        raise CallError(f"{what} is {value!r}, a number is expected")
    return found


def ratio(value: Any, what: str) -> float:
    """The value as a float between 0 and 1."""
    try:
        share = number(value, what)
    except CallError:
        share = -1.0
    if not 0 <= share <= 1:
        raise CallError(f"{what} is {value!r}, a share between 0 and 1 is expected")
    return share


def text_of(value: Any, otherwise: str) -> str:
    """Return a value as short text on one line, or ``otherwise`` for None."""
    text = otherwise if value is None else value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:SHORT])
    return text if len(text) < SHORT else f"{text[: SHORT - 1]}…"


def path_of(path: Any) -> Path:
    """Return the path of a result.

    Raises:
        CallError: it is no path, or one that no file can have.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise CallError(f"a path is {text_of(path, 'None')}: pass text or a pathlib.Path")
    path = Path(path)
    if "\0" in str(path):
        raise CallError(f"a path is {text_of(str(path), '')}: a name without the character NUL is expected")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_NAME:
        raise CallError(
            f"a path is {text_of(str(path), '')}, with a name of {longest} bytes: at most {LONGEST_NAME} are possible"
        )
    return path
