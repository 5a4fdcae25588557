"""Reading of the JSON files of a run, with checks of their content."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitscope.models.checkpoints.json_file import parse_object


class DamagedError(ValueError):
    """A file exists but does not hold what was written to it."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: the file is missing.
        DamagedError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from None
    try:
        return parse_object(content, allow_nan=True)
    except ValueError as error:
        raise DamagedError(f"it {error}") from None


def mistyped_key(record: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    """Return the first key whose value has another type than expected; None if all values fit."""
    for key, kind in types.items():
        value = record.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return key
    return None
