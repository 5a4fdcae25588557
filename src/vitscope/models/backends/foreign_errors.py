"""Errors of other libraries, quoted after what vitscope was doing."""

from collections.abc import Iterator
from contextlib import contextmanager

from vitscope.errors import ModelUnavailableError, VitscopeError, quoted_error


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Turn any exception that is not vitscope's own into one line.

    Args:
        what: the beginning of the sentence, as in ``"X cannot be loaded: building ViTModel"``.

    Raises:
        ModelUnavailableError: an exception came out of the block. Interrupts pass through.
    """
    try:
        yield
    except VitscopeError:
        raise
    except Exception as error:
        raise ModelUnavailableError(f"{what} failed ({quoted_error(error)})") from None
