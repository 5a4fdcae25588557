"""The JSON of every command: one shape, and numbers of nine significant digits."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import typer

SCHEMA = 1  # increases when a key changes its name or its meaning
DIGITS = 9  # significant digits: as many as float32 has


def print_results(command: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Print strict JSON, without NaN or infinity; its encoder escapes control characters.

    Args:
        command: name of the command.
        results: one mapping for each photo, model, method, data set or run.
    """
    from importlib.metadata import version

    document = {"schema": SCHEMA, "command": command, "version": version("vitscope"), "results": results}
    typer.echo(json.dumps(rounded(document), indent=2, allow_nan=False))


def rounded(value: Any) -> Any:
    """Return the value with all its numbers rounded; a number that is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value
