"""Text from file names, labels and messages, with its control characters spelled out."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # invisible, but part of emoji and of words in Persian and Hindi
_SUSPECT = re.compile(r"[^ -~\u00a1-\u00ac\u00ae-\u02ff]")  # what is not plain text for certain


def visible(text: str) -> str:
    """Return the text with every control character as an escape: ESC becomes ``\\x1b``, a newline ``\\n``.

    Control characters are those of ASCII and C1, line and paragraph separators, lone surrogates, and invisible
    formatting characters such as U+202E, which reverses what follows.
    """
    return _SUSPECT.sub(lambda match: escape(match[0]) if is_control(match[0]) else match[0], text)


def is_control(letter: str) -> bool:
    """Return whether a terminal or a font would act on a character instead of showing it."""
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in JOINERS


def escape(letter: str) -> str:
    """Return a character as Python writes it in a string of ASCII."""
    return letter.encode("unicode_escape").decode("ascii")
