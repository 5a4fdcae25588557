"""What a window transformer adds to a plain one: windows in each block, merging between stages, a pooled head."""

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

    def given(self, tokens: Float[Tensor, "batch token channel"]) -> Reduction:
        """What this layer makes of these tokens, its weights copied: they may be trained on."""
        gamma = self.norm.weight.detach().clone() if self.norm.elementwise_affine else None
        weight = self.reduction.weight.detach().clone()
        norm_first = self.norm.normalized_shape[0] == self.reduction.in_features
        return Reduction(tokens, weight, gamma, self.norm.eps, norm_first)


@dataclass(frozen=True, eq=False)
class Projection:
    """A block's own layers that turn tokens into queries, keys and values, and attention into what the block adds."""

    norm: nn.LayerNorm
    inputs: tuple[nn.Module, ...]  # one layer each for queries, keys and values, or one for all in this order
    out: Any  # a linear layer, or what an adapter has put in its place
    num_heads: int

    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens through the LayerNorm before attention; no gradient reaches its weights."""
        norm = self.norm
        weight, bias = (None if part is None else part.detach() for part in (norm.weight, norm.bias))
        return F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)

    def qkv(self, tokens: Tensor) -> list[Tensor]:
        """(…, channel) → queries, keys and values, (…, channel) each."""
        if len(self.inputs) == 1:
            return list(_detached(self.inputs[0], tokens).chunk(3, dim=-1))
        return [_detached(layer, tokens) for layer in self.inputs]

    def added(self, attended: Tensor) -> Tensor:
        """What attention gathered, (…, channel), as the block adds it."""
        return _detached(self.out, attended)


def _detached(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer that leaves no gradient in its weights; what an adapter has wrapped runs as it is."""
    if type(layer) is not nn.Linear:
        return layer(tokens)
    return F.linear(tokens, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """One block: the module whose input are the tokens, how it cuts a grid, and its weights where they are known.

    ``windows`` reads the module when it is asked, for a module may be set to another size. ``projection`` is None
    where attention is not softmax(q·kᵀ) of a LayerNorm's output (Swin v2, MaxViT).
    """

    module: nn.Module
    windows: Callable[[Grid], Windows]
    projection: Projection | None = None


def accepted(_: Grid) -> None:
    """Nothing is wrong with any grid."""


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Where a window transformer attends, merges and is read.

    Attributes:
        blocks: by the path of the attention module, in order of running.
        mergings: the patch merging layers, by their path.
        before_pooling: the module whose output tokens the classifier averages.
        classifier: the linear layer that reads the average; None where something else stands between.
        why_unsupported: what is wrong with a token grid, in words; None where the library runs it.
        downsampling: other modules that halve the grid (strided convolutions), through which no row can be followed.
        preserved_state: a context in which the library may alter its own settings, and that puts them back.
    """

    blocks: Mapping[str, WindowBlock]
    mergings: Mapping[str, Merging] = field(default_factory=dict)
    downsampling: Sequence[nn.Module] = ()
    before_pooling: nn.Module | None = None
    classifier: nn.Linear | None = None
    why_unsupported: Callable[[Grid], str | None] = accepted
    preserved_state: Callable[[], AbstractContextManager[None]] = nullcontext

    def block_of(self, module: str) -> str | None:
        """The path of the attention module that a running module is, or is part of."""
        while module and module not in self.blocks:
            module = module.rpartition(".")[0]
        return module or None


_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def restoring(owners: Sequence[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Attributes that a library alters while it runs are as before afterwards; threads on one model take turns."""
    with _turns.setdefault(owners[0], threading.RLock()):
        held = [(owner, name, getattr(owner, name)) for owner in owners for name in names]
        before = [(owner, name, value, copy(value)) for owner, name, value in held]
        try:
            yield
        finally:
            for owner, name, value, unaltered in before:
                if isinstance(value, list):
                    value[:] = unaltered
                setattr(owner, name, value)
