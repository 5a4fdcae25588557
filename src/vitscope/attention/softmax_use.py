"""The use of a softmax result: whether it multiplies values unchanged, is changed first, or multiplies nothing.

Only a softmax that multiplies values is attention. Every torch function that takes the result of a softmax is examined.
Functions that change only the shape or the dtype pass it on. A product that sums over the keys ends the search. Any
other function changes the weights.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitscope.attention.flow import NOT_TENSORS, function_name, name_set

OnValues = Callable[[int, Tensor], None]  # the index of an attention call and its values (…, key, channel)
# The index of an attention call and the product of its weights and values (…, query, channel); returns what the model
# continues with.
OnProduct = Callable[[int, Tensor], Tensor]

# Functions that preserve the numbers and the axes, perhaps in another dtype or with more rows.
_SAME_AXES = name_set(
    """
    contiguous clone to type type_as float half bfloat16 double detach data expand expand_as alias_copy cpu cuda
    requires_grad_
    """
)
_SWAP = frozenset(["transpose", "swapaxes", "swapdims"])
_RESHAPE = name_set(
    """
    view reshape view_as reshape_as flatten unflatten squeeze unsqueeze
    """
)
_DROPOUT = frozenset(["dropout", "alpha_dropout", "feature_dropout"])
_SLICE = name_set(
    """
    __getitem__ __iter__ select narrow chunk split unbind tensor_split index_select gather
    """
)
_PURE_PRODUCT = frozenset(["matmul", "__matmul__", "__rmatmul__", "bmm", "mm"])
_PRODUCT = _PURE_PRODUCT | {"baddbmm"}
_REARRANGE = _SAME_AXES | _SWAP | _RESHAPE | {"T", "mT", "t", "permute"}


@dataclass
class SoftmaxUse:
    """The use of the softmax of one attention call.

    Attributes:
        multiplies: True if the unchanged weights were multiplied by values, summing over the keys.
        changes: names of the functions that changed the weights, in order.
    """

    multiplies: bool = False
    changes: list[str] = field(default_factory=list)


class SoftmaxTracker:
    """A tracker that follows the result of every softmax of one run until it multiplies the values.

    Args:
        on_values: function that is called with the index of an attention call and its values when the weights multiply
            them.
        on_product: function that is called with the index of an attention call and its matrix product of weights and
            values, and returns what replaces the product. It is not called for an einsum or a product with a summand.
    """

    def __init__(self, on_values: OnValues | None = None, on_product: OnProduct | None = None) -> None:
        self.uses: dict[int, SoftmaxUse] = {}
        # By id: the tensor, its call, and the negative index of the key axis (None if merged with other axes).
        self._weights: dict[int, tuple[weakref.ref[Tensor], int, int | None]] = {}
        self._on_values, self._on_product = on_values, on_product

    def start(self, call: int, weights: Tensor) -> None:
        """Follow the result of a softmax over the last axis."""
        self.uses[call] = SoftmaxUse()
        self._track(weights, call, -1)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds the unchanged weights of a call."""
        entry = self._weights.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
        """Examine a torch function that has run, and return its result or what replaces it."""
        if not self._weights:
            return result
        for value in (*args, *kwargs.values()) if kwargs else args:
            for tensor in value if type(value) in (list, tuple) else (value,):
                entry = self._weights.get(id(tensor))
                weights = None if entry is None else entry[0]()
                if entry is not None and weights is not None and weights is tensor:
                    return self._examine(func, args, kwargs, result, weights, entry[1], entry[2])
        return result

    def _examine(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        weights: Tensor,
        call: int,
        axis: int | None,
    ) -> Any:
        """Note what a torch function has done with the weights of a call, and return its result."""
        name, use = function_name(func), self.uses[call]
        if name in ("__setitem__", "copy_") and args[0] is weights:
            del self._weights[id(weights)]
            use.changes.append("indexed assignment")
        elif type(result) in NOT_TENSORS:
            return result
        elif name in _PRODUCT or name == "einsum":
            values = None if axis is None else _values(name, args, kwargs, weights, axis)
            if values is None:
                use.changes.append(name)
            else:
                use.multiplies = True
                self._weights = {key: entry for key, entry in self._weights.items() if entry[1] != call}
                if self._on_values is not None:
                    self._on_values(call, values)
                if self._on_product is not None and name in _PURE_PRODUCT:
                    # Weights on the right are transposed, and so is their product.
                    return self._on_product(call, result) if axis == -1 else self._on_product(call, result.mT).mT
        elif name in _DROPOUT and not _dropout_active(args, kwargs):
            self._track(result, call, axis)
        elif name in _REARRANGE and isinstance(result, Tensor):
            self._track(result, call, None if axis is None else _key_axis(name, args, kwargs, weights, result, axis))
        else:
            use.changes.append("slicing" if name in _SLICE else name)
            if result is weights:  # changed in place
                del self._weights[id(weights)]
        return result

    def _track(self, weights: Any, call: int, axis: int | None) -> None:
        """Follow a tensor that holds the weights of a call."""
        if isinstance(weights, Tensor):
            self._weights[id(weights)] = (weakref.ref(weights), call, axis)


