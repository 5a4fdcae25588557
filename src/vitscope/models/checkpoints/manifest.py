"""The manifest of a tuned model: every field has the kind that vitscope wrote, or the folder is refused."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitscope.models.backends.libraries import LIBRARIES
from vitscope.models.checkpoints.json_file import read_object

FORMAT = 1


def checked_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a tuned model's folder.

    Raises:
        ValueError: it is damaged, or of another format; the message is one line.
    """
    manifest = read_object(path)
    missing = [name for name in _FIELDS if name not in manifest]
    if missing:
        raise ValueError(f"{path.name} has no {missing[0]!r}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path.name} has the format {_short(manifest['format'])}, this version reads {FORMAT}")
    _check(path.name, manifest, _FIELDS)
    if manifest["preprocessing"] is not None:
        settings = manifest["preprocessing"]
        _check(f"the preprocessing of {path.name}", settings, _PREPROCESSING)
        if len(settings.get("mean", ())) != len(settings.get("std", ())):
            raise ValueError(f"the preprocessing of {path.name} has mean and std of different lengths")
    return manifest


def _check(where: str, values: Mapping[str, Any], fields: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for name, (is_right, expected) in fields.items():
        if name in values and not is_right(values[name]):
            raise ValueError(f"{where} has {name} {_short(values[name])}, {expected} is expected")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(label, str) for label in value)


def _is_adapters(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"places", "rank"}
        and isinstance(value["places"], list)
        and _is_whole(value["rank"])
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_channels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(part) for part in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: value == FORMAT, str(FORMAT)),
    "name": (_is_text, "text"),
    "library": (lambda value: value in LIBRARIES, " or ".join(LIBRARIES)),
    "architecture": (lambda value: isinstance(value, dict), "an object"),
    "adapters": (_is_adapters, "null, or places and rank"),
    "labels": (_is_labels, "a list of names"),
    "preprocessing": (lambda value: value is None or isinstance(value, dict), "null or an object"),
    "native": (lambda value: isinstance(value, bool), "true or false"),
}

_PREPROCESSING: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "size": (_is_size, "height and width in pixels"),
    "resize_to": (lambda value: value is None or _is_size(value), "null, or height and width in pixels"),
    "fit": (lambda value: value in ("crop", "squash"), "crop or squash"),
    "mean": (_is_channels, "a number for each channel"),
    "std": (lambda value: _is_channels(value) and min(value) > 0, "a positive number for each channel"),
    "resample": (lambda value: value in (0, 1, 2, 3, 4, 5), "a number of Pillow's filters, 0 to 5"),
    "round_half_even": (lambda value: isinstance(value, bool), "true or false"),
}
