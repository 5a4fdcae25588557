"""What stands between the command line and its two streams: encodings, control characters, streams that end."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vitscope.errors import WorkError
from vitscope.views.plain_text import escape, is_control, visible

# What is written in place of a character that the encoding of a stream lacks.
ASCII = {
    **{"█": "#", "━": "-", "─": "-", "╸": "-", "╺": "-", "│": "|", "•": "*", "▲": "^", "▼": "v", "·": "*"},
    **{"×": "x", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "±": "+-"},
    **{"²": "2", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u202f": " "},
}
# The sequences that rich and typer write to a terminal for colours and progress bars; no others pass.
_STYLES = re.compile(r"\x1b\[[0-9;]*m")
_BARS = re.compile(r"\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]|\r")
FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE", "PY_COLORS")


def say(text: str, *, err: bool = False) -> None:
    """Print one line; its control characters are escaped.

    Raises:
        WorkError: the stream is closed or its disk is full.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream.write(f"{visible(text)}\n")
        stream.flush()


@contextmanager
def safe_stderr() -> Iterator[None]:
    """While held, stderr takes any text, and what nobody can read there is no error."""
    before = sys.stderr
    if before is not None:
        sys.stderr = SafeStream(before, _BARS)
    try:
        yield
    finally:
        sys.stderr = before


@contextmanager
def safe_stdout() -> Iterator[None]:
    """While held, stdout takes any text; it is flushed in the end.

    Raises:
        WorkError: it is closed, nobody reads it any more, or its disk is full.
    """
    before = sys.stdout
    if before is None:
        raise WorkError("cannot print: stdout is closed; redirect it to a file or to /dev/null")
    sys.stdout = SafeStream(before, _STYLES, needed=True)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before


class SafeStream:
    """A text stream in any encoding, whose errors are one line, or none if it is not ``needed``.

    A character that the encoding lacks is replaced by ASCII. Of the control characters only newlines pass, and on a
    terminal the sequences that set colours and redraw progress bars. There is no ``buffer``, which the parser of the
    command line would otherwise wrap in UTF-8 if the encoding is ASCII.
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
            raise TypeError(f"text is expected, not {type(text).__name__}")
        with self._one_line():
            if text:
                self._stream.write(fitting(_tamed(text, self._sequences), self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._one_line():
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
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            give_up(self._stream)
            self._failure = getattr(error, "strerror", None) or "it is closed"
        if self._failure and self._needed:  # again and again, for some libraries ignore it
            raise WorkError(f"cannot print to stdout: {self._failure}") from None


def give_up(stream: Any) -> None:
    """Lead a stream nowhere, so that what is left in its buffer is no error when Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def fitting(text: str, encoding: str) -> str:
    """Return the text with what an encoding lacks replaced by ASCII."""
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


def _tamed(text: str, sequences: re.Pattern[str] | None) -> str:
    """The text with control characters escaped, except newlines and ``sequences``."""
    if text.isprintable():
        return text
    parts = [text] if sequences is None else re.split(f"({sequences.pattern})", text)
    return "".join(part if at % 2 else "".join(map(_line_or_escape, part)) for at, part in enumerate(parts))


def _line_or_escape(letter: str) -> str:
    return escape(letter) if letter != "\n" and is_control(letter) else letter
