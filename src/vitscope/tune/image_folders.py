"""Class folders and image files on disk. Links are followed, and no image file is left out silently."""

import os
import stat
from pathlib import Path

from PIL import Image

from vitscope.errors import CallError, ImageError
from vitscope.images.sources import KINDS

# Pillow also writes formats that it cannot read, such as PDF.
SUFFIXES = (
    *(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN),
    *(".dcm", ".dicom", ".nii"),
)
_KINDS = {**KINDS, stat.S_IFDIR: "a folder"}


def class_folders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name; links to folders count.

    Raises:
        CallError: the folder cannot be read, or a link is broken.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CallError(f"{printable(folder)} cannot be read: {error.strerror or error}") from None
    for entry in entries:
        if entry.is_symlink() and _mode(entry) is None and (not entry.suffix or _has_image_suffix(entry)):
            raise CallError(f"{printable(entry)} is a broken link: repair or delete it")
    return [entry for entry in entries if (mode := _mode(entry)) is not None and stat.S_ISDIR(mode)]


def class_name(folder: Path) -> str:
    """Return the name of a class folder.

    Raises:
        CallError: the name is not UTF-8, so it cannot be a label.
    """
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise CallError(f"{printable(folder)} has a name that is not UTF-8: rename this folder") from None
    return folder.name


def image_files(folder: Path) -> list[Path]:
    """Return the sorted paths below a class folder that are named like an image.

    This includes paths that cannot be read later: broken links, links that lead back to a parent, folders that cannot
    be opened, and empty folders that are named like an image.
    """
    return sorted(_image_files(folder, (_identity(folder.parent), _identity(folder))))


def check_regular(path: Path) -> None:
    """Check that a path leads to a regular file before it is opened: opening a pipe would block forever.

    Raises:
        ImageError: the path leads to something else, or to nothing.
    """
    mode = _mode(path)
    if mode is None:
        raise ImageError(f"{printable(path)} {'is a broken link' if path.is_symlink() else 'does not exist'}")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{printable(path)} is {_KINDS.get(stat.S_IFMT(mode), 'not a file')}, not a file")


def printable(path: str | Path) -> str:
    """Return a path as text that every file and terminal accepts."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _image_files(folder: Path, ancestors: tuple[tuple[int, int] | None, ...]) -> list[Path]:
    """Return the paths below a folder that are named like images; links back to a parent are not followed."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return [folder]
    paths: list[Path] = []
    for entry in entries:
        mode = _mode(entry)
        if mode is not None and stat.S_ISDIR(mode):
            identity = _identity(entry)
            is_loop = identity in ancestors
            nested = [] if is_loop else _image_files(entry, (*ancestors, identity))
            is_empty_image = _has_image_suffix(entry) and not nested
            paths += [entry] if is_loop or is_empty_image else nested
        elif not entry.name.startswith(".") and (_has_image_suffix(entry) or (mode is None and not entry.suffix)):
            paths.append(entry)
    return paths


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder; None if it cannot be read."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _mode(path: Path) -> int | None:
    """Return the mode of the file that a path leads to; None if there is none."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def _has_image_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or path.name.lower().endswith(".nii.gz")
