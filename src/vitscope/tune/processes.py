"""The processes that train one model together, as torchrun starts them."""

import torch
from accelerate import PartialState


def training_processes() -> PartialState:
    """Return accelerate's state of this process among the training processes; a single one is the main process.

    Without a GPU, accelerate must know that before the processes connect: otherwise each takes itself for the only one.
    """
    return PartialState(cpu=not torch.cuda.is_available())
