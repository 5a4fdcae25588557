"""JSON files that come with a model: read whole and checked before any library sees them."""

import json
from pathlib import Path
from typing import Any

LARGEST_BYTES = 64 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a regular file holds.

    Raises:
        ValueError: there is no such file, or it holds something else; the message is one line that names the file.
    """
    name = path.name
    try:
        if not path.is_file():
            raise ValueError(f"{name} is missing" if not path.exists() else f"{name} is not a regular file")
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"{name} is larger than {LARGEST_BYTES // 2**20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_nan)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror or type(error).__name__})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error.msg}, line {error.lineno})") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except _NanError:
        raise ValueError(f"{name} holds NaN, which is no setting") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {_kind(content)}, a JSON object is expected")
    return content


class _NanError(Exception):
    """A JSON file holds NaN."""


def _refuse_nan(constant: str) -> float:
    if constant == "NaN":
        raise _NanError
    return float(constant.replace("Infinity", "inf"))


def _kind(content: Any) -> str:
    if content is None:
        return "null"
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number")
