"""The processes that train one model together, as torchrun starts them."""

import torch
from accelerate import PartialState


def training_processes() -> PartialState:
    """Return which of the processes this one is; alone, it is the main one.

    Without a GPU accelerate has to be told so before the processes meet, or each takes itself for the only one.
    """
    return PartialState(cpu=not torch.cuda.is_available())
