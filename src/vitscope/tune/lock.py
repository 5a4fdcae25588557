"""A lock on the folder of a run: only one process at a time may work on it."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitscope.errors import CallError, SaveError, WorkError
from vitscope.files import hidden_name

# Without support for locks, or without write access, the run continues. It fails later if it has to write.
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EROFS, errno.EPERM}
BUSY = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is a hidden file next to the folder.

    The system releases the lock when the process ends for any reason, so a killed run does not block the next one.

    Raises:
        WorkError: another process or thread works on the folder.
        CallError: the folder is a file, or lies inside one.
        SaveError: the lock cannot be written.
    """
    path = hidden_name(out, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, out)
    except (NotADirectoryError, FileExistsError):
        raise CallError(f"{out} is a file or lies inside one: choose another --out") from None
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        if error.errno not in WITHOUT_LOCKS:
            raise SaveError(f"cannot write {out}: {error.strerror or error}") from None
        file = None
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()
            os.close(file)


def _acquire(path: Path, out: Path) -> int:
    """Return the descriptor of the locked file."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
        except OSError as error:
            os.close(file)
            if error.errno not in BUSY:
                raise
            raise WorkError(
                f"another run works on {out}{_describe_process(path)}: wait until it ends, or choose another --out"
            ) from None
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        os.close(file)  # the previous process has deleted the file, so this lock has no effect


def _lock(file: int) -> None:
    """Lock a file, or raise OSError immediately if it is locked."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _describe_process(path: Path) -> str:
    """Return the process that holds the lock, as text; empty if it cannot be read."""
    try:
        return f" (process {int(path.read_text(encoding='ascii'))})"
    except (OSError, ValueError):
        return ""
