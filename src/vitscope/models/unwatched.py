"""Computations that vitscope adds to a model's forward pass, which the attention taps must not observe."""

from contextlib import AbstractContextManager

import torch


def unwatched() -> AbstractContextManager[None]:
    """Return a context in which no tap observes computations, so that none mistakes them for the model's attention."""
    return torch._C.DisableTorchFunction()
