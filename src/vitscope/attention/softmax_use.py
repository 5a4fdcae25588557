"""What becomes of a softmax: whether it multiplies values as it is, is changed first, or multiplies nothing.

Only what multiplies the values is attention. From the softmax on, each torch function that takes its result is looked
at: functions that change the shape or the dtype alone pass it on, a product that sums over the keys ends the search,
anything else changes the weights.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitscope.attention.flow import NOT_TENSORS, function_name, words

OnValues = Callable[[int, Tensor], None]  # the index of an attention call, and its values (…, key, channel)

# Same numbers, same shape, perhaps another dtype or more rows.
_SAME = words(
    """
    contiguous clone to type type_as float half bfloat16 double detach data expand expand_as alias_copy cpu cuda
    requires_grad_
    """
)
_SWAP = frozenset(["transpose", "swapaxes", "swapdims"])
_SHAPE = words(
    """
    view reshape view_as reshape_as flatten unflatten squeeze unsqueeze
    """
)
_DROPOUT = frozenset(["dropout", "alpha_dropout", "feature_dropout"])
_PART = words(
    """
    __getitem__ __iter__ select narrow chunk split unbind tensor_split index_select gather
    """
)
_PRODUCT = frozenset(["matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm"])
_ARRANGES = _SAME | _SWAP | _SHAPE | {"T", "mT", "t", "permute"}


@dataclass
class Use:
    """What happened to the softmax of one attention call.

    Attributes:
        multiplies: the unchanged weights were multiplied with values, summing over the keys.
        changes: the functions that changed the weights, in order.
    """

    multiplies: bool = False
    changes: list[str] = field(default_factory=list)


class SoftmaxUses:
    """Follows every softmax of one run to the values."""

    def __init__(self, on_values: OnValues | None = None) -> None:
        self.uses: dict[int, Use] = {}
        # By id: the tensor, its call, and the axis of the keys from the end, None where it was merged with others.
        self._weights: dict[int, tuple[weakref.ref[Tensor], int, int | None]] = {}
        self._on_values = on_values

    def start(self, call: int, weights: Tensor) -> None:
        """Follow the result of a softmax over the last axis."""
        self.uses[call] = Use()
        self._label(weights, call, -1)

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Look at one torch function that has run."""
        if not self._weights:
            return
        for value in (*args, *kwargs.values()) if kwargs else args:
            for tensor in value if type(value) in (list, tuple) else (value,):
                entry = self._weights.get(id(tensor))
                weights = None if entry is None else entry[0]()
                if entry is not None and weights is not None and weights is tensor:
                    self._look(func, args, kwargs, result, weights, entry[1], entry[2])
                    return

    def _look(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        weights: Tensor,
        call: int,
        axis: int | None,
    ) -> None:
        name, use = function_name(func), self.uses[call]
        if name in ("__setitem__", "copy_") and args[0] is weights:
            del self._weights[id(weights)]
            use.changes.append("indexed assignment")
        elif type(result) in NOT_TENSORS:
            return
        elif name in _PRODUCT or name == "einsum":
            values = None if axis is None else _values(name, args, kwargs, weights, axis)
            if values is None:
                use.changes.append(name)
            else:
                use.multiplies = True
                self._weights = {key: entry for key, entry in self._weights.items() if entry[1] != call}
                if self._on_values is not None:
                    self._on_values(call, values)
        elif name in _DROPOUT and not _drops(args, kwargs):
            self._label(result, call, axis)
        elif name in _ARRANGES and isinstance(result, Tensor):
            self._label(result, call, None if axis is None else _moved(name, args, kwargs, weights, result, axis))
        else:
            use.changes.append("slices of it" if name in _PART else name)
            if result is weights:  # changed in place
                del self._weights[id(weights)]

    def _label(self, weights: Any, call: int, axis: int | None) -> None:
        if isinstance(weights, Tensor):
            self._weights[id(weights)] = (weakref.ref(weights), call, axis)


def _drops(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether F.dropout(input, p, training), or torch.dropout, lets anything fall."""
    probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(training) and probability > 0


def _moved(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, result: Tensor, axis: int
) -> int | None:
    """Return where the key axis is after a function that changes the shape alone, from the end; None if merged."""
    if name in _SAME:
        return axis
    last = weights.ndim
    if name in _SWAP:
        first, second = (part % last for part in _numbers(args[1:], kwargs, ("dim0", "dim1"), ("axis0", "axis1")))
        order = list(range(last))
        order[first], order[second] = second, first
        return order.index(axis % last) - last
    if name in ("T", "mT", "t"):
        order = list(range(last))
        order = order[::-1] if name != "mT" else [*order[:-2], order[-1], order[-2]]
        return order.index(axis % last) - last
    if name == "permute":
        dims = args[1] if isinstance(args[1], list | tuple) else args[1:] if len(args) > 1 else kwargs["dims"]
        return [dim % last for dim in dims].index(axis % last) - last
    return _reshaped(weights.shape, result.shape, axis)


def _numbers(args: Sequence[Any], kwargs: Mapping[str, Any], *names: tuple[str, ...]) -> list[int]:
    named = [kwargs[name] for choice in names for name in choice if name in kwargs]
    return [int(part) for part in (*args, *named)]


def _reshaped(before: torch.Size, after: torch.Size, axis: int) -> int | None:
    """Return the axis after a reshape that holds the same numbers in the same order, from the end."""
    keys, inner = before[axis], math.prod(before[axis % len(before) + 1 :])
    for place, size in enumerate(after):
        if size == keys and math.prod(after[place + 1 :]) == inner:
            return place - len(after)
    return None


def _values(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, axis: int) -> Tensor | None:
    return _einsum_values(args, weights, axis) if name == "einsum" else _factor(name, args, kwargs, weights, axis)


def _factor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, axis: int) -> Tensor | None:
    """Return the values of a matrix product that sums over the keys, (…, key, channel); None for another product."""
    tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    if name == "baddbmm":
        tensors = tensors[1:]
    if len(tensors) != 2:
        return None
    left, right = reversed(tensors) if name == "__rmatmul__" else tensors
    if weights is left and axis == -1 and right is not weights:
        return right if right.ndim > 1 else right[:, None]
    if weights is right and axis == -2 and left is not weights:
        return left.mT if left.ndim > 1 else left[:, None]
    return None


def _einsum_values(args: Sequence[Any], weights: Tensor, axis: int) -> Tensor | None:
    """Return the values of an einsum that sums over the keys, (…, key, channel); None for another einsum."""
    if not args or not isinstance(args[0], str):
        return None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
    inputs, arrow, output = args[0].replace(" ", "").partition("->")
    labels = [_axes(term, operand.ndim) for term, operand in zip(inputs.split(","), operands, strict=True)]
    place = next(i for i, operand in enumerate(operands) if operand is weights)
    key = labels[place][axis]
    others = [i for i in range(len(operands)) if i != place and key in labels[i]]
    if not arrow:
        output = "" if others else key
    if key in output or len(others) != 1 or len(operands) != 2:
        return None
    values, names = operands[others[0]], labels[others[0]]
    return values.movedim(names.index(key), max(values.ndim - 2, 0)) if values.ndim > 1 else values[:, None]


def _axes(term: str, ndim: int) -> list[str]:
    """The letters of an operand, one an axis; the axes of an ellipsis are numbered from its right end."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *(f".{i}" for i in range(hidden, 0, -1)), *after]
