"""Safe output streams: any encoding, no control characters, and one line if a stream fails."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vitscope.errors import WorkError
from vitscope.views.plain_text import escape, is_control, visible

# Replacements for characters that the encoding of a stream lacks.
ASCII = {
    **{"█": "#", "━": "-", "─": "-", "╸": "-", "╺": "-", "│": "|", "•": "*", "▲": "^", "▼": "v", "·": "*"},
    **{"×": "x", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "±": "+-"},
    **{"²": "2", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u202f": " "},
}
# Escape sequences that rich and typer write for colours and progress bars. All others are escaped.
_STYLES = re.compile(r"\x1b\[[0-9;]*m")
_BARS = re.compile(r"\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]|\r")
FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE", "PY_COLORS")


def say(text: str, *, err: bool = False) -> None:
    """Print one line, with its control characters escaped.

    Raises:
        WorkError: stdout is closed or its disk is full.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream.write(f"{visible(text)}\n")
        stream.flush()


@contextmanager
def safe_stderr() -> Iterator[None]:
    """Let stderr accept any text, and ignore it if stderr cannot be written."""
    original = sys.stderr
    if original is not None:
        sys.stderr = SafeStream(original, _BARS)
    try:
        yield
    finally:
        sys.stderr = original


@contextmanager
def safe_stdout() -> Iterator[None]:
    """Let stdout accept any text, and flush it at the end.

    Raises:
        WorkError: stdout is closed, its reader has gone, or its disk is full.
    """
    original = sys.stdout
    if original is None:
        raise WorkError("cannot print: stdout is closed; redirect it to a file or to /dev/null")
    sys.stdout = SafeStream(original, _STYLES, needed=True)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = original


class SafeStream:
    """A text stream that accepts any text.

    Characters that the encoding lacks are replaced by ASCII. Control characters are escaped, except newlines and, on a
    terminal, the ``sequences`` that set colours and redraw progress bars. An error of the stream raises WorkError if
    the stream is ``needed`` and is ignored otherwise. The attribute ``buffer`` is hidden, because the command line
    parser would wrap it in UTF-8 if the encoding is ASCII.
    """

    def __init__(self, stream: Any, sequences: re.Pattern[str], *, needed: bool = False) -> None:
        self._stream, self._needed = stream, needed
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"
        self.errors: str = "strict"
        self._failure = ""
        styled = self.isatty() or any(os.environ.get(variable) for variable in FORCED)
        self._sequences = sequences if styled else None

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"cannot write {type(text).__name__}: pass text")
        with self._errors_in_one_line():
            if text:
                self._stream.write(fitting(_escaped(text, self._sequences), self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._errors_in_one_line():
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    @contextmanager
    def _errors_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            give_up(self._stream)
            self._failure = getattr(error, "strerror", None) or "it is closed"
        if self._failure and self._needed:  # at every call, because some libraries ignore the first error
            raise WorkError(f"cannot print to stdout: {self._failure}") from None


def give_up(stream: Any) -> None:
    """Redirect a stream to the null device, so that flushing its buffer at exit does not fail."""
    with suppress(OSError, ValueError, AttributeError):
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, stream.fileno())
        os.close(null_device)


def fitting(text: str, encoding: str) -> str:
    """Return the text, with ASCII in place of characters that the encoding lacks."""
    if _encodes(text, encoding):
        return text
    return "".join(letter if _encodes(letter, encoding) else ASCII.get(letter, escape(letter)) for letter in text)


def _encodes(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeError:
        return False
    except LookupError:
        return text.isascii()
    return True


def _escaped(text: str, sequences: re.Pattern[str] | None) -> str:
    """Return the text with control characters escaped, except newlines and ``sequences``."""
    if text.isprintable():
        return text
    pieces = [text] if sequences is None else re.split(f"({sequences.pattern})", text)
    # Every second piece is one of the sequences.
    return "".join(piece if i % 2 else "".join(map(_escaped_character, piece)) for i, piece in enumerate(pieces))


def _escaped_character(letter: str) -> str:
    return escape(letter) if letter != "\n" and is_control(letter) else letter
