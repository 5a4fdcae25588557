"""Computations that vitscope adds to a model's forward pass, hidden from the attention taps."""

from contextlib import AbstractContextManager

import torch


def unwatched() -> AbstractContextManager[None]:
    """Return a context in which no tap sees what is computed, so that none mistakes it for the model's attention."""
    return torch._C.DisableTorchFunction()
