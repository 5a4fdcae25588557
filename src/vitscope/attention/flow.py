"""Data flow of one run: which attention calls each tensor depends on.

Each tensor that a torch function returns carries a bit mask: bit 0 for the image, bit i + 1 for attention call i. The
mask of a result is the union of the masks of its arguments. Nothing is computed twice, no tensor is modified and none
is kept alive.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 1


def name_set(text: str) -> frozenset[str]:
    """Return the names in a text, separated by white space."""
    return frozenset(text.split())


NOT_TENSORS = frozenset({torch.Size, int, float, bool, str, torch.dtype, torch.device, torch.layout, type(None)})
# Functions whose result shares, or may share, the memory of their first argument.
_VIEWS = name_set(
    """
    view view_as reshape reshape_as transpose permute swapaxes swapdims movedim moveaxis t T mT H mH flatten
    unflatten squeeze unsqueeze expand expand_as narrow select chunk split tensor_split hsplit vsplit unbind detach
    data real diagonal unfold contiguous __getitem__ __iter__ to float
    """
)
_IN_PLACE = name_set(
    """
    __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    """
)
_PLAIN, _VIEW, _MUTATES = range(3)

_kinds: dict[Any, int] = {}


def function_name(func: Any) -> str:
    """Return the name of a torch function; for the getter or setter of a property, the name of the property."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _kind(func: Any) -> int:
    """Return whether a torch function returns a new tensor, returns a view or modifies its first argument."""
    name = function_name(func)
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or func.__name__ == "__set__":
        kind = _MUTATES
    else:
        kind = _VIEW if name in _VIEWS else _PLAIN
    if func.__name__ not in ("__get__", "__set__"):  # these are new objects on every access
        _kinds[func] = kind
    return kind


def call_bit(index: int) -> int:
    """Return the bit of the attention call with this index."""
    return 1 << (index + 1)


class Flow:
    """The masks of all tensors of one run.

    Args:
        constants: tensors that exist before the run: the weights and buffers of the model. A tensor that is neither a
            constant nor the result of a torch function comes from code that no mode observes (a compiled or scripted
            function). It gets the mask of everything that entered the running module.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        # Tensors that share memory share a cell, so a write into one reaches the others.
        self._cells: dict[int, tuple[weakref.ref[Tensor], list[int]]] = {}
        self._constants = {id(tensor) for tensor in constants}
        self._module_inputs: list[int] = []  # masks, one for each running module
        self.num_calls = 0

    def set_mask(self, tensor: Tensor, mask: int) -> None:
        """Set the mask of a tensor."""
        self._cells[id(tensor)] = (weakref.ref(tensor), [mask])

    def mask(self, value: Any) -> int:
        """Return the union of the masks in a value: a tensor, or tensors in lists, tuples and mappings."""
        if isinstance(value, Tensor):
            cell = self._cell(value)
            if cell is not None:
                return cell[0]
            constant = not self._module_inputs or id(value) in self._constants or isinstance(value, nn.Parameter)
            return 0 if constant else self._module_inputs[-1]
        mask = 0
        if isinstance(value, list | tuple):
            for item in value:
                mask |= self.mask(item)
        elif isinstance(value, Mapping):
            for item in value.values():
                mask |= self.mask(item)
        return mask

    def mask_or_none(self, tensor: Any) -> int | None:
        """Return the mask of a tensor, or None if no observed torch function has returned it."""
        cell = self._cell(tensor) if isinstance(tensor, Tensor) else None
        return None if cell is None else cell[0]

    def is_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor existed before the run: one of the constants, or a leaf that no function returned."""
        return self._cell(tensor) is None and (tensor.is_leaf or id(tensor) in self._constants)

    def record(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, extra: int = 0
    ) -> None:
        """Give the result of a torch function the union of the masks of its arguments and ``extra``."""
        if result is not None and type(result) in NOT_TENSORS:
            return
        kind = _kinds.get(func)
        if kind is None:
            kind = _kind(func)
        if result is None and kind != _MUTATES:
            return
        mask = extra
        for value in (*args, *kwargs.values()) if kwargs else args:
            # This loop runs for every torch function, so the common cases are decided without a method call.
            entry = self._cells.get(id(value))
            if entry is not None and entry[0]() is value:
                mask |= entry[1][0]
            elif type(value) not in NOT_TENSORS and id(value) not in self._constants:
                mask |= self.mask(value)
        if kind == _MUTATES and args and isinstance(args[0], Tensor):
            self._add_mask(args[0], mask)
            if type(result) in NOT_TENSORS or result is args[0]:
                return
        if "out" in kwargs:
            for tensor in tensors_of(kwargs["out"]):
                self._add_mask(tensor, mask)
        shared = self._cell(args[0]) if kind == _VIEW and args and isinstance(args[0], Tensor) else None
        if shared is not None and shared[0] != mask:
            shared = None
        if type(result) is Tensor and id(result) not in self._cells:
            self._cells[id(result)] = (weakref.ref(result), [mask] if shared is None else shared)
        else:
            for tensor in tensors_of(result):
                self._assign(tensor, mask, shared)

    def enter_module(self, args: Any) -> None:
        """Store the masks of a module's positional arguments.

        Keyword arguments are not visible here. Without a masked positional argument, the mask covers the image and all
        calls so far.
        """
        masks = [mask for tensor in tensors_of(args) if (mask := self.mask_or_none(tensor)) is not None]
        union = 0 if masks else (1 << (self.num_calls + 1)) - 1
        for mask in masks:
            union |= mask
        self._module_inputs.append(union)

    def leave_module(self, output: Any) -> None:
        """Give outputs that come from unobserved code the mask of everything that entered their module."""
        if self._module_inputs:
            for tensor in tensors_of(output):
                if self._cell(tensor) is None:
                    self.set_mask(tensor, self.mask(tensor))
            self._module_inputs.pop()

    def clear_modules(self) -> None:
        """Forget which modules are running."""
        self._module_inputs.clear()

    def _cell(self, tensor: Tensor) -> list[int] | None:
        """Return the cell that holds the mask of a tensor, or None."""
        entry = self._cells.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _add_mask(self, tensor: Tensor, mask: int) -> None:
        """Add a mask to a tensor and to all tensors that share its memory."""
        cell = self._cell(tensor)
        if cell is None:
            self.set_mask(tensor, mask)
        else:
            cell[0] |= mask

    def _assign(self, tensor: Tensor, mask: int, shared: list[int] | None) -> None:
        """Give a tensor that a function returned a mask, in a shared cell if it is a view."""
        cell = self._cell(tensor)
        if cell is not None:
            cell[0] |= mask  # the function returned one of its arguments
        else:
            self._cells[id(tensor)] = (weakref.ref(tensor), [mask] if shared is None else shared)


def tensors_of(value: Any) -> Iterable[Tensor]:
    """Yield the tensors of a value, also those in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)


def constants_of(module: nn.Module) -> Iterable[Tensor]:
    """Yield the weights, buffers and other tensors that the submodules hold as attributes."""
    for child in module.modules():
        for store in (child._parameters, child._buffers, child.__dict__):
            for value in store.values():
                if isinstance(value, Tensor):
                    yield value