def _dropout_active(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether F.dropout(input, p, training) or torch.dropout sets any weight to zero."""
    probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(training) and probability > 0


def _key_axis(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, result: Tensor, axis: int
) -> int | None:
    """Return the negative index of the key axis after a function that rearranges axes; None if it was merged."""
    if name in _SAME_AXES:
        return axis
    ndim = weights.ndim
    if name in _SWAP:
        first, second = (dim % ndim for dim in _dims(args[1:], kwargs, ("dim0", "dim1"), ("axis0", "axis1")))
        order = list(range(ndim))
        order[first], order[second] = second, first
        return order.index(axis % ndim) - ndim
    if name in ("T", "mT", "t"):
        order = list(range(ndim))
        order = order[::-1] if name != "mT" else [*order[:-2], order[-1], order[-2]]
        return order.index(axis % ndim) - ndim
    if name == "permute":
        dims = kwargs["dims"] if len(args) == 1 else args[1] if isinstance(args[1], list | tuple) else args[1:]
        return [dim % ndim for dim in dims].index(axis % ndim) - ndim
    return _key_axis_after_reshape(weights.shape, result.shape, axis)


def _dims(args: Sequence[Any], kwargs: Mapping[str, Any], *spellings: tuple[str, ...]) -> list[int]:
    """Return the axes passed to a torch function, by position or under one of the spellings of their names."""
    named = [kwargs[name] for names in spellings for name in names if name in kwargs]
    return [int(dim) for dim in (*args, *named)]


def _key_axis_after_reshape(before: torch.Size, after: torch.Size, axis: int) -> int | None:
    """Return the negative index of the key axis after a reshape; None if it was split or merged."""
    keys, inner = before[axis], math.prod(before[axis % len(before) + 1 :])
    for index, size in enumerate(after):
        if size == keys and math.prod(after[index + 1 :]) == inner:
            return index - len(after)
    return None


def _values(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, axis: int) -> Tensor | None:
    """Return the values that the weights multiply, (…, key, channel); None if the product is not over the keys."""
    return (
        _einsum_values(args, weights, axis) if name == "einsum" else _matmul_values(name, args, kwargs, weights, axis)
    )


def _matmul_values(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, axis: int
) -> Tensor | None:
    """Return the values of a matrix product that sums over the keys, (…, key, channel); None for another product."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
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
    labels = [_axis_labels(term, operand.ndim) for term, operand in zip(inputs.split(","), operands, strict=True)]
    index = next(i for i, operand in enumerate(operands) if operand is weights)
    key = labels[index][axis]
    partners = [i for i in range(len(operands)) if i != index and key in labels[i]]
    if not arrow:
        output = "" if partners else key
    if key in output or len(partners) != 1 or len(operands) != 2:
        return None
    values, names = operands[partners[0]], labels[partners[0]]
    return values.movedim(names.index(key), max(values.ndim - 2, 0)) if values.ndim > 1 else values[:, None]


def _axis_labels(term: str, ndim: int) -> list[str]:
    """Return one label for each axis of an einsum operand; the axes of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *(f".{i}" for i in range(hidden, 0, -1)), *after]
