"""Reading JSON that a run wrote: an object with the expected names, or one line that says which file is damaged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscope.models.checkpoints.json_file import parse_object


class DamagedError(ValueError):
    """A file is there and does not hold what was written to it."""


def read_object(path: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON object of a file.

    Args:
        names: keys that it must have.

    Raises:
        FileNotFoundError: the file is missing.
        DamagedError: it cannot be read, is no JSON object, or lacks a name.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from None
    try:
        found = parse_object(content, allow_nan=True)
    except ValueError as error:
        raise DamagedError(f"it {error}") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise DamagedError(f"it has no {missing[0]!r}")
    return found


def matches(found: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    """The first name whose value has another type than it should; None where all fit."""
    for name, kind in types.items():
        value = found.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return name
    return None
