"""Which class is explained: an index, or a label as people write it."""

import difflib
from collections.abc import Sequence
from typing import Any

from vitscope.arguments import whole_number
from vitscope.errors import CallError


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
            f"target is {_short(target)}: one class for all images is expected, an index or a label; for a class for "
            "each image, explain the images one by one"
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


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"
