"""Hooks of modules that several threads may run at once."""

import threading
from collections.abc import Callable
from typing import Any


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook of a module that does nothing when another thread than the current one runs the module."""
    thread = threading.get_ident()

    def hook_of_thread(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return hook_of_thread
