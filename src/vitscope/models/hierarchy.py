"""The structure of a window transformer: windows in each block, merging between stages, a pooled head."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.patch_merging import Reduction
from vitscope.attention.windows import Windows
from vitscope.grid import Grid


@dataclass(frozen=True, eq=False)
class Merging:
    """A patch merging layer."""

    module: nn.Module
    norm: nn.LayerNorm
    reduction: nn.Linear

    def reduction_of(self, tokens: Float[Tensor, "batch token channel"]) -> Reduction:
        """Return the tokens with a copy of this layer's weights, because training may change the weights later."""
        gamma = self.norm.weight.detach().clone() if self.norm.elementwise_affine else None
        weight = self.reduction.weight.detach().clone()
        norm_first = self.norm.normalized_shape[0] == self.reduction.in_features
        return Reduction(tokens, weight, gamma, self.norm.eps, norm_first)


@dataclass(frozen=True, eq=False)
class Projection:
    """A block's layers before and after attention; no gradient reaches their weights.

    Attributes:
        norm: the LayerNorm before attention.
        inputs: one layer each for queries, keys and values, or one layer for all three in this order.
        out: layer after attention: linear, or the layer with which an adapter replaced it.
        num_heads: number of attention heads.
    """

    norm: nn.LayerNorm
    inputs: tuple[nn.Module, ...]
    out: Any
    num_heads: int

    def normalize(self, tokens: Tensor) -> Tensor:
        """Return the tokens after the LayerNorm before attention."""
        norm = self.norm
        weight, bias = (None if tensor is None else tensor.detach() for tensor in (norm.weight, norm.bias))
        return F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)

    def qkv(self, tokens: Tensor) -> list[Tensor]:
        """Return queries, keys and values, (…, channel) each, of tokens (…, channel)."""
        if len(self.inputs) == 1:
            return list(_apply_detached(self.inputs[0], tokens).chunk(3, dim=-1))
        return [_apply_detached(layer, tokens) for layer in self.inputs]

    def project_out(self, attended: Tensor) -> Tensor:
        """Return what the block adds to its tokens, computed from the output of attention (…, channel)."""
        return _apply_detached(self.out, attended)


def _apply_detached(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Return a linear layer's output without gradients for its weights; layers with adapters run unchanged."""
    if type(layer) is not nn.Linear:
        return layer(tokens)
    return F.linear(tokens, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """One block of a window transformer.

    Attributes:
        module: module whose input is the tokens.
        windows: function that returns the windows of a grid. It reads the module at each call, because a module can be
            set to another size.
        projection: layers of the block around attention; None if attention is not softmax(q·kᵀ) of a LayerNorm's output
            (Swin v2, MaxViT).
    """

    module: nn.Module
    windows: Callable[[Grid], Windows]
    projection: Projection | None = None


def never_unsupported(_: Grid) -> None:
    """Return None: the library runs every grid."""


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """The modules of a window transformer that attend, merge and classify. All callables can be pickled.

    Attributes:
        blocks: the blocks by the path of their attention module, in the order in which they run.
        mergings: the patch merging layers by their path.
        downsampling: other modules that halve the grid (strided convolutions); attention cannot be followed through
            them.
        before_pooling: module whose output tokens the classifier averages.
        classifier: linear layer that reads the average; None if another computation comes between them.
        why_unsupported: function that returns the reason why the library cannot run a token grid, or None if it can.
        preserved_state: function that returns a context in which the library may change its own settings; they are
            restored at the end.
    """

    blocks: Mapping[str, WindowBlock]
    mergings: Mapping[str, Merging] = field(default_factory=dict)
    downsampling: Sequence[nn.Module] = ()
    before_pooling: nn.Module | None = None
    classifier: nn.Linear | None = None
    why_unsupported: Callable[[Grid], str | None] = never_unsupported
    preserved_state: Callable[[], AbstractContextManager[None]] = nullcontext

    def block_of(self, module: str) -> str | None:
        """Return the path of the attention module at this path or around it; None if there is none."""
        while module and module not in self.blocks:
            module = module.rpartition(".")[0]
        return module or None


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def restore_attributes(owners: Sequence[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Restore attributes that a library changes while it runs; threads that share a model take turns."""
    with _locks.setdefault(owners[0], threading.RLock()):
        current = [(owner, name, getattr(owner, name)) for owner in owners for name in names]
        before = [(owner, name, value, copy(value)) for owner, name, value in current]
        try:
            yield
        finally:
            for owner, name, value, original in before:
                if isinstance(value, list):
                    value[:] = original
                setattr(owner, name, value)
