"""Whom training tells about its steps: nobody, a function, or a bar on stderr."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vitscope.errors import CallError
from vitscope.methods._perturbation import progress_bar

Progress = Callable[[Mapping[str, float | int]], None]
CellProgress = Callable[[str, Mapping[str, float | int]], None]


@contextmanager
def training_progress(progress: Any, what: str = "training") -> Iterator[Progress | None]:
    """Yield a function of a mapping with step, steps and accuracy; True shows a bar if stderr is a terminal."""
    if callable(progress):
        yield progress
        return
    _check(progress, "a mapping with step, steps and accuracy")
    with progress_bar(bool(progress), what) as tell:
        yield None if tell is None else lambda now: tell(int(now["step"]), int(now["steps"]))


@contextmanager
def cells_progress(progress: Any) -> Iterator[CellProgress | None]:
    """The same for several trainings one after another; the name of each goes first."""
    if callable(progress):
        yield progress
        return
    _check(progress, "a cell's name and a mapping with step, steps and accuracy")
    with progress_bar(bool(progress), "training") as tell:
        yield None if tell is None else lambda _, now: tell(int(now["step"]), int(now["steps"]))


def _check(progress: Any, of: str) -> None:
    if progress is not None and not isinstance(progress, bool):
        raise CallError(f"progress is {progress!r}: pass True, False, or a function of {of}")
