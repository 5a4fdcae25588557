"""The errors that vitscope raises on purpose.

.. code-block:: text

    VitscopeError
    ├── CallError                 an argument is wrong; no work was started         (command line: exit code 2)
    │   ├── UnknownModelError     the model is not known, or lacks a required module
    │   ├── ImageNotFoundError    the path does not lead to a file
    │   └── OutputExistsError     the result would overwrite an existing file
    ├── UnsupportedModelError     the arguments are valid; the model cannot do this (command line: exit code 2)
    │   ├── NoAttentionError      the model computes no attention
    │   ├── ReadoutError          the classifier reads other tokens than the layout says
    │   └── UnclearOutputError    it is unclear which part of the output holds the classes
    └── WorkError                 the arguments are valid; the work failed          (command line: exit code 1)
        ├── ModelUnavailableError the weights or their library are not available
        ├── ImageError            the file exists but does not hold a usable image
        └── SaveError             a result could not be written; an older file is unchanged

A message is one line: what was given, what is allowed, what to do.
"""

import inspect
import warnings
from typing import Any

MAX_QUOTE = 300  # characters that a message quotes from another library's error


class VitscopeError(Exception):
    """The base class of all errors that vitscope raises on purpose.

    Attributes:
        exit_code: exit code of the command line after this error.

    Examples:
        >>> import vitscope as vs
        >>> try:
        ...     vs.load("vit-nanoo")
        ... except vs.VitscopeError as error:
        ...     print(error)
        unknown model 'vit-nanoo': did you mean 'vit-nano'?
    """

    exit_code = 1


class VitscopeWarning(UserWarning):
    """A warning about a problem that did not stop the work.

    Examples:
        >>> import warnings, vitscope as vs
        >>> warnings.simplefilter("ignore", vs.VitscopeWarning)
    """


class CallError(VitscopeError, ValueError):
    """An argument whose value or shape is not allowed. It is also a ``ValueError``.

    Examples:
        >>> import vitscope as vs
        >>> try:
        ...     vs.Grid(0, 7)
        ... except vs.CallError as error:
        ...     print(error)
        height of a grid is 0, at least 1 is expected
    """

    exit_code = 2


class UnknownModelError(CallError):
    """A name or module that is not a supported vision model."""


class UnsupportedModelError(VitscopeError):
    """A model that runs, but lacks what the call needs or cannot be explained faithfully.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> from torch import nn
        >>> module = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = vs.load(module, image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
        >>> try:
        ...     vs.capture(model, skimage.data.chelsea())
        ... except vs.UnsupportedModelError as error:
        ...     print(type(error).__name__)
        NoAttentionError
    """

    exit_code = 2


class UnclearOutputError(UnsupportedModelError):
    """The model ran, but it is unclear which part of its output holds the classes.

    Attributes:
        returned: the ambiguous tensor, for callers that only need to know what it depends on; None if there is none.
    """

    def __init__(self, message: str, returned: Any = None) -> None:
        super().__init__(message)
        self.returned = returned


class ReadoutError(UnsupportedModelError):
    """The classifier reads other tokens than the layout says."""


class NoAttentionError(UnsupportedModelError):
    """A model that never calls attention."""


class ImageNotFoundError(CallError, FileNotFoundError):
    """An image path that leads to no file, or to a folder."""


class OutputExistsError(CallError, FileExistsError):
    """An output path that exists while overwriting is not allowed."""


class WorkError(VitscopeError, RuntimeError):
    """A failure of the work that a valid call started. It is also a ``RuntimeError``.

    Examples:
        >>> import tempfile, vitscope as vs
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "map.safetensors"
        >>> _ = path.write_text("text")
        >>> try:
        ...     vs.Attribution.load(path)
        ... except vs.WorkError as error:
        ...     print("not a saved result" in str(error))
        True
    """


class ModelUnavailableError(WorkError):
    """Weights or a library that are not available."""


class ImageError(WorkError):
    """A file that exists but does not hold a usable image."""


class SaveError(WorkError, OSError):
    """A result that could not be written. An older file at the same path is unchanged."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if len(line) <= MAX_QUOTE else f"{line[:MAX_QUOTE]}…"


def quoted_error(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, for use in another message."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def warn(message: str) -> None:
    """Issue a :class:`VitscopeWarning` that points at the line that called vitscope."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("vitscope", "jaxtyping"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, VitscopeWarning, stacklevel=level + 1)
