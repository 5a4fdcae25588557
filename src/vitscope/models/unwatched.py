"""Computations of vitscope's own in the middle of a model's run."""

from contextlib import AbstractContextManager

import torch


def unwatched() -> AbstractContextManager[None]:
    """While held, no tap sees what is computed, so none takes it for the model's own attention."""
    return torch._C.DisableTorchFunction()
