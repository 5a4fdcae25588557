"""The processes that train one model together, as torchrun starts them."""

import torch
from accelerate import PartialState


def training_processes() -> PartialState:
    """Return accelerate's state of this process; a single process is the main process.

    Accelerate must know that there is no GPU before the processes connect. Otherwise, each acts as the only one.
    """
    return PartialState(cpu=not torch.cuda.is_available())
