"""The conditions under which a model runs: evaluation mode, and eager execution of compiled modules."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vitscope.interrupts import uninterrupted

_runs_lock = threading.Lock()


class _Flag:
    """A flag of modules that runs set to False. The last of several runs that overlap in threads restores it.

    Args:
        name: name of the attribute.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # The number of runs that hold a module's flag, and the flag before the first of them.
        self._runs: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()

    @contextmanager
    def cleared(self, module: nn.Module) -> Iterator[None]:
        """Set the flag of a module and its submodules, where they have it, to False inside a context."""
        children, held = [child for child in module.modules() if self.name in vars(child)], list[nn.Module]()
        try:
            with uninterrupted(), _runs_lock:
                for child in children:
                    runs, flag = self._runs.get(child, (0, getattr(child, self.name)))
                    self._runs[child] = (runs + 1, flag)
                    setattr(child, self.name, False)
                    held.append(child)
            yield
        finally:
            with uninterrupted(), _runs_lock:
                for child in held:
                    runs, flag = self._runs.pop(child)
                    if runs > 1:
                        self._runs[child] = (runs - 1, flag)
                    else:
                        setattr(child, self.name, flag)


_training = _Flag("training")
_checkpointing = (_Flag("grad_checkpointing"), _Flag("gradient_checkpointing"))


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


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Set evaluation mode and restore each submodule's training flag afterwards, even if runs overlap in threads."""
    return _training.cleared(module)


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Switch off gradient checkpointing: timm's also runs in evaluation mode, where no tap sees the recomputation."""
    with ExitStack() as stack:
        for flag in _checkpointing:
            stack.enter_context(flag.cleared(module))
        yield


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
