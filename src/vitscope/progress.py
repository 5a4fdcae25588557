"""Progress of long work: one event, and one meaning of ``progress`` in every function that takes it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vitscope.errors import CallError


@dataclass(frozen=True)
class Progress:
    """One step of long work, as a progress callback receives it.

    Attributes:
        description: the work in progress, such as ``"evaluating"`` or ``"training"``.
        completed: number of steps done so far.
        total: number of steps in all; None if it is not known in advance.
        metrics: figures of this step, such as ``{"accuracy": 0.93}``; often empty.
    """

    description: str
    completed: int
    total: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]
ProgressLike = bool | ProgressCallback | None
"""``True``: a bar on stderr if it is a terminal. ``False`` or ``None``: nothing. A callable: called with each step."""


@contextmanager
def progress_callback(progress: ProgressLike) -> Iterator[ProgressCallback]:
    """Yield the callback that ``progress`` stands for.

    Raises:
        CallError: ``progress`` is neither a bool nor callable.

    Example:
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
        raise CallError(f"progress is {progress!r}: pass True, False, or a function of one vitscope.Progress")


def _ignore(_: Progress) -> None:
    """Report to nobody."""


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task: Any = bar.add_task("", total=None)
        yield lambda step: bar.update(task, description=step.description, completed=step.completed, total=step.total)
