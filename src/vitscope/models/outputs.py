"""What a model returns: which tensor holds the classes, and what its numbers mean.

.. code-block:: text

    returned                                          read as
    ------------------------------------------------  ---------------------------------------------------
    (batch, class), (batch,), (batch, 1, class)       logits: one row per image
    a mapping or object with ``logits``               that entry
    a mapping or object with one classifier key       that entry, see CLASSIFIER_KEYS
    a mapping or tuple with one 2-d tensor            that tensor
    several heads                                     refused; ``select=`` names one: a key, a position, "key.key"
    anything else                                     refused; ``logits=`` or ``embed=`` read it
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from vitscope.errors import CallError, UnsupportedModelError

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


class UnclearOutputError(UnsupportedModelError):
    """The module ran, but which part of its output are the classes is not certain.

    ``returned`` is the tensor in doubt, for those who only ask what it depends on.
    """

    def __init__(self, message: str, returned: Tensor | None = None) -> None:
        super().__init__(message)
        self.returned = returned


def check_output(output: Any) -> Output | None:
    """Refuse what is no meaning of an output."""
    if output is not None and output not in get_args(Output):
        raise CallError(f"output is {output!r}: choose {', '.join(get_args(Output))}")
    return output


def parts_of(returned: Any) -> dict[str | int, Any] | None:
    """The named or numbered parts of what a module returned; None for a tensor or something without parts."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if hasattr(returned, "_fields"):
        return {name: getattr(returned, name) for name in returned._fields}
    if isinstance(returned, list | tuple):
        return dict(enumerate(returned))
    if is_dataclass(returned):
        return {part.name: getattr(returned, part.name) for part in fields(returned)}
    return dict(vars(returned)) if hasattr(returned, "__dict__") and not isinstance(returned, Tensor) else None


def select_part(returned: Any, select: Select, name: str) -> Any:
    """The part of an output that ``select`` names.

    Raises:
        CallError: there is no such part; the message lists those that there are.
    """
    for step in select.split(".") if isinstance(select, str) else [select]:
        parts = parts_of(returned) or {}
        numbered = list(parts.values())
        if step in parts:
            returned = parts[step]
        elif isinstance(step, int) and -len(numbered) <= step < len(numbered):
            returned = numbered[step]
        elif isinstance(step, str) and step.isdecimal() and int(step) < len(numbered):
            returned = numbered[int(step)]
        else:
            raise CallError(f"select={select!r} is not in the output of {name}: it returns {in_words(returned)}")
    return returned


def classes_of(returned: Any, batch: int, name: str, select: Select | None = None) -> Tensor | None:
    """The (batch, class) tensor of an output; None if it holds no classes (the tokens of a bare backbone).

    Raises:
        UnclearOutputError: several tensors could be meant, or the tensor is not one row of classes per image.
    """
    if select is not None:
        returned = select_part(returned, select, name)
    parts = None if isinstance(returned, Tensor) else parts_of(returned)
    if parts is not None:
        returned = _only_candidate(parts, batch, name)
    if returned is None:
        return None
    if not isinstance(returned, Tensor):
        raise UnclearOutputError(
            f"{name} gives neither classes nor features that vitscope knows: it returns {in_words(returned)}; pass "
            "logits= to vitscope.load, a function of the output that returns (batch, class)"
        )
    rows = as_rows(returned, batch)
    if rows is None:
        raise UnclearOutputError(
            f"{name} gives neither classes nor features that vitscope knows: it returns a tensor of shape "
            f"{tuple(returned.shape)}, not one row per image; pass logits= to vitscope.load (a function of the output "
            "that returns (batch, class)), or embed= (one that returns (batch, channel))",
            returned,
        )
    return rows


def as_rows(tensor: Tensor, batch: int) -> Tensor | None:
    """(batch,), (batch, 1, class) or (batch, class, 1, 1) as (batch, class); None for other shapes."""
    if tensor.ndim == 0 or len(tensor) != batch or not tensor.is_floating_point():
        return None
    if tensor.ndim == 1:
        return tensor[:, None]
    if tensor.ndim == 3 and tensor.shape[1] == 1:
        return tensor[:, 0]
    if tensor.ndim == 4 and tuple(tensor.shape[2:]) == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor if tensor.ndim == 2 else None


def _only_candidate(parts: Mapping[str | int, Any], batch: int, name: str) -> Any:
    """The part that holds the classes: the one called so, else the only one with a row per image."""
    for key in CLASSIFIER_KEYS:
        if parts.get(key) is not None:
            return parts[key]
    if {"last_hidden_state", "hidden_states"} & parts.keys():
        return None
    tensors = {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    rows = {key: part for key, part in tensors.items() if part.ndim <= 3 and as_rows(part, batch) is not None}
    if len(rows) == 1:
        return next(iter(rows.values()))
    if not rows and not tensors:
        return None
    listed = ", ".join(f"{key!r} {tuple(part.shape)}" for key, part in tensors.items())
    if not rows:
        raise UnclearOutputError(
            f"{name} gives neither classes nor features that vitscope knows: it returns {listed}, not one row per "
            "image; pass logits= to vitscope.load (a function of the output that returns (batch, class)), or embed= "
            "(one that returns (batch, channel))"
        )
    raise UnclearOutputError(
        f"{name} returns several outputs ({listed}): pass select= to vitscope.load, the key or position of the one to "
        "explain"
    )


def in_words(returned: Any) -> str:
    """An output in words, for a message."""
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    parts = parts_of(returned)
    if not parts:
        return f"a {type(returned).__name__}"
    shapes = (tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts.values())
    listed = ", ".join(f"{key!r} {shape}" for key, shape in zip(parts, shapes, strict=True))
    return f"a {type(returned).__name__} of {listed}"


def probabilities(logits: Tensor, meaning: Output) -> Tensor | None:
    """The probability of each class, float32 (batch, class); None if the outputs are values without one.

    Args:
        meaning: ``"logits"`` decides between ``"softmax"`` and, for a single output, ``"sigmoid"``; rows that are
            probabilities already stay as they are.
    """
    logits = logits.float()
    if meaning == "value":
        return None
    if meaning == "probabilities" or (meaning in ("logits", "softmax") and sums_to_one(logits)):
        return logits
    if meaning == "sigmoid" or (meaning == "logits" and logits.shape[-1] == 1):
        return logits.sigmoid()
    return logits.softmax(-1)


def sums_to_one(rows: Tensor) -> bool:
    """Rows of a softmax: no logits of several classes are non-negative and sum to one by chance."""
    if rows.shape[-1] < 2:
        return False
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 1e-4).all())
