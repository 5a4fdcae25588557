"""The manifest of a fine-tuned model: the folder is refused unless every field has the type that vitscope writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitscope.models.backends.libraries import LIBRARIES
from vitscope.models.checkpoints.json_file import read_object
from vitscope.models.checkpoints.values import is_number
from vitscope.validation import short_repr

FORMAT = 1

_Check = tuple[Callable[[Any], bool], str]  # whether a value is valid, and what is expected


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the checked manifest in the folder of a fine-tuned model.

    Raises:
        ValueError: the manifest is damaged or has another format; the message is one line.
    """
    manifest = read_object(path)
    missing = [name for name in _FIELDS if name not in manifest]
    if missing:
        raise ValueError(f"{path.name} has no {missing[0]!r}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path.name} has format {short_repr(manifest['format'])}, this version reads {FORMAT}")
    _check_fields(path.name, manifest, _FIELDS)
    if manifest["preprocessing"] is not None:
        settings = manifest["preprocessing"]
        _check_fields(f"the preprocessing of {path.name}", settings, _PREPROCESSING)
        if len(settings.get("mean", ())) != len(settings.get("std", ())):
            raise ValueError(f"the preprocessing of {path.name} has mean and std of different lengths")
    return manifest


def _check_fields(section: str, values: Mapping[str, Any], fields: Mapping[str, _Check]) -> None:
    for name, (is_valid, expected) in fields.items():
        if name in values and not is_valid(values[name]):
            raise ValueError(f"{name} of {section} is {short_repr(values[name])}, {expected} is expected")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(label, str) for label in value)


def _is_adapters(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {"places", "rank"}
        and isinstance(value["places"], list)
        and _is_positive_integer(value["rank"])
    )


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_positive_integer, value))


def _is_channels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


_FIELDS: Mapping[str, _Check] = {
    "format": (lambda value: value == FORMAT, str(FORMAT)),
    "name": (_is_text, "text"),
    "library": (lambda value: value in LIBRARIES, " or ".join(LIBRARIES)),
    "architecture": (lambda value: isinstance(value, dict), "an object"),
    "adapters": (_is_adapters, "null, or places and rank"),
    "labels": (_is_labels, "a list of names"),
    "preprocessing": (lambda value: value is None or isinstance(value, dict), "null or an object"),
    "native": (lambda value: isinstance(value, bool), "true or false"),
}

_PREPROCESSING: Mapping[str, _Check] = {
    "size": (_is_size, "height and width in pixels"),
    "resize_to": (lambda value: value is None or _is_size(value), "null, or height and width in pixels"),
    "fit": (lambda value: value in ("crop", "squash"), "crop or squash"),
    "mean": (_is_channels, "one number per channel"),
    "std": (lambda value: _is_channels(value) and min(value) > 0, "one positive number per channel"),
    "resample": (lambda value: value in (0, 1, 2, 3, 4, 5), "the number of a Pillow filter, 0 to 5"),
    "round_half_even": (lambda value: isinstance(value, bool), "true or false"),
}
