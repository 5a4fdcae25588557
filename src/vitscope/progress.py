"""Progress reports: the event class, and the meaning of the parameter ``progress`` in every function."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vitscope.errors import CallError


@dataclass(frozen=True)
class Progress:
    """The progress of a long task, as a progress callback receives it.

    Attributes:
        description: the task in progress, such as ``"evaluating"`` or ``"training"``.
        completed: number of steps done so far.
        total: total number of steps; None if it is not known in advance.
        metrics: values measured in this step, such as ``{"accuracy": 0.93}``; often empty.

    Examples:
        >>> import vitscope as vs
        >>> def report(step: vs.Progress) -> None:
        ...     print(f"{step.description}: {step.completed} of {step.total}")
        >>> report(vs.Progress("evaluating", 10, 100))
        evaluating: 10 of 100
    """

    description: str
    completed: int
    total: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]
ProgressLike = bool | ProgressCallback | None
"""``True``: a bar on a terminal (stderr) or in a notebook, otherwise a line on stderr every 30 seconds. ``False`` or
``None``: no output. A callable: receives each event."""
LOG_SECONDS = 30.0  # between two lines in a log


@contextmanager
def progress_callback(progress: ProgressLike) -> Iterator[ProgressCallback]:
    """Yield a progress callback.

    Args:
        progress: see :data:`ProgressLike`.

    Raises:
        CallError: ``progress`` is neither a bool nor callable.

    Examples:
        >>> with progress_callback(lambda step: print(f"{step.completed}/{step.total}")) as report:
        ...     report(Progress("evaluating", 1, 2))
        1/2
    """
    if callable(progress):
        yield progress
    elif progress is None or progress is False:
        yield _ignore
    elif progress is True:
        with _bar() as callback:
            yield callback
    else:
        raise CallError(f"progress is {progress!r}: pass True, False, or a function that takes a vitscope.Progress")


def _ignore(_: Progress) -> None:
    """Do nothing."""


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    """Yield a callback that shows a bar on a terminal or in a notebook, and lines now and then in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        with _notebook_bar() as callback:
            yield callback
    elif not console.is_terminal:
        yield _Log(LOG_SECONDS)
    else:
        from rich.progress import Progress as Bar

        with Bar(console=console, transient=True) as bar:
            task: Any = bar.add_task("", total=None)
            yield lambda step: bar.update(
                task, description=step.description, completed=step.completed, total=step.total
            )


@contextmanager
def _notebook_bar() -> Iterator[ProgressCallback]:
    """Yield a callback that shows tqdm's bar: a widget if ipywidgets is installed, otherwise text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm warns if ipywidgets is missing
        from tqdm.auto import tqdm

    with tqdm(leave=False) as bar:

        def show(step: Progress) -> None:
            if step.total is not None and bar.total != step.total:
                bar.reset(step.total)
            bar.set_description(step.description, refresh=bar.desc != f"{step.description}: ")
            bar.update(step.completed - bar.n)

        yield show


class _Log:
    """A callback that writes a line to stderr if the last one is long ago, for output that is no terminal."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self, step: Progress) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            total = "" if step.total is None else f" of {step.total:,}"
            print(f"{step.description}: {step.completed:,}{total}", file=sys.stderr, flush=True)
