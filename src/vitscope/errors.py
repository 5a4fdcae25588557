"""Every error that vitscope raises on purpose.

.. code-block:: text

    VitscopeError
    ├── CallError               the call was wrong, nothing was tried      (command line: exit code 2)
    │   ├── UnknownModelError     no such model, or a module without what was asked of it
    │   ├── ImageNotFoundError  a path that leads to no file
    │   └── OutputExistsError     a result would replace a file nobody offered
    ├── UnsupportedModelError   the call is right, this model cannot do it  (command line: exit code 2)
    │   ├── NoAttentionError      the model ran without attention
    │   └── UnclearOutputError    which part of the output are the classes is uncertain
    └── WorkError               the call was right, the work failed        (command line: exit code 1)
        ├── ModelUnavailableError the weights or their library cannot be reached
        ├── ImageError          a file that is there but is no usable image
        └── SaveError             a result could not be written; what was there is still there

A message is one line that says what was got, what was expected and what to do.
"""

import inspect
import warnings


class VitscopeError(Exception):
    """The root: catch this to catch everything vitscope raises on purpose."""

    exit_code = 1


class VitscopeWarning(UserWarning):
    """The work went on, and something about it should be known."""


class CallError(VitscopeError, ValueError):
    """An argument has a value or shape that cannot be meant."""

    exit_code = 2


class UnknownModelError(CallError):
    """The name or module is not a vision model that can be read."""


class UnsupportedModelError(VitscopeError):
    """The model runs, but it has not what the call needs, or vitscope cannot show truthfully what it does."""

    exit_code = 2


class NoAttentionError(UnsupportedModelError):
    """The model never called attention."""


class ImageNotFoundError(CallError, FileNotFoundError):
    """The path of an image leads nowhere, or to a folder."""


class OutputExistsError(CallError, FileExistsError):
    """The output path is taken and overwriting was not allowed."""


class WorkError(VitscopeError, RuntimeError):
    """The call made sense, carrying it out failed."""


class ModelUnavailableError(WorkError):
    """Weights or a library are out of reach."""


class ImageError(WorkError):
    """A file that exists but does not hold a usable image."""


class SaveError(WorkError, OSError):
    """A result could not be written. What stood at its path before is untouched."""


LONGEST_QUOTE = 300


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}…"


def quoted_error(error: BaseException) -> str:
    """Return the class of an error and the first line of what it says, to be quoted in a message."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def warn(message: str) -> None:
    """A :class:`VitscopeWarning` that points at the line which called vitscope."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("vitscope", "jaxtyping"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, VitscopeWarning, stacklevel=level + 1)
