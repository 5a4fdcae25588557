"""Writing results so that nothing which existed is lost."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitscope.errors import OutputExistsError, SaveError


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes ``path``'s place when the block ends well.

    The new file has the same suffix, so writers that look at it choose the same format.

    Raises:
        OutputExistsError: ``path`` is taken and ``overwrite`` is False.
        SaveError: the folder cannot be written to, the disk is full, …; an older file at ``path`` survives.
    """
    path = Path(path)
    try:
        taken, folder, plain = path.exists(), path.is_dir(), path.is_file()
        parent = path.parent
        misplaced = parent.exists() and not parent.is_dir()
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from None
    if folder:
        raise OutputExistsError(f"{path} is a folder, a result needs the path of a file")
    if taken and not plain:
        raise OutputExistsError(f"{path} is a device or a pipe, a result needs the path of a file")
    if taken and not overwrite:
        raise OutputExistsError(f"{path} exists already: choose another name or allow overwriting")
    if misplaced:
        raise SaveError(f"cannot write {path}: {parent} is a file, not a folder")
    # Without the stem: a name as long as the disk allows stays possible.
    beside = path.with_name(f".{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill; it takes ``path``'s place when the block ends well.

    Raises:
        SaveError: it cannot be written; an older folder at ``path`` survives.
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        yield beside
        take_place(beside, path)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def take_place(beside: Path, path: Path) -> None:
    """Put a folder where another one was, which is there until the new one is.

    Raises:
        SaveError: it cannot be moved; the older folder survives.
    """
    old = path.with_name(f".{secrets.token_hex(4)}")
    try:
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except OSError as error:
        if old.exists():
            old.rename(path)
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)
