"""Errors of a model's own module, as errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vitscope.errors import CallError, WorkError, quoted_error
from vitscope.models.evaluation import lacks_memory

# The errors that a module may raise for an input that it does not accept.
_MODULE_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError, ImportError)


@contextmanager
def quoted_module_errors(name: str, pixels: Tensor) -> Iterator[None]:
    """Turn an error of a module into a one-line error that names the shape of its input.

    Args:
        name: name of the model.
        pixels: the input of the module.

    Raises:
        CallError: the module does not accept this input.
        WorkError: the module failed; its own error is quoted.
    """
    try:
        yield
    except _MODULE_ERRORS as error:
        # Errors of the caller's classes go to the caller; the batch loop handles errors about missing memory.
        is_callers = type(error).__module__.partition(".")[0] not in ("builtins", "torch", "einops")
        if is_callers or lacks_memory(error):
            raise
        height, width = pixels.shape[-2:]
        if isinstance(error, AssertionError) and str(error):
            raise CallError(f"{name} does not accept an input of {height}×{width} pixels: {error}") from None
        shape = "×".join(map(str, pixels.shape))
        raise WorkError(
            f"{name} failed on an input of {shape} (batch×channel×height×width): {quoted_error(error)}"
        ) from error
