"""Checks of arguments and of saved values: each returns the value in its own type or refuses it in one line."""

import difflib
import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.errors import CallError, WorkError

if TYPE_CHECKING:
    import torch

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


def short_repr(value: Any, limit: int = 60) -> str:
    """Return the repr of a value on one line, cut off after ``limit`` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}…"


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


def class_index(target: Any, labels: Sequence[str] | None, num_classes: int) -> int:
    """The index of a class.

    Args:
        target: a label, or an index (also as text, if no label is written so). A label may be one of the synonyms that
            a data set writes behind one another ("tabby" of "tabby, tabby cat"); upper and lower case are one, unless
            two labels differ in nothing else.
        labels: the names of the classes, or None where a model has none.
        num_classes: how many classes there are.

    Raises:
        CallError: there is no such class; the nearest labels are named.
    """
    if isinstance(target, list | tuple | dict | set) or getattr(target, "ndim", 0) > 0:
        raise CallError(
            f"target is {short_repr(target)}: one class for all images is expected, an index or a label; for a class "
            "for each image, explain the images one by one"
        )
    if not isinstance(target, str):
        return _checked_index(whole_number(target, "target"), num_classes)
    wanted, known = target.strip(), labels or ()
    spellings = [(wanted, [label.strip() for label in known])]
    spellings.append((wanted.casefold(), [label.strip().casefold() for label in known]))
    for spelling, names in spellings:
        if spelling in names:
            return names.index(spelling)
    if wanted.isdecimal():
        return _checked_index(int(wanted) if len(wanted) < 20 else 10**20, num_classes)
    if not labels:
        raise CallError(f"target is {target!r}, but this model has no labels: pass the index of a class")
    wanted = wanted.casefold()
    whole = [label.casefold() for label in labels]
    synonyms = {
        synonym.strip().casefold(): i for i, label in reversed(list(enumerate(labels))) for synonym in label.split(",")
    }
    if wanted in synonyms:
        return synonyms[wanted]
    close = difflib.get_close_matches(wanted, [*synonyms, *whole], n=3, cutoff=0.5)
    if close:
        raise CallError(f"target {target!r} is no label of this model: did you mean {', '.join(dict.fromkeys(close))}?")
    nearest = difflib.get_close_matches(wanted, [*synonyms], n=3, cutoff=0)
    raise CallError(f"target {target!r} is no label of this model; the nearest it has: {', '.join(nearest)}")


def _checked_index(index: int, num_classes: int) -> int:
    if not 0 <= index < num_classes:
        shown = str(index) if abs(index) < 10**20 else "of so many digits"
        raise CallError(f"target {shown} is not there: the model has classes 0 to {num_classes - 1}")
    return index


def require_mapping(value: Any, what: str) -> dict[str, Any]:
    """Return a part of a saved result that has to be a mapping."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, not a mapping")
    return value


def require_tensor(
    tensors: Mapping[str, "torch.Tensor"], name: str, dtype: "torch.dtype", shape: Sequence[int | None]
) -> "torch.Tensor":
    """Return a tensor of a saved result, of finite numbers and of the shape it has to have; None is any length."""
    tensor = tensors[name]
    fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        expected = "×".join("n" if length is None else str(length) for length in shape)
        actual = "×".join(map(str, tensor.shape)) or "a single number"
        raise ValueError(f"{name} is {actual} of {tensor.dtype}, not {expected} of {dtype}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor


def only_finite(values: "torch.Tensor", what: str) -> "torch.Tensor":
    """The values, or a clear line when the model produced NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise WorkError(f"{what} came out as NaN or infinity: check the model's weights and its dtype")
    return values
