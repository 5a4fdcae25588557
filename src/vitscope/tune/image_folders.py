"""The folders of a data set on disk: what is in them, followed through links, and nothing left out without a word."""

import os
import stat
from pathlib import Path

from PIL import Image

from vitscope.errors import CallError, ImageError
from vitscope.images.sources import KINDS

SUFFIXES = tuple(Image.registered_extensions())
_KINDS = {**KINDS, stat.S_IFDIR: "a folder"}


def class_folders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name; links to folders count.

    Raises:
        CallError: the folder cannot be read, a link leads nowhere, or a name is not UTF-8.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CallError(f"{printable(folder)} cannot be read: {error.strerror or error}") from None
    for entry in entries:
        if entry.is_symlink() and _mode(entry) is None and (not entry.suffix or _named_as_image(entry)):
            raise CallError(f"{printable(entry)} is a link that leads nowhere: mend or delete it")
    return [entry for entry in entries if (mode := _mode(entry)) is not None and stat.S_ISDIR(mode)]


def class_name(folder: Path) -> str:
    """The name of a class's folder, which labels and files must be able to hold."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise CallError(f"{printable(folder)} has a name that is not UTF-8: rename this folder") from None
    return folder.name


def image_files(folder: Path) -> list[Path]:
    """Everything below a class's folder that has the name of an image, in order.

    Also what will not be readable: links that lead nowhere or back, folders that cannot be opened or hold nothing
    and have an image's name.
    """
    return sorted(_below(folder, (_identity(folder.parent), _identity(folder))))


def check_regular(path: Path) -> None:
    """Refuse what is no ordinary file before it is opened: a pipe would be waited for for ever.

    Raises:
        ImageError: it is none.
    """
    mode = _mode(path)
    if mode is None:
        link = path.is_symlink()
        raise ImageError(f"{printable(path)} {'is a link that leads nowhere' if link else 'does not exist'}")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{printable(path)} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file")


def printable(path: str | Path) -> str:
    """A path as text that every file and terminal takes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _below(folder: Path, above: tuple[tuple[int, int] | None, ...]) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return [folder]
    found: list[Path] = []
    for entry in entries:
        mode = _mode(entry)
        if mode is not None and stat.S_ISDIR(mode):
            identity = _identity(entry)
            inside = [] if identity in above else _below(entry, (*above, identity))
            looped, empty = identity in above, _named_as_image(entry) and not inside
            found += [entry] if looped or empty else inside
        elif _visible(entry) and (_named_as_image(entry) or (mode is None and not entry.suffix)):
            found.append(entry)
    return found


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _mode(path: Path) -> int | None:
    """Of what a path leads to; None where that is nothing."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def _named_as_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")
