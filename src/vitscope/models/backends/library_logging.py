"""No notes of the libraries on a terminal that belongs to vitscope."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOGGERS = ("transformers", "huggingface_hub")
_lock = threading.Lock()
_runs = 0
_before: tuple[list[int], bool] = ([], False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and notes of transformers; all is as before when the last overlapping block ends."""
    from transformers.utils import logging as transformers_logging

    _enter(transformers_logging)
    try:
        yield
    finally:
        _leave(transformers_logging)


def _enter(transformers_logging: Any) -> None:
    global _runs, _before
    with _lock:
        if not _runs:
            loggers = [logging.getLogger(name) for name in _LOGGERS]
            _before = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            transformers_logging.disable_progress_bar()
        _runs += 1


def _leave(transformers_logging: Any) -> None:
    global _runs
    with _lock:
        _runs -= 1
        if not _runs:
            levels, bars = _before
            for name, level in zip(_LOGGERS, levels, strict=True):
                logging.getLogger(name).setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
