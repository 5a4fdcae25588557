"""The output of a module: which tensor holds the classes, and what its numbers mean.

.. code-block:: text

    returned                                          read as
    ------------------------------------------------  ---------------------------------------------------
    (batch, class), (batch,), (batch, 1, class)       logits: one row per image
    a mapping or object with ``logits``               that entry
    a mapping or object with one classifier key       that entry, see CLASSIFIER_KEYS
    a mapping or tuple with one 2-d tensor            that tensor
    several heads                                     an error; ``select=`` names one: a key, a position, "key.key"
    anything else                                     an error; ``logits=`` or ``embed=`` read it
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from vitscope.errors import CallError, UnclearOutputError

Output = Literal["logits", "softmax", "sigmoid", "probabilities", "value", "features"]
Select = str | int

CLASSIFIER_KEYS = (
    "logits",
    "class_logits",
    "cls_logits",
    "logit",
    "pred",
    "preds",
    "prediction",
    "predictions",
    "scores",
)

_copies: ContextVar[int] = ContextVar("copies", default=1)


def num_rows(batch: int) -> int:
    """Return the number of rows that a module returns for a batch: one per image, unless hooks copy the images."""
    return batch * _copies.get()


@contextmanager
def copied_images() -> Iterator[Callable[[int], Token[int]]]:
    """Accept outputs with one row per copy of each image inside a context.

    Yields:
        A function that sets the number of copies, which the hook that makes them may call while the model runs.
    """
    token = _copies.set(1)
    try:
        yield _copies.set
    finally:
        _copies.reset(token)


def require_output(output: Any) -> Output | None:
    """Return ``output`` if it is a valid meaning of an output, or None.

    Raises:
        CallError: the meaning is unknown.
    """
    if output is not None and output not in get_args(Output):
        raise CallError(f"output is {output!r}: choose {', '.join(get_args(Output))}")
    return output


def entries_or_none(returned: Any) -> dict[str | int, Any] | None:
    """Return the named or numbered entries of an output; None for a tensor or an object without entries."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if hasattr(returned, "_fields"):
        return {name: getattr(returned, name) for name in returned._fields}
    if isinstance(returned, list | tuple):
        return dict(enumerate(returned))
    if is_dataclass(returned):
        return {field.name: getattr(returned, field.name) for field in fields(returned)}
    return dict(vars(returned)) if hasattr(returned, "__dict__") and not isinstance(returned, Tensor) else None


def select_entry(returned: Any, select: Select, name: str) -> Any:
    """Return the entry of an output that ``select`` names.

    Raises:
        CallError: there is no such entry; the message lists the existing ones.
    """
    for step in select.split(".") if isinstance(select, str) else [select]:
        entries = entries_or_none(returned) or {}
        values = list(entries.values())
        if step in entries:
            returned = entries[step]
        elif isinstance(step, int) and -len(values) <= step < len(values):
            returned = values[step]
        elif isinstance(step, str) and step.isdecimal() and int(step) < len(values):
            returned = values[int(step)]
        else:
            raise CallError(f"select={select!r} is not in the output of {name}: it returns {describe_output(returned)}")
    return returned


def class_rows(returned: Any, batch: int, name: str, select: Select | None = None) -> Tensor | None:
    """Return the (batch, class) tensor of an output; None if it holds no classes (the tokens of a bare backbone).

    Raises:
        UnclearOutputError: several tensors are possible, or the tensor does not have one row per image.
    """
    if select is not None:
        returned = select_entry(returned, select, name)
    entries = None if isinstance(returned, Tensor) else entries_or_none(returned)
    if entries is not None:
        returned = _only_candidate(entries, batch, name)
    if returned is None:
        return None
    if not isinstance(returned, Tensor):
        raise UnclearOutputError(
            f"{name} returns neither classes nor features that vitscope recognises, but {describe_output(returned)}: "
            "pass logits= to vitscope.load, a function of the output that returns (batch, class)"
        )
    rows = as_rows(returned, batch)
    if rows is None:
        raise _no_row_per_image(name, describe_output(returned), returned)
    return rows


