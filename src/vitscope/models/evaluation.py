"""The conditions under which a model runs: evaluation mode, and eager execution of compiled modules."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vitscope.interrupts import uninterrupted

# The number of runs that hold a module in evaluation mode, and its training flag before the first of them.
_runs: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_runs_lock = threading.Lock()


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Run compiled modules, blocks and forward methods eagerly, so that their attention can be captured."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    if not any(type(child).__name__ == "OptimizedModule" for child in module.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # A compiled module inside another one warns about the hooks that capture the run.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode and restore each submodule's training flag afterwards, even if runs overlap in threads."""
    children, held = list(module.modules()), []
    try:
        with uninterrupted(), _runs_lock:
            for child in children:
                runs, training = _runs.get(child, (0, child.training))
                _runs[child] = (runs + 1, training)
                child.training = False
                held.append(child)
        yield
    finally:
        with uninterrupted(), _runs_lock:
            for child in held:
                runs, training = _runs.pop(child)
                if runs > 1:
                    _runs[child] = (runs - 1, training)
                else:
                    child.training = training


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Switch off gradient checkpointing: timm's also runs in evaluation mode, where no tap sees the recomputation."""
    held = [
        (child, name)
        for child in module.modules()
        for name in ("grad_checkpointing", "gradient_checkpointing")
        if vars(child).get(name) is True
    ]
    try:
        for child, name in held:
            setattr(child, name, False)
        yield
    finally:
        for child, name in held:
            setattr(child, name, True)


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
