"""Writing results so that nothing which existed is lost, also when the process is killed while it writes."""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitscope.errors import CallError, OutputExistsError, SaveError

# Temporary names say which machine and process writes, so that what a killed process left can be told from work that
# goes on. Without the name of the result: a name as long as the disk allows stays possible.
TEMPORARY = re.compile(r"^\.vs-([0-9a-f]{4})-([0-9a-f]+)-[0-9a-f]{8}(\.[^.]*)?$")
HOST = hashlib.blake2b(socket.gethostname().encode(errors="replace"), digest_size=2).hexdigest()
LONGEST_NAME = 255  # bytes
ABANDONED_SECONDS = 86_400  # where nobody can tell whether a process lives

# What a file system answers that has no hard links, or no exchange of two names.
NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK}
RENAME_EXCHANGE, AT_FDCWD = 2, -100

_writing: set[str] = set()  # temporary names that this process works on


def require_path(value: Any, what: str) -> Path:
    """Return the value as a path, or refuse it in one line."""
    if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str):
        if not os.fspath(value) or "\0" in os.fspath(value):
            raise CallError(f"{what} is {os.fspath(value)!r}: the path of a file or folder is expected")
        return Path(value)
    raise CallError(f"{what} is {value!r}: a path is expected, as text or a pathlib.Path")


@contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes ``path``'s place when the block ends well.

    The new file has the same suffix, so writers that look at it choose the same format. Without ``overwrite`` a file
    that another process wrote meanwhile is not replaced either.

    Raises:
        OutputExistsError: ``path`` is taken and ``overwrite`` is False.
        SaveError: the folder cannot be written to, the disk is full, …; an older file at ``path`` survives.
    """
    path = require_path(path, "path")
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
        raise _taken(path)
    if misplaced:
        raise SaveError(f"cannot write {path}: {parent} is a file, not a folder")
    beside = path.with_name(_temporary_name(path.suffix))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporary(path.parent)
        yield beside
        _open_to_readers(beside, path.parent)
        if overwrite:
            beside.replace(path)
        else:
            _move_to_free_name(beside, path)
    except FileExistsError as error:
        if isinstance(error, OutputExistsError) or overwrite:
            raise
        raise _taken(path) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        _writing.discard(beside.name)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill; it takes ``path``'s place when the block ends well.

    Raises:
        SaveError: it cannot be written; an older folder at ``path`` survives.
    """
    path = require_path(path, "path")
    beside = path.with_name(_temporary_name())
    try:
        beside.mkdir(parents=True)
        sweep_temporary(path.parent)
        yield beside
        for entry in beside.rglob("*"):
            if entry.is_file():
                _open_to_readers(entry, beside)
        take_place(beside, path)
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _writing.discard(beside.name)


def take_place(beside: Path, path: Path) -> None:
    """Put a folder where another one was; the old one is deleted.

    Where the system can exchange two names, one of the two is at ``path`` at every moment. Elsewhere a process that is
    killed between two renames leaves the old folder under :func:`old_name`, and :func:`recover` puts it back.

    Raises:
        SaveError: it cannot be moved; the older folder survives.
    """
    old = old_name(path)
    try:
        if not path.exists():
            beside.rename(path)
        elif _exchange(beside, path):
            discard(beside)
        else:
            discard(old)
            path.rename(old)
            beside.rename(path)
            discard(old)
    except OSError as error:
        if not path.exists() and old.exists():
            old.rename(path)
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def recover(path: Path) -> None:
    """Finish what a killed :func:`take_place` left: the old folder comes back if nothing stands at ``path``."""
    old = old_name(path)
    if not old.is_dir():
        return
    if path.exists():
        discard(old)
    else:
        old.rename(path)


def discard(folder: Path) -> None:
    """Delete a folder under a temporary name, so that a half-deleted one is never taken for a whole one."""
    if not folder.is_dir():
        return
    gone = folder.with_name(_temporary_name())
    try:
        folder.rename(gone)
        if gone.is_symlink():
            gone.unlink()
        shutil.rmtree(gone, ignore_errors=True)
    finally:
        _writing.discard(gone.name)


def sweep_temporary(folder: Path) -> None:
    """Delete what killed processes left in a folder while they wrote."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if is_temporary(entry.name) and _abandoned(entry)]:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink()


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that is being written, or was when its process was killed."""
    return TEMPORARY.match(name) is not None


def hidden_name(path: Path, ending: str) -> Path:
    """A hidden path beside ``path`` that always is the same."""
    path = path.resolve() if path.name in ("", "..") else path
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()}.{ending}"
    return path.with_name(name)


def old_name(path: Path) -> Path:
    """Where :func:`take_place` puts an old folder for a moment."""
    return hidden_name(path, "old")


def _taken(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path} exists already: choose another name or allow overwriting")


def _temporary_name(suffix: str = "") -> str:
    name = f".vs-{HOST}-{os.getpid():x}-{secrets.token_hex(4)}{suffix}"
    _writing.add(name)
    return name


def _abandoned(entry: os.DirEntry[str]) -> bool:
    """Whether nobody works on this temporary file any more; one of another machine is left alone."""
    found = TEMPORARY.match(entry.name)
    if found is None or found[1] != HOST:
        return False
    process = int(found[2], 16)
    if process == os.getpid():
        return entry.name not in _writing
    if os.name != "posix":  # there, signal 0 ends a process
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS
    return not process_lives(process)


def process_lives(process: int) -> bool:
    """Whether a process of this machine runs (POSIX)."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _move_to_free_name(beside: Path, path: Path) -> None:
    """Rename without replacing.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(beside, path)
        return
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # an empty file claims the name
    try:
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _open_to_readers(file: Path, folder: Path) -> None:
    """Give a file that its writer made private the mode that new files have here."""
    if os.name != "posix" or stat.S_IMODE(file.stat().st_mode) & 0o077:
        return
    probe = folder / _temporary_name()
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        _writing.discard(probe.name)
    if mode != stat.S_IMODE(file.stat().st_mode):
        file.chmod(mode)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    sys.audit("os.rename", str(first), str(second), -1, -1)
    paths = os.fsencode(first), os.fsencode(second)
    if rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first))