def as_rows(tensor: Tensor, batch: int) -> Tensor | None:
    """Return (batch,), (batch, 1, class) or (batch, class, 1, 1) as (batch, class); None for other shapes."""
    if tensor.ndim == 0 or len(tensor) != num_rows(batch) or not tensor.is_floating_point():
        return None
    if tensor.ndim == 1:
        return tensor[:, None]
    if tensor.ndim == 3 and tensor.shape[1] == 1:
        return tensor[:, 0]
    if tensor.ndim == 4 and tuple(tensor.shape[2:]) == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor if tensor.ndim == 2 else None


def _only_candidate(entries: Mapping[str | int, Any], batch: int, name: str) -> Any:
    """Return the entry that holds the classes: one with a classifier's key, or the only one with a row per image."""
    for key in CLASSIFIER_KEYS:
        if entries.get(key) is not None:
            return entries[key]
    if {"last_hidden_state", "hidden_states"} & entries.keys():
        return None
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, Tensor)}
    rows = {key: tensor for key, tensor in tensors.items() if tensor.ndim <= 3 and as_rows(tensor, batch) is not None}
    if len(rows) == 1:
        return next(iter(rows.values()))
    if not rows and not tensors:
        return None
    listing = ", ".join(f"{key!r} {tuple(tensor.shape)}" for key, tensor in tensors.items())
    if not rows:
        raise _no_row_per_image(name, listing)
    raise UnclearOutputError(
        f"{name} returns several outputs ({listing}): pass select= to vitscope.load, the key or position of the one to "
        "explain"
    )


def _no_row_per_image(name: str, description: str, returned: Tensor | None = None) -> UnclearOutputError:
    """Return the error for tensors without one row per image."""
    return UnclearOutputError(
        f"{name} returns neither classes nor features that vitscope recognises, but {description}, not one row per "
        "image: pass logits= to vitscope.load (a function of the output that returns (batch, class)), or embed= "
        "(one that returns (batch, channel))",
        returned,
    )


def describe_output(returned: Any) -> str:
    """Return a description of an output for an error message: its type, shape and entries."""
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    entries = entries_or_none(returned)
    if not entries:
        return f"a {type(returned).__name__}"
    shapes = (tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__ for entry in entries.values())
    listing = ", ".join(f"{key!r} {shape}" for key, shape in zip(entries, shapes, strict=True))
    return f"a {type(returned).__name__} of {listing}"


def probabilities(logits: Tensor, meaning: Output) -> Tensor | None:
    """Return the probability of each class, float32 (batch, class); None if the model predicts values.

    Args:
        logits: the model's output, (batch, class).
        meaning: meaning of the output. ``"logits"`` means ``"softmax"``, or ``"sigmoid"`` for a single output. Rows
            that are already probabilities are returned unchanged.
    """
    logits = logits.float()
    scale = scale_of(logits, meaning)
    if scale == "value":
        return None
    if scale == "probabilities":
        return logits
    return logits.sigmoid() if scale == "sigmoid" else logits.softmax(-1)


def scale_of(logits: Tensor, meaning: Output) -> Literal["value", "probabilities", "sigmoid", "softmax"]:
    """Return what the output is, or which function turns it into probabilities; see :func:`probabilities`."""
    if meaning == "value":
        return "value"
    if meaning == "probabilities" or (meaning in ("logits", "softmax") and sums_to_one(logits)):
        return "probabilities"
    return "sigmoid" if meaning == "sigmoid" or (meaning == "logits" and logits.shape[-1] == 1) else "softmax"


def sums_to_one(rows: Tensor) -> bool:
    """Return whether the rows come from a softmax: logits do not sum to one without negative values by chance."""
    if rows.shape[-1] < 2:
        return False
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 1e-4).all())
