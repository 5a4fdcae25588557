"""Weights and the module that they fill: unless every tensor fits, nothing is loaded."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitscope.errors import ModelUnavailableError, warn
from vitscope.models.backends.names import COMPUTED_BUFFERS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES_LISTED = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mismatch:
    """The differences between weights and the module that they should fill; falsy if there are none.

    Attributes:
        missing: names in the module that the weights do not have.
        unexpected: names in the weights that the module does not have.
        shapes: name, shape in the file and shape in the module of each weight whose shapes differ.
        dtypes: name and dtype of each weight that should be a floating-point or whole number but is not.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[tuple[str, Shape, Shape], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.dtypes)

    def __str__(self) -> str:
        differences = []
        if self.missing:
            differences.append(f"{len(self.missing)} missing ({list_names(self.missing)})")
        if self.unexpected:
            differences.append(f"{len(self.unexpected)} unexpected ({list_names(self.unexpected)})")
        if self.shapes:
            shapes = [
                f"{name}: {_shape_text(saved)} in the file, {_shape_text(expected)} in the model"
                for name, saved, expected in self.shapes
            ]
            differences.append(f"{len(self.shapes)} of another shape ({list_names(shapes, '; ')})")
        if self.dtypes:
            dtypes = [f"{name}: {dtype}" for name, dtype in self.dtypes]
            differences.append(f"{len(self.dtypes)} of another dtype ({list_names(dtypes)})")
        return ", ".join(differences)


def list_names(names: Collection[str], separator: str = ", ") -> str:
    """Return the first names in alphabetical order, with an ellipsis if there are more."""
    ordered = sorted(names)
    return separator.join([*ordered[:NAMES_LISTED], *(["…"] if len(ordered) > NAMES_LISTED else [])])


def compare(module: nn.Module, state: Mapping[str, Tensor]) -> Mismatch:
    """Return the differences between ``state`` and the weights that ``module`` needs.

    Buffers that the class computes itself may be missing or left over. A tensor that has several names in the module
    needs only one of them in ``state``.
    """
    expected = module.state_dict(keep_vars=True)
    present = {id(expected[name]) for name in state if name in expected}
    buffers = {name for name, _ in module.named_buffers()}
    missing = [
        name
        for name, tensor in expected.items()
        if name not in state and id(tensor) not in present and not is_computed(name) and isinstance(tensor, Tensor)
    ]
    unexpected = [name for name in state if name not in expected and not (is_computed(name) or name in buffers)]
    common = [
        (name, state[name], tensor) for name, tensor in expected.items() if name in state and isinstance(tensor, Tensor)
    ]
    shapes = [(name, tuple(a.shape), tuple(b.shape)) for name, a, b in common if a.shape != b.shape]
    dtypes = [(name, dtype_name(a)) for name, a, b in common if not _same_kind(a, b)]
    return Mismatch(tuple(missing), tuple(unexpected), tuple(shapes), tuple(dtypes))


def fit_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights under the names that the module uses; the module is not changed.

    If all names lack a prefix that the module uses, or share an extra one (``module.``, ``backbone.``, …), the prefix
    is added or removed with a warning.

    Args:
        module: the module that the weights should fill.
        state: the weights by name.
        name: name of the weights in messages.

    Raises:
        ModelUnavailableError: weights are missing, left over, or of another shape or dtype.
    """
    mismatch = compare(module, state)
    if not mismatch:
        return _complete(module, state, name)
    for prefix, renamed in _rename(module, state):
        if not compare(module, renamed):
            warn_about_prefix(name, prefix, added=len(next(iter(renamed))) > len(next(iter(state))))
            return _complete(module, renamed, name)
    raise ModelUnavailableError(f"{name} does not fit {type(module).__name__}: {mismatch}")


def head_rows(state: Mapping[str, Tensor], heads: Sequence[str]) -> int | None:
    """Return the number of classes of the classifiers in these weights; None if there are none or they differ.

    Args:
        state: the weights by name.
        heads: paths of the classifiers in the module; in the file, they may have a prefix.
    """
    names = tuple(f"{head}.weight" for head in heads)
    ends = tuple(f".{name}" for name in names)
    rows = {
        tensor.shape[0] for name, tensor in state.items() if tensor.ndim == 2 and (name in names or name.endswith(ends))
    }
    return rows.pop() if len(rows) == 1 else None


def warn_about_prefix(name: str, prefix: str, *, added: bool) -> None:
    """Warn that the names in a file differ from the model's by a prefix."""
    verb = "added to" if added else "removed from"
    warn(f"{name}: the prefix {prefix!r} was {verb} every name so that the weights fit the model")


def common_prefixes(names: Collection[str]) -> list[str]:
    """Return the dotted prefixes that all names share, shortest first: ``["module.", "module.model."]``."""
    split = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for components in zip(*split, strict=False):
        if len(set(components)) > 1:
            break
        shared.append(components[0])
    return [".".join(shared[: i + 1]) + "." for i in range(len(shared))]


def is_computed(name: str) -> bool:
    """Return whether a name is that of a buffer that its class computes from its sizes."""
    return name.rpartition(".")[2] in COMPUTED_BUFFERS


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, or of its layout if it is not dense."""
    return str(tensor.dtype).removeprefix("torch.") if tensor.layout == torch.strided else str(tensor.layout)


def _rename(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for prefix in common_prefixes(state.keys()):
        yield prefix, {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for prefix in common_prefixes(module.state_dict().keys()):
        yield prefix, {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _complete(module: nn.Module, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Add the other names of shared weights and the buffers that the class computed."""
    expected = module.state_dict(keep_vars=True)
    shared: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if key not in expected:
            continue
        if not torch.equal(shared.setdefault(id(expected[key]), tensor), tensor):
            raise ModelUnavailableError(
                f"{name} does not fit {type(module).__name__}: the model shares {key} with another name, but the file "
                "has two different tensors"
            )
    return {key: shared[id(tensor)] if id(tensor) in shared else tensor.detach() for key, tensor in expected.items()}


def _same_kind(tensor: Tensor, expected: Tensor) -> bool:
    """Return whether a dense tensor is of the module's kind: floating-point numbers, or whole numbers."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    if expected.is_floating_point():
        return tensor.dtype in FLOATS
    return not tensor.is_floating_point() and not tensor.is_complex()


def _shape_text(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a single number"
