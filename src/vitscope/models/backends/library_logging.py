"""Progress bars and log messages of the libraries, silenced while vitscope uses them."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOGGERS = ("transformers", "huggingface_hub")
_lock = threading.Lock()
_active = 0
_saved: tuple[list[int], bool] = ([], False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log messages of transformers.

    Contexts may overlap in threads: the settings are restored when the last context ends.
    """
    from transformers.utils import logging as transformers_logging

    _enter(transformers_logging)
    try:
        yield
    finally:
        _leave(transformers_logging)


def _enter(transformers_logging: Any) -> None:
    global _active, _saved
    with _lock:
        if not _active:
            loggers = [logging.getLogger(name) for name in _LOGGERS]
            _saved = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            transformers_logging.disable_progress_bar()
        _active += 1


def _leave(transformers_logging: Any) -> None:
    global _active
    with _lock:
        _active -= 1
        if not _active:
            levels, bars = _saved
            for name, level in zip(_LOGGERS, levels, strict=True):
                logging.getLogger(name).setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
