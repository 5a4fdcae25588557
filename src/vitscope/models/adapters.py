"""Bottleneck adapters for the blocks of a transformer: after attention, after the MLP, or parallel to the MLP."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.models.blocks import blocks

PLACES = ("attention", "mlp", "parallel")
PARALLEL_SCALE = 0.1


class Adapter(nn.Module):
    """A serial adapter: h + W_u GELU(W_d h), applied to a branch's output h before it is added to the residual stream.

    W_u starts at zero, so an untrained adapter changes nothing.

    Reference: Houlsby et al., 2019 (arXiv 1902.00751); after the MLP only, Pfeiffer et al., 2020 (arXiv 2005.00247).
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = _bottleneck(width, rank)

    def forward(self, branch: Tensor) -> Tensor:
        """Return the adapted output of the branch."""
        return branch + self.up(nn.functional.gelu(self.down(branch)))

    def adapt_output(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Return the adapted output, as the forward hook of the last module of the branch."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


class ParallelAdapter(nn.Module):
    """A parallel adapter: s · W_u ReLU(W_d x) is added to the MLP's output, with x the residual stream before the MLP.

    W_u starts at zero, so an untrained adapter changes nothing. The scale s is 0.1.

    Reference: AdaptFormer, Chen et al., 2022 (arXiv 2205.13535).
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = _bottleneck(width, rank)
        self._streams = _ThreadStream()

    def forward(self, stream: Tensor) -> Tensor:
        """Return what the adapter adds to the output of the MLP."""
        return PARALLEL_SCALE * self.up(torch.relu(self.down(stream)))

    def store_stream(self, _module: nn.Module, inputs: Any) -> None:
        """Store the residual stream, as the forward pre-hook of the module that the stream enters."""
        self._streams.latest = inputs[0]

    def add_to_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """Return the adapted output, as the forward hook of the last module of the branch."""
        stream, self._streams.latest = self._streams.latest, None
        return output + self(stream)


class _ThreadStream(threading.local):
    """The residual stream of the forward pass in each thread; copies and pickles of a model start without one."""

    latest: Any = None

    def __deepcopy__(self, _memo: Any) -> "_ThreadStream":
        return _ThreadStream()

    def __reduce__(self) -> Any:
        return _ThreadStream, ()


def _bottleneck(width: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """Return the down projection and the up projection, which is zero."""
    down, up = nn.Linear(width, rank), nn.Linear(rank, width)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return down, up


def add_adapters(module: nn.Module, places: Sequence[str], rank: int) -> list[nn.Parameter]:
    """Add adapters to every block of a transformer; its output does not change until they are trained.

    Args:
        module: the transformer, which is changed in place.
        places: one or more of ``"attention"`` (after attention), ``"mlp"`` (after the MLP) and ``"parallel"`` (parallel
            to the MLP).
        rank: number of channels of each adapter's bottleneck.

    Returns:
        The parameters of the adapters.

    Raises:
        UnknownModelError: the module contains no transformer blocks.
    """
    parameters: list[nn.Parameter] = []
    for block in blocks(module):
        reference = next(block.module.parameters())
        for place in places:
            adapter = (ParallelAdapter if place == "parallel" else Adapter)(block.width, rank)
            adapter = adapter.to(reference.device, reference.dtype).train(block.module.training)
            block.module.add_module(f"adapter_{place}", adapter)
            if isinstance(adapter, ParallelAdapter):
                block.stream.register_forward_pre_hook(adapter.store_stream)
                block.mlp_end.register_forward_hook(adapter.add_to_output)
            else:
                end = block.attention_end if place == "attention" else block.mlp_end
                end.register_forward_hook(adapter.adapt_output)
            parameters += adapter.parameters()
    return parameters
