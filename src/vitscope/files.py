"""Atomic writes: a file or folder is replaced as a whole or not at all, even if the process is killed meanwhile."""

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
from vitscope.validation import MAX_NAME_BYTES, short_repr, short_text

# A temporary name contains the machine and the process that write it, so that files left by a killed process can be
# distinguished from files still being written. It does not contain the result's name, which may already be as long as
# the file system allows.
TEMPORARY_NAME = re.compile(r"^\.vs-([0-9a-f]{4})-([0-9a-f]+)-[0-9a-f]{8}(\.[^.]*)?$")
HOST = hashlib.blake2b(socket.gethostname().encode(errors="replace"), digest_size=2).hexdigest()
ABANDONED_SECONDS = 86_400  # age at which a file counts as abandoned if the system cannot tell who is running

# Errors of file systems that have no hard links or cannot exchange two names.
NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK}
RENAME_EXCHANGE, AT_FDCWD = 2, -100

_writing: set[str] = set()  # temporary names that this process is using


def require_path(value: Any, name: str) -> Path:
    """Return the value as a path.

    Args:
        value: text or a path object.
        name: the argument's name, for the message.

    Raises:
        CallError: it is not text or a path object, is empty, or contains the character NUL.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise CallError(f"{name} is {short_repr(value)}: a path is expected, as text or a pathlib.Path")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise CallError(f"{name} is {short_repr(os.fspath(value))}: the path of a file or folder is expected")
    return Path(value)


def require_file_path(value: Any) -> Path:
    """Return the path of a file.

    Raises:
        CallError: it is not a path, or a name in it is too long.
    """
    path = require_path(value, "path")
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if longest > MAX_NAME_BYTES:
        raise CallError(
            f"path is {short_text(str(path), '')}, with a name of {longest} bytes: at most {MAX_NAME_BYTES} are allowed"
        )
    return path


@contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; the file written there replaces ``path`` at the end.

    If the block raises, the temporary file is deleted and ``path`` is unchanged. The temporary name has the suffix of
    ``path``, because some writers choose the format by it. Missing folders are created.

    Args:
        path: the file to write.
        overwrite: replace an existing file. If False, a file that another process creates in the meantime is kept too.

    Raises:
        OutputExistsError: ``path`` is a folder or device, or it exists and ``overwrite`` is False.
        SaveError: the folder is not writable, the disk is full, …; an older file at ``path`` is unchanged.
    """
    path = require_path(path, "path")
    try:
        exists, is_folder, is_file = path.exists(), path.is_dir(), path.is_file()
        parent_is_file = path.parent.exists() and not path.parent.is_dir()
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from None
    if is_folder:
        raise OutputExistsError(f"{path} is a folder: pass the path of a file")
    if exists and not is_file:
        raise OutputExistsError(f"{path} is a device or a pipe: pass the path of a file")
    if exists and not overwrite:
        raise _exists_error(path)
    if parent_is_file:
        raise SaveError(f"cannot write {path}: {path.parent} is a file, not a folder")
    temporary = path.with_name(_temporary_name(path.suffix))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_abandoned(path.parent)
        yield temporary
        _make_readable(temporary, path.parent)
        if overwrite:
            temporary.replace(path)
        else:
            _rename_to_free_name(temporary, path)
    except FileExistsError as error:
        if isinstance(error, OutputExistsError) or overwrite:
            raise
        raise _exists_error(path) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _writing.discard(temporary.name)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield the path of a new temporary folder next to ``path``; it replaces ``path`` at the end.

    Raises:
        SaveError: it cannot be written; an older folder at ``path`` is unchanged.
    """
    path = require_path(path, "path")
    temporary = path.with_name(_temporary_name())
    try:
        temporary.mkdir(parents=True)
        delete_abandoned(path.parent)
        yield temporary
        for entry in temporary.rglob("*"):
            if entry.is_file():
                _make_readable(entry, temporary)
        replace_folder(temporary, path)
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _writing.discard(temporary.name)


def replace_folder(new: Path, path: Path) -> None:
    """Move a folder to ``path`` and delete the older folder there.

    If the system can exchange two names, ``path`` exists at every moment. Otherwise a process that is killed between
    two renames leaves the older folder under :func:`old_name`, and :func:`recover` restores it.

    Raises:
        SaveError: the folder cannot be moved; the older folder is unchanged.
    """
    old = old_name(path)
    try:
        if not path.exists():
            new.rename(path)
        elif _exchange(new, path):
            delete_folder(new)
        else:
            delete_folder(old)
            path.rename(old)
            new.rename(path)
            delete_folder(old)
    except OSError as error:
        if not path.exists() and old.exists():
            old.rename(path)
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def recover(path: Path) -> None:
    """Complete an interrupted :func:`replace_folder`: restore the older folder if there is nothing at ``path``."""
    old = old_name(path)
    if not old.is_dir():
        return
    if path.exists():
        delete_folder(old)
    else:
        old.rename(path)


def delete_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a half-deleted folder is never taken for a complete one."""
    if not folder.is_dir():
        return
    temporary = folder.with_name(_temporary_name())
    try:
        folder.rename(temporary)
        if temporary.is_symlink():
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)
    finally:
        _writing.discard(temporary.name)


def delete_abandoned(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes left in a folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if is_temporary(entry.name) and _is_abandoned(entry)]:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink()


def is_temporary(name: str) -> bool:
    """Return whether a file name is a temporary name of this module."""
    return TEMPORARY_NAME.match(name) is not None


def hidden_name(path: Path, ending: str) -> Path:
    """Return a hidden path in the folder of ``path``, always the same for the same arguments."""
    path = path.resolve() if path.name in ("", "..") else path
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()}.{ending}"
    return path.with_name(name)


def old_name(path: Path) -> Path:
    """Return the path at which :func:`replace_folder` temporarily keeps the older folder."""
    return hidden_name(path, "old")


def _exists_error(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path} already exists: choose another name or allow overwriting")


def _temporary_name(suffix: str = "") -> str:
    name = f".vs-{HOST}-{os.getpid():x}-{secrets.token_hex(4)}{suffix}"
    _writing.add(name)
    return name


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    """Return whether no process is writing this temporary file any more; files of other machines count as in use."""
    match = TEMPORARY_NAME.match(entry.name)
    if match is None or match[1] != HOST:
        return False
    process = int(match[2], 16)
    if process == os.getpid():
        return entry.name not in _writing
    if os.name != "posix":  # on Windows, signal 0 ends a process
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS
    return not process_is_running(process)


def process_is_running(process: int) -> bool:
    """Return whether a process with this id runs on this machine (POSIX)."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _rename_to_free_name(file: Path, path: Path) -> None:
    """Rename a file unless the new name is taken.

    Raises:
        FileExistsError: ``path`` exists.
    """
    try:
        os.link(file, path)
        return
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # an empty file claims the name
    try:
        file.replace(path)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _make_readable(file: Path, folder: Path) -> None:
    """Give a file that its writer made private the mode that new files in this folder have."""
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
    """Exchange two names in one step; return False if the system does not support it."""
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
