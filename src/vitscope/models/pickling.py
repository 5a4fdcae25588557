"""Pickling of models, with a one-line error if a module or function cannot be pickled."""

import pickle
from typing import Any

from torch import Tensor, nn

from vitscope.errors import UnsupportedModelError, VitscopeError, quoted_error


def check_picklable(name: str, state: Any, protocol: int) -> None:
    """Raise an error if the objects that a model holds cannot be pickled.

    Pickle reports a problem from somewhere deep inside the module. The objects are therefore pickled once for the
    check, without the numbers of their tensors, which are large and can always be pickled.

    Args:
        name: name of the model in the error message.
        state: the objects.
        protocol: version of the pickle protocol.

    Raises:
        UnsupportedModelError: a class or function among them is local, or an object cannot be pickled.
    """
    try:
        _StructurePickler(_Discard(), protocol).dump(state)
    except VitscopeError:  # raised by a model inside the model
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} cannot be pickled ({quoted_error(error)}): define its classes, functions and hooks at the top "
            "level of a Python file"
        ) from error


class _StructurePickler(pickle.Pickler):
    """A pickler of everything except the numbers of tensors."""

    def persistent_id(self, obj: Any) -> str | None:
        """Return an identifier in place of a plain tensor."""
        plain = type(obj) in (Tensor, nn.Parameter) and not vars(obj) and not obj._backward_hooks
        return "tensor" if plain else None


class _Discard:
    """A file that discards what is written to it."""

    def write(self, data: Any) -> int:
        """Return the number of bytes that a file would have written."""
        return len(data)
