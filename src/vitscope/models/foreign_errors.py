"""Errors of other libraries, quoted after what vitscope was doing."""

from collections.abc import Iterator
from contextlib import contextmanager

from vitscope.errors import ModelUnavailableError, VitscopeError

LONGEST_QUOTE = 300


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}…"


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
        raise ModelUnavailableError(f"{what} failed ({type(error).__name__}: {first_line(error)})") from None
