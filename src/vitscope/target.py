"""Which class is explained: an index, or a label as people write it."""

import difflib
from collections.abc import Sequence

from vitscope.arguments import whole_number
from vitscope.errors import CallError


def class_index(target: int | str, labels: Sequence[str] | None, num_classes: int) -> int:
    """The index of a class.

    Args:
        target: an index (also as text), or a label. A label may be one of the synonyms that a data set writes
            behind one another ("tabby" of "tabby, tabby cat"); upper and lower case are one.
        labels: the names of the classes, or None where a model has none.
        num_classes: how many classes there are.

    Raises:
        CallError: there is no such class; the nearest labels are named.
    """
    if not isinstance(target, str) or target.isdecimal():
        index = whole_number(int(target) if isinstance(target, str) else target, "target")
        if not 0 <= index < num_classes:
            raise CallError(f"target {index} is not there: the model has classes 0 to {num_classes - 1}")
        return index
    if not labels:
        raise CallError(f"target is {target!r}, but this model has no labels: pass the index of a class")
    wanted = target.strip().casefold()
    whole = {label.casefold(): i for i, label in reversed(list(enumerate(labels)))}
    if wanted in whole:
        return whole[wanted]
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
