"""Which attention calls reached which tensor, followed through every torch function of one run.

Each tensor that a torch function returns carries a bit mask: bit 0 for the image, bit i + 1 for attention call i. The
mask of a result is the union of the masks of its arguments. Nothing is computed twice, nothing is written on a tensor,
and no tensor is kept alive.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 1


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOT_TENSORS = frozenset({torch.Size, int, float, bool, str, torch.dtype, torch.device, torch.layout, type(None)})
# Their result lies in the memory of their first argument, or may do so.
_VIEWS = words(
    """
    view view_as reshape reshape_as transpose permute swapaxes swapdims movedim moveaxis t T mT H mH flatten
    unflatten squeeze unsqueeze expand expand_as narrow select chunk split tensor_split hsplit vsplit unbind detach
    data real diagonal unfold contiguous __getitem__ __iter__ to float
    """
)
_IN_PLACE = words(
    """
    __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    """
)
_PLAIN, _VIEW, _MUTATES = range(3)

_kinds: dict[Any, int] = {}


def function_name(func: Any) -> str:
    """The name of a torch function; of the getter or setter of a property its own."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _kind(func: Any) -> int:
    name = function_name(func)
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or func.__name__ == "__set__":
        kind = _MUTATES
    else:
        kind = _VIEW if name in _VIEWS else _PLAIN
    if func.__name__ not in ("__get__", "__set__"):  # those are new objects at every access
        _kinds[func] = kind
    return kind


def call_bit(index: int) -> int:
    """The bit of the attention call with this index."""
    return 1 << (index + 1)


class Flow:
    """The masks of one run.

    Args:
        constants: tensors that exist before the run, the weights and buffers of the model. A tensor that is neither
            among them nor the result of a torch function comes out of code that no mode sees (a compiled or scripted
            function); it is taken for a result of everything that entered the running module.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        # Tensors that share memory share a cell, so what is written into one has reached the others.
        self._cells: dict[int, tuple[weakref.ref[Tensor], list[int]]] = {}
        self._constants = {id(tensor) for tensor in constants}
        self._entered: list[int] = []
        self.num_calls = 0

    def mark(self, tensor: Tensor, mask: int) -> None:
        """Set the mask of a tensor."""
        self._cells[id(tensor)] = (weakref.ref(tensor), [mask])

    def mask(self, value: Any) -> int:
        """Return the union of the masks in a value: a tensor, or tensors in lists, tuples and dicts."""
        if isinstance(value, Tensor):
            cell = self._cell(value)
            if cell is not None:
                return cell[0]
            known = not self._entered or id(value) in self._constants or isinstance(value, nn.Parameter)
            return 0 if known else self._entered[-1]
        mask = 0
        if isinstance(value, list | tuple):
            for part in value:
                mask |= self.mask(part)
        elif isinstance(value, Mapping):
            for part in value.values():
                mask |= self.mask(part)
        return mask

    def known_mask(self, tensor: Any) -> int | None:
        """Return the mask of a tensor, or None if no torch function has been seen to return it."""
        cell = self._cell(tensor) if isinstance(tensor, Tensor) else None
        return None if cell is None else cell[0]

    def record(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, more: int = 0
    ) -> None:
        """Give the result of a torch function the union of the masks of its arguments, and ``more``."""
        if result is not None and type(result) in NOT_TENSORS:
            return
        kind = _kinds.get(func)
        if kind is None:
            kind = _kind(func)
        if result is None and kind != _MUTATES:
            return
        mask = more
        for value in (*args, *kwargs.values()) if kwargs else args:
            # This loop runs for every torch function, so what needs no call of a method is decided here.
            entry = self._cells.get(id(value))
            if entry is not None and entry[0]() is value:
                mask |= entry[1][0]
            elif type(value) not in NOT_TENSORS and id(value) not in self._constants:
                mask |= self.mask(value)
        if kind == _MUTATES and args and isinstance(args[0], Tensor):
            self._reach(args[0], mask)
            if type(result) in NOT_TENSORS or result is args[0]:
                return
        if "out" in kwargs:
            self.reach(kwargs["out"], mask)
        shared = self._cell(args[0]) if kind == _VIEW and args and isinstance(args[0], Tensor) else None
        if shared is not None and shared[0] != mask:
            shared = None
        if type(result) is Tensor and id(result) not in self._cells:
            self._cells[id(result)] = (weakref.ref(result), [mask] if shared is None else shared)
        else:
            self._assign(result, mask, shared)

    def reach(self, value: Any, mask: int) -> None:
        """Add a mask to each tensor of a value."""
        for tensor in tensors_of(value):
            self._reach(tensor, mask)

    def enter(self, args: Any) -> None:
        """Note what enters a module; its keyword arguments are not seen, so without others it may be everything."""
        given = [self.known_mask(tensor) for tensor in tensors_of(args)]
        known = [mask for mask in given if mask is not None]
        mask = (1 << (self.num_calls + 1)) - 1 if not known else 0
        for part in known:
            mask |= part
        self._entered.append(mask)

    def leave(self, output: Any) -> None:
        """Give what leaves a module, and came out of code that no mode sees, the mask of all that entered it."""
        if self._entered:
            for tensor in tensors_of(output):
                if self._cell(tensor) is None:
                    self.mark(tensor, self.mask(tensor))
            self._entered.pop()

    def clear(self) -> None:
        """Forget which modules are running."""
        self._entered.clear()

    def _cell(self, tensor: Tensor) -> list[int] | None:
        entry = self._cells.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _reach(self, tensor: Tensor, mask: int) -> None:
        cell = self._cell(tensor)
        if cell is None:
            self.mark(tensor, mask)
        else:
            cell[0] |= mask

    def _assign(self, result: Any, mask: int, shared: list[int] | None) -> None:
        if isinstance(result, Tensor):
            entry = self._cells.get(id(result))
            if entry is not None and entry[0]() is result:
                entry[1][0] |= mask  # the function returned one of its arguments
            else:
                self._cells[id(result)] = (weakref.ref(result), [mask] if shared is None else shared)
        elif isinstance(result, list | tuple):
            for part in result:
                self._assign(part, mask, shared)
        elif isinstance(result, Mapping):
            for part in result.values():
                self._assign(part, mask, shared)


def tensors_of(value: Any) -> Iterable[Tensor]:
    """Yield the tensors of a value, which may lie in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)


def constants_of(module: nn.Module) -> Iterable[Tensor]:
    """Yield weights, buffers and other tensors that the modules hold as attributes."""
    for child in module.modules():
        for store in (child._parameters, child._buffers, child.__dict__):
            for value in store.values():
                if isinstance(value, Tensor):
                    yield value
