"""What a window transformer adds to a plain one: windows in each block, merging between stages, a pooled head."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.grid import Grid
from vitscope.scores import in_float32
from vitscope.shapes import Groups, Shares
from vitscope.windows import Windows


@dataclass(frozen=True, eq=False)
class Merging:
    """A patch merging layer: four neighbours side by side, a LayerNorm and a linear reduction, in either order."""

    module: nn.Module
    norm: nn.LayerNorm
    reduction: nn.Linear

    @property
    def norm_first(self) -> bool:
        """Swin norms the four parts together and reduces; Swin v2 reduces and then norms."""
        return self.norm.normalized_shape[0] == self.reduction.in_features

    def norms(self, tokens: Tensor, groups: Groups) -> Shares:
        """‖T_q x_q‖ of each part of each merged token, the LayerNorm's deviation held at its value.

        Args:
            tokens: (batch, token, channel), what goes into merging.
            groups: (merged, 4) tokens, −1 for padding, which is zero.
        """
        with in_float32(tokens):
            parts = tokens.float()[:, groups.clamp_min(0)] * (groups >= 0)[..., None]  # (batch, merged, 4, channel)
            channels = parts.shape[-1]
            weight = self.reduction.weight.float().unflatten(1, (4, channels))  # (out, 4, channel)
            gamma = self.norm.weight.float() if self.norm.elementwise_affine else None
            if self.norm_first:
                # LN(x)_q = γ_q (x_q − mean) / σ, and the mean is a sum of one share from each part.
                if gamma is not None:
                    weight = weight * gamma.view(4, channels)
                moved = self._by_part(parts, weight)
                moved -= parts.sum(-1, keepdim=True) / (4 * channels) * weight.sum((1, 2))
                deviation = parts.flatten(2).var(-1, unbiased=False)
            else:
                moved = self._by_part(parts, weight)
                deviation = moved.sum(2).var(-1, unbiased=False)
                moved -= moved.mean(-1, keepdim=True)
                moved = moved if gamma is None else moved * gamma
            return moved.norm(dim=-1) / (deviation + self.norm.eps).sqrt()[..., None]

    @staticmethod
    def _by_part(parts: Tensor, weight: Tensor) -> Tensor:
        """(batch, merged, 4, channel) through (out, 4, channel), each part by its own slice of the weight."""
        merged = parts.permute(2, 0, 1, 3).flatten(1, 2) @ weight.permute(1, 2, 0)  # (4, batch·merged, out)
        return merged.unflatten(1, parts.shape[:2]).permute(1, 2, 0, 3)


@dataclass(frozen=True, eq=False)
class Projection:
    """How a block's own weights turn tokens into queries, keys, values, and attention into what the block adds."""

    norm: nn.LayerNorm
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # (…, channel) → three times (…, channel)
    out: nn.Linear
    num_heads: int


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """One block: the module whose input are the tokens, how it cuts a grid, and its weights where they are known.

    ``windows`` reads the module when it is asked, for a module may be set to another size. ``projection`` is None
    where attention is not softmax(q·kᵀ) of a LayerNorm's output (Swin v2, MaxViT).
    """

    module: nn.Module
    windows: Callable[[Grid], Windows]
    projection: Projection | None = None


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Where a window transformer attends, merges and is read.

    Attributes:
        blocks: by the path of the attention module, in order of running.
        mergings: the patch merging layers, by their path.
        pooled: the module whose output tokens the classifier averages.
        classifier: the linear layer that reads the average; None where something else stands between.
        refusal: what is wrong with a token grid, in words; None where the library runs it.
        shrinking: other modules that halve the grid (strided convolutions), through which no row can be followed.
        kept: a context in which the library may alter its own settings, and that puts them back.
    """

    blocks: Mapping[str, WindowBlock]
    mergings: Mapping[str, Merging] = field(default_factory=dict)
    shrinking: Sequence[nn.Module] = ()
    pooled: nn.Module | None = None
    classifier: nn.Linear | None = None
    refusal: Callable[[Grid], str | None] = lambda _: None
    kept: Callable[[], AbstractContextManager[None]] = nullcontext

    def block_of(self, module: str) -> str | None:
        """The path of the attention module that a running module is, or is part of."""
        while module and module not in self.blocks:
            module = module.rpartition(".")[0]
        return module or None


def joint_projection(norm: nn.LayerNorm, joint: nn.Linear, out: nn.Linear, num_heads: int) -> Projection:
    """A projection whose queries, keys and values come out of one linear layer, in this order."""

    def qkv(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = F.linear(tokens, joint.weight, joint.bias).chunk(3, dim=-1)
        return query, key, value

    return Projection(norm, qkv, out, num_heads)


_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def restoring(module: nn.Module, owners: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """Attributes that a library alters while it runs are as before afterwards; threads on one module take turns."""
    with _turns.setdefault(module, threading.RLock()):
        before = [(owner, name, copy(getattr(owner, name))) for owner in owners for name in names]
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
