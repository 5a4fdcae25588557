"""Bottleneck adapters in the blocks of any transformer: after attention, after the MLP, beside the MLP."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.models.blocks import blocks

PLACES = ("attention", "mlp", "parallel")
PARALLEL_SCALE = 0.1


class Adapter(nn.Module):
    """h + W_u GELU(W_d h) for what a branch gives, before it is added to the stream; W_u is zero at the start.

    Reference: Houlsby et al., 2019 (arXiv 1902.00751); after the MLP alone, Pfeiffer et al., 2020 (arXiv 2005.00247).
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = _bottleneck(width, rank)

    def forward(self, branch: Tensor) -> Tensor:
        return branch + self.up(nn.functional.gelu(self.down(branch)))

    def after(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """As a forward hook on the end of the branch."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


class ParallelAdapter(nn.Module):
    """s · W_u ReLU(W_d x) added to the MLP's branch, x the stream before it; W_u is zero at the start, s is 0.1.

    Reference: AdaptFormer, Chen et al., 2022 (arXiv 2205.13535).
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = _bottleneck(width, rank)
        self._streams = _Streams()

    def forward(self, stream: Tensor) -> Tensor:
        return PARALLEL_SCALE * self.up(torch.relu(self.down(stream)))

    def see(self, _module: nn.Module, inputs: Any) -> None:
        """As a hook before the module that the stream enters."""
        self._streams.latest = inputs[0]

    def beside(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """As a forward hook on the end of the branch."""
        stream, self._streams.latest = self._streams.latest, None
        return output + self(stream)


class _Streams(threading.local):
    """The stream that each thread's run is at; a copy of a model starts with none."""

    latest: Any = None

    def __deepcopy__(self, _memo: Any) -> "_Streams":
        return _Streams()

    def __reduce__(self) -> Any:
        return _Streams, ()


def _bottleneck(width: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    down, up = nn.Linear(width, rank), nn.Linear(rank, width)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return down, up


def add_adapters(module: nn.Module, places: Sequence[str], rank: int) -> list[nn.Parameter]:
    """Put adapters of ``rank`` channels into every block; until they are trained the model answers as before.

    Args:
        places: ``"attention"``, ``"mlp"`` (after these), ``"parallel"`` (beside the MLP), or several.

    Returns:
        their parameters.
    """
    added: list[nn.Parameter] = []
    for block in blocks(module):
        like = next(block.module.parameters())
        for place in places:
            made = (ParallelAdapter if place == "parallel" else Adapter)(block.width, rank).to(like.device, like.dtype)
            made.train(block.module.training)
            block.module.add_module(f"adapter_{place}", made)
            if isinstance(made, ParallelAdapter):
                block.stream.register_forward_pre_hook(made.see)
                block.mlp_end.register_forward_hook(made.beside)
            else:
                end = block.attention_end if place == "attention" else block.mlp_end
                end.register_forward_hook(made.after)
            added += made.parameters()
    return added
