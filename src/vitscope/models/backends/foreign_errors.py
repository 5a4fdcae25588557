"""Errors of other libraries as one-line errors of vitscope."""

from collections.abc import Iterator
from contextlib import contextmanager

from vitscope.errors import ModelUnavailableError, VitscopeError, quoted_error


@contextmanager
def foreign_errors(action: str) -> Iterator[None]:
    """Turn every exception that is not vitscope's own into a one-line error.

    Args:
        action: beginning of the message, as in ``"X cannot be loaded: building ViTModel"``.

    Raises:
        ModelUnavailableError: the context raised another exception. Interrupts pass through.
    """
    try:
        yield
    except VitscopeError:
        raise
    except Exception as error:
        raise ModelUnavailableError(f"{action} failed ({quoted_error(error)})") from None
