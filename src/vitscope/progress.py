"""Progress reports: the event class, and the meaning of the parameter ``progress`` in every function."""

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
"""``True``: a bar on stderr if it is a terminal. ``False`` or ``None``: no output. A callable: receives each event."""


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
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task: Any = bar.add_task("", total=None)
        yield lambda step: bar.update(task, description=step.description, completed=step.completed, total=step.total)
