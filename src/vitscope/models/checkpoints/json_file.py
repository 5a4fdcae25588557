"""JSON files of a model, read completely and checked before a library opens them."""

import json
from pathlib import Path
from typing import Any

LARGEST_BYTES = 64 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a regular file.

    Raises:
        ValueError: there is no such file, or it does not contain a JSON object; the message is one line with its name.
    """
    try:
        return parse_object(read_bytes(path), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from None


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: the file is not a regular file, too large or unreadable; the message is a predicate without a
            subject, such as "is missing".
    """
    try:
        if not path.is_file():
            raise ValueError("is missing" if not path.exists() else "is not a regular file")
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"is larger than {LARGEST_BYTES // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or type(error).__name__})") from None


def parse_object(content: bytes, *, allow_nan: bool) -> dict[str, Any]:
    """Return the JSON object of a file's content.

    Args:
        content: UTF-8 text.
        allow_nan: whether NaN is accepted as a number.

    Raises:
        ValueError: the content is not a JSON object; the message is a predicate without a subject.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=float if allow_nan else _refuse_nan)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, line {error.lineno})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds {_kind(value)}, a JSON object is expected")
    return value


def _refuse_nan(constant: str) -> float:
    if constant == "NaN":
        raise ValueError("holds NaN, which is not a valid setting")
    return float(constant)


def _kind(content: Any) -> str:
    if content is None:
        return "null"
    return {list: "a list", str: "text", bool: "true or false"}.get(type(content), "a number")
