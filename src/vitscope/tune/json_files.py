"""Reading JSON that a run wrote: an object with the expected names, or one line that says which file is damaged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise DamagedError("it is not UTF-8 text") from None
    except RecursionError:
        raise DamagedError("it is nested too deeply") from None
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from None
    except ValueError as error:
        raise DamagedError(str(error).splitlines()[0]) from None
    if not isinstance(found, dict):
        raise DamagedError(f"it holds {type(found).__name__} in place of an object")
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
