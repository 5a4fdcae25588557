"""Attention scores as a run leaves them, and the weights they stand for, some queries at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitscope.errors import CallError
from vitscope.typing import Fused, Weights

HeadFusion = Literal["mean", "max", "min"]
Head = int | HeadFusion
Part = slice | Int[Tensor, " _"]  # some queries: a run of them, or their numbers


def check_head_fusion(head: str) -> None:
    if head not in get_args(HeadFusion):
        raise CallError(f"unknown head fusion {head!r}: choose mean, max or min, or the number of a head")


def fuse_heads(weights: Weights, head: Head) -> Fused:
    """One map for all heads: a single head, or their mean, maximum or minimum."""
    if isinstance(head, int):
        return weights[:, :, head]
    if head == "mean":
        return weights.mean(2)
    return weights.amax(2) if head == "max" else weights.amin(2)


def in_float32(tensor: Tensor) -> torch.autocast:
    """While held, a caller's autocast does not reach our arithmetic."""
    return torch.autocast(tensor.device.type, enabled=False)


class Compact:
    """Pickles its tensors alone: they may lie on slabs that are much larger."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Factored(Compact):
    """Scores as the fused kernels get them: softmax(scale · q·kᵀ + bias)."""

    query: Float[Tensor, "batch window head query channel"]
    key: Float[Tensor, "batch window head key channel"]
    scale: float
    bias: Tensor | None = None  # added to the scores; broadcasts to (batch, window, head, query, key)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, window, head, query, _ = self.query.shape
        return batch, window, head, query, self.key.shape[3]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def num_bytes(self) -> int:
        return self.query.nbytes + self.key.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def blocks(self, parts: Sequence[Part]) -> Iterator[Weights]:
        """float32 attention weights of some queries at a time."""
        # In one piece, for bmm copies what is strided, again for every block.
        queries, keys = (part.float().flatten(0, 2).contiguous() for part in (self.query, self.key))
        keys = keys.transpose(1, 2)
        for part in parts:
            with in_float32(keys):
                asked = queries[:, part]
                scores = torch.baddbmm(asked.new_empty(1), asked, keys, beta=0, alpha=self.scale)
                scores = scores.view(*self.shape[:3], *scores.shape[1:])
                if self.bias is not None:
                    scores += self.bias if self.bias.shape[-2] == 1 else self.bias[..., part, :]
                # In place, a block is half as large and stays in cache; only the CPU's kernel is known to allow it.
                in_place = scores.device.type == "cpu" and not scores.requires_grad
                weights = torch.softmax(scores, -1, out=scores if in_place else None)
            yield weights


@dataclass(frozen=True, eq=False)
class Logits(Compact):
    """Scores that the model computed itself and put through a softmax."""

    logits: Float[Tensor, "batch window head query key"]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, window, head, query, key = self.logits.shape
        return batch, window, head, query, key

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def num_bytes(self) -> int:
        return self.logits.nbytes

    def blocks(self, parts: Sequence[Part]) -> Iterator[Weights]:
        for part in parts:
            with in_float32(self.logits):
                weights = self.logits[:, :, :, part].float().softmax(-1)
            yield weights


@dataclass(frozen=True, eq=False)
class KnownWeights(Compact):
    """Weights that were kept while the model ran; with heads fused it is one map, as if there were one head."""

    weights: Float[Tensor, "batch window head query key"]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, window, head, query, key = self.weights.shape
        return batch, window, head, query, key

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def num_bytes(self) -> int:
        return self.weights.nbytes

    def blocks(self, parts: Sequence[Part]) -> Iterator[Weights]:
        for part in parts:
            yield self.weights[:, :, :, part]


Scores = Factored | Logits | KnownWeights
