"""Writing results so that nothing which existed is lost."""

import secrets
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
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder, a result needs the path of a file")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already: choose another name or allow overwriting")
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
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
