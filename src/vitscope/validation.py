"""Checks of arguments and of saved values. Each returns the value in the expected type or raises an error."""

import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitscope.errors import CallError, WorkError

if TYPE_CHECKING:
    import torch

MAX_NAME_BYTES = 255  # bytes of a file name, on the file systems of Linux, macOS and Windows
MAX_TEXT = 100  # characters of a value in a message or a repr
MAX_DIGITS = 20  # digits of an index in a message; Python refuses to parse or print numbers of thousands of digits
MAX_LABELS = 20  # labels that a message lists
CONTRAST = " − "  # between the two classes of a contrast
MAX_SEED = 2**32 - 1  # numpy's generators take no larger seed


def require_integer(value: Any, name: str) -> int:
    """Return the value as an int.

    Args:
        value: anything that Python accepts as an index; bools are refused.
        name: the argument's name, for the message.

    Raises:
        CallError: it is not a whole number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise CallError(f"{name} is {short_repr(value)}, a whole number is expected") from None


def require_at_least(least: int, value: Any, name: str) -> int:
    """Return the value as an int that is at least ``least``.

    Raises:
        CallError: it is not a whole number, or is too small.
    """
    integer = require_integer(value, name)
    if integer < least:
        raise CallError(f"{name} is {integer}, at least {least} is expected")
    return integer


def require_seed(value: Any) -> int:
    """Return the value as a seed for random numbers.

    Raises:
        CallError: it is not a whole number from 0 to 2³² − 1.
    """
    seed = require_integer(value, "seed")
    if not 0 <= seed <= MAX_SEED:
        raise CallError(f"seed is {seed}, a whole number from 0 to {MAX_SEED} is expected")
    return seed


def require_number(value: Any, name: str) -> float:
    """Return the value as a finite float.

    Raises:
        CallError: it is not a number, or is not finite; text and bools are refused.
    """
    try:
        result = float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = float("nan")
    if not math.isfinite(result):
        raise CallError(f"{name} is {short_repr(value)}, a number is expected")
    return result


def require_ratio(value: Any, name: str) -> float:
    """Return the value as a float from 0 to 1.

    Raises:
        CallError: it is not a number, or is outside this range.
    """
    try:
        result = require_number(value, name)
    except CallError:
        result = -1.0
    if not 0 <= result <= 1:
        raise CallError(f"{name} is {short_repr(value)}, a number between 0 and 1 is expected")
    return result


def require_non_negative(value: Any, name: str) -> float:
    """Return a number that is at least 0, as a float.

    Raises:
        CallError: it is not a finite number, or negative.
    """
    number = require_number(value, name)
    if number < 0:
        raise CallError(f"{name} is {value}: at least 0 is expected")
    return number


def short_text(value: Any, default: str) -> str:
    """Return a value as short text on one line, or ``default`` if the value is None."""
    text = default if value is None else value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:MAX_TEXT])
    return text if len(text) < MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def short_repr(value: Any, limit: int = 60) -> str:
    """Return the repr of a value on one line, cut off after ``limit`` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}…"


def require_class_index(target: Any, labels: Sequence[str] | None, num_classes: int) -> int:
    """Return the index of a class.

    Args:
        target: a label or an index. An index may be passed as text, unless a label has the same spelling. A label may
            be one of the synonyms that a data set separates by commas ("tabby" of "tabby, tabby cat"). Upper and
            lower case are not distinguished, unless two labels differ in nothing else.
        labels: the labels of the classes, or None if the model has none.
        num_classes: number of classes.

    Raises:
        CallError: there is no such class; the message lists the labels that contain the target as a whole word, or
            else the most similar ones.
    """
    if isinstance(target, list | tuple | dict | set) or getattr(target, "ndim", 0) > 0:
        raise CallError(
            f"target is {short_repr(target)}: one class for all images is expected, as an index or a label; for a "
            "different class per image, explain the images one by one"
        )
    if not isinstance(target, str):
        return _require_index(require_integer(target, "target"), num_classes)
    text = target.strip()
    exact = [label.strip() for label in labels or ()]
    for query, candidates in ((text, exact), (text.casefold(), [label.casefold() for label in exact])):
        if query in candidates:
            return candidates.index(query)
    if text.isdecimal():
        return _require_index(int(text) if len(text) < MAX_DIGITS else 10**MAX_DIGITS, num_classes)
    if not labels:
        raise CallError(f"target is {target!r}, but this model has no labels: pass the index of a class")
    query = text.casefold()
    synonyms: dict[str, int] = {}
    for index, label in enumerate(labels):
        for synonym in label.split(","):
            synonyms.setdefault(synonym.strip().casefold(), index)
    if query in synonyms:
        return synonyms[query]
    containing = _labels_with_word(query, labels)
    if containing:
        more = f" and {len(containing) - MAX_LABELS} more" if len(containing) > MAX_LABELS else ""
        listed = ", ".join(containing[:MAX_LABELS])
        raise CallError(f"target {target!r} is not a label of this model, but a word of {listed}{more}: pass a label")
    names = [*synonyms, *(label.casefold() for label in labels)]
    close = difflib.get_close_matches(query, names, n=3, cutoff=0.5)
    if close:
        suggestions = ", ".join(dict.fromkeys(close))
        raise CallError(f"target {target!r} is not a label of this model: did you mean {suggestions}?")
    nearest = difflib.get_close_matches(query, synonyms, n=3, cutoff=0)
    raise CallError(f"target {target!r} is not a label of this model: the nearest labels are {', '.join(nearest)}")


