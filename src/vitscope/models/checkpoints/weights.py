"""Weights and the module they are for: each tensor has its place, or nothing is loaded."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitscope.errors import ModelUnavailableError, warn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES_QUOTED = 3

# Buffers that a class computes from its sizes. Older versions of the libraries saved them.
_COMPUTED = ("position_ids", "relative_position_index", "relative_coords_table", "attn_mask", "num_batches_tracked")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mismatch:
    """How a set of weights differs from the module it should fill. False if it does not.

    Attributes:
        missing: names of the module that the weights lack.
        unexpected: names that the module does not have.
        shapes: name, shape in the file and shape in the module.
        dtypes: name and dtype of weights that are not floating-point numbers (or are where whole numbers belong).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[tuple[str, Shape, Shape], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.dtypes)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({quoted(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({quoted(self.unexpected)})")
        if self.shapes:
            shapes = [
                f"{name}: {_text(file)} in the file, {_text(own)} in the model" for name, file, own in self.shapes
            ]
            parts.append(f"{len(self.shapes)} of another shape ({quoted(shapes, '; ')})")
        if self.dtypes:
            parts.append(
                f"{len(self.dtypes)} of another kind of number ({quoted(f'{n}: {d}' for n, d in self.dtypes)})"
            )
        return ", ".join(parts)


def quoted(names: Collection[str] | Iterator[str], separator: str = ", ") -> str:
    """Return the first few names, and a sign that there are more."""
    ordered = sorted(names)
    return separator.join([*ordered[:NAMES_QUOTED], *(["…"] if len(ordered) > NAMES_QUOTED else [])])


def compare(module: nn.Module, state: Mapping[str, Tensor]) -> Mismatch:
    """Return how ``state`` differs from what ``module`` needs.

    Buffers that the class computes itself may be missing or left over, and of weights that are one tensor in the
    module one name is enough.
    """
    own = module.state_dict(keep_vars=True)
    present = {id(own[name]) for name in state if name in own}
    buffers = {name for name, _ in module.named_buffers()}
    missing = [
        name
        for name, tensor in own.items()
        if name not in state and id(tensor) not in present and not is_computed(name) and isinstance(tensor, Tensor)
    ]
    unexpected = [name for name in state if name not in own and not (is_computed(name) or name in buffers)]
    both = [name for name in own if name in state and isinstance(own[name], Tensor)]
    shapes = [(n, tuple(state[n].shape), tuple(own[n].shape)) for n in both if state[n].shape != own[n].shape]
    dtypes = [(n, dtype_name(state[n])) for n in both if not _same_kind(state[n], own[n])]
    return Mismatch(tuple(missing), tuple(unexpected), tuple(shapes), tuple(dtypes))


def fit_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return ``state`` under the module's own names; the module stays as it is.

    If every name lacks one prefix, or has one too many (``module.``, ``backbone.``, …), it is added or removed, with
    a warning.

    Args:
        name: what the weights are called in messages.

    Raises:
        ModelUnavailableError: weights are missing, left over, or of another shape or kind of number.
    """
    mismatch = compare(module, state)
    if not mismatch:
        return _own(module, state, name)
    for prefix, renamed in _renamed(module, state):
        if not compare(module, renamed):
            warn_about_prefix(name, prefix, added=len(next(iter(renamed))) > len(next(iter(state))))
            return _own(module, renamed, name)
    raise ModelUnavailableError(f"{name} does not fit {type(module).__name__}: {mismatch}")


def head_rows(state: Mapping[str, Tensor], heads: Sequence[str]) -> int | None:
    """Return the number of classes of the classifiers in these weights, None if there are none or they differ.

    Args:
        heads: paths of the classifiers in the module; in the file they may stand behind a prefix.
    """
    names = tuple(f"{head}.weight" for head in heads)
    ends = tuple(f".{name}" for name in names)
    rows = {tensor.shape[0] for n, tensor in state.items() if tensor.ndim == 2 and (n in names or n.endswith(ends))}
    return rows.pop() if len(rows) == 1 else None


def warn_about_prefix(name: str, prefix: str, *, added: bool) -> None:
    """Say that the names in a file differ from the model's by a prefix."""
    verb = "added to" if added else "removed from"
    warn(f"{name}: the prefix {prefix!r} was {verb} every name so that the weights fit the model")


def common_prefixes(names: Collection[str]) -> list[str]:
    """Return the dotted prefixes that all names share, shortest first: ``["module.", "module.model."]``."""
    split = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return [".".join(shared[: i + 1]) + "." for i in range(len(shared))]


def is_computed(name: str) -> bool:
    """True for a buffer that its class computes from its sizes."""
    return name.rpartition(".")[2] in _COMPUTED


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype as messages have it."""
    return str(tensor.dtype).removeprefix("torch.") if tensor.layout == torch.strided else str(tensor.layout)


def _renamed(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for prefix in common_prefixes(state.keys()):
        yield prefix, {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for prefix in common_prefixes(module.state_dict().keys()):
        yield prefix, {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _own(module: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Fill in the second name of shared weights and the buffers that the class computed."""
    own = module.state_dict(keep_vars=True)
    shared: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if key not in own:
            continue
        if not torch.equal(shared.setdefault(id(own[key]), tensor), tensor):
            raise ModelUnavailableError(f"{name} does not fit {type(module).__name__}: {key} is shared there, not here")
    return {key: shared[id(tensor)] if id(tensor) in shared else tensor.detach() for key, tensor in own.items()}


def _same_kind(tensor: Tensor, own: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    if own.is_floating_point():
        return tensor.dtype in FLOATS
    return not tensor.is_floating_point() and not tensor.is_complex()


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a single number"