def require_contrast(target: tuple[Any, ...], names: Sequence[str], top: int) -> tuple[int, int]:
    """Return the indices of the two classes of a contrast.

    Args:
        target: the classes, by index or label; None first for the most probable class.
        names: names of the classes.
        top: index of the most probable class.

    Raises:
        CallError: these are not two different classes.
    """
    if len(target) != 2:
        raise CallError(
            f"target is {short_repr(target)}: a contrast is a pair of classes, such as ('boxer', 'bull mastiff')"
        )
    pair = (top, target[1]) if target[0] is None else target
    first, second = (require_class_index(choice, names, len(names)) for choice in pair)
    if first == second:
        raise CallError(f"a contrast of {names[first]!r} with itself is always 0: pass two different classes")
    return first, second


def contrast_label(first: str, second: str) -> str:
    """Return the label of the contrast of two classes."""
    return f"{first}{CONTRAST}{second}"


def short_label(label: str | None) -> str:
    """Return the first synonym of a label, "tabby" of "tabby, tabby cat", also in a contrast; empty for None."""
    return CONTRAST.join(name.split(",")[0] for name in (label or "").split(CONTRAST))


def _labels_with_word(query: str, labels: Sequence[str]) -> list[str]:
    """Return the first synonym of each label that contains the query as whole words."""
    words = re.compile(rf"(?<![^\W_]){re.escape(query)}(?![^\W_])")  # "_" separates words, as in "bull_mastiff"
    matches = []
    if query:
        for label in labels:
            synonyms = (synonym.strip() for synonym in label.split(","))
            matches += [synonym for synonym in synonyms if words.search(synonym.casefold())][:1]
    return matches


def _require_index(index: int, num_classes: int) -> int:
    if not 0 <= index < num_classes:
        digits = str(index) if abs(index) < 10**MAX_DIGITS else f"of more than {MAX_DIGITS} digits"
        raise CallError(f"target {digits} does not exist: the model has classes 0 to {num_classes - 1}")
    return index


def require_mapping(value: Any, name: str) -> dict[str, Any]:
    """Return an entry of a saved result if it is a mapping.

    Raises:
        ValueError: it is not a mapping.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}, not a mapping")
    return value


def require_tensor(
    tensors: Mapping[str, "torch.Tensor"], name: str, dtype: "torch.dtype", shape: Sequence[int | None]
) -> "torch.Tensor":
    """Return a tensor of a saved result if it has the expected dtype and shape.

    Args:
        tensors: all tensors of the file.
        name: key of the tensor.
        dtype: expected dtype.
        shape: expected shape; None stands for any length.

    Raises:
        KeyError: there is no such tensor.
        ValueError: its dtype or shape differs, or it holds NaN or infinity.
    """
    tensor = tensors[name]
    fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        expected = "×".join("n" if length is None else str(length) for length in shape)
        actual = "×".join(map(str, tensor.shape)) or "a single number"
        raise ValueError(f"{name} is {actual} of {tensor.dtype}, not {expected} of {dtype}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor


def require_finite_tensor(values: "torch.Tensor", name: str) -> "torch.Tensor":
    """Return the values if all of them are finite.

    Raises:
        WorkError: they contain NaN or infinity, which the model computed.
    """
    if not bool(values.isfinite().all()):
        raise WorkError(f"{name} came out as NaN or infinity: check the model's weights and its dtype")
    return values
