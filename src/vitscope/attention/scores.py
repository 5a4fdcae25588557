"""Attention scores in the form in which a run stores them, and the attention weights computed from them in blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.errors import CallError
from vitscope.typing import Fused, Weights

HeadFusion = Literal["mean", "max", "min"]
Head = int | HeadFusion
QuerySelection = slice | Int[Tensor, " _"]  # a range of queries, or their indices


def check_head_fusion(head: str) -> None:
    """Raise a CallError if ``head`` is not the name of a head fusion."""
    if head not in get_args(HeadFusion):
        raise CallError(f"unknown head fusion {head!r}: choose mean, max or min, or the index of a head")


def fuse_heads(weights: Weights, head: Head) -> Fused:
    """Return the weights of a single head, or the mean, maximum or minimum over heads."""
    if isinstance(head, int):
        return weights[:, :, head]
    if head == "mean":
        return weights.mean(2)
    return weights.amax(2) if head == "max" else weights.amin(2)


def in_float32(tensor: Tensor) -> torch.autocast:
    """Return a context that shields vitscope's arithmetic from the caller's autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def weights_of(scores: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return the softmax of scores over keys. A query whose keys are all masked attends to none, as in fused kernels.

    Args:
        scores: scores with the bias added, (…, query, key).
        bias: the bias, whose −∞ masks keys; broadcasts to the scores. None for no bias.
        out: tensor that receives the weights; None for a new one.
    """
    weights = torch.softmax(scores, -1, out=out)
    if bias is not None:
        without_keys = bias.amax(-1, keepdim=True) == -torch.inf
        if bool(without_keys.any()):
            return weights.masked_fill(without_keys, 0.0)
    return weights


class Compact:
    """A base class that pickles only the values of its tensors, which may be small parts of much larger slabs."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Factored(Compact):
    """Scores in the form that fused kernels take: softmax(scale · q·kᵀ + bias).

    Attributes:
        query: queries of all windows and heads.
        key: keys of all windows and heads.
        scale: factor of the products.
        bias: tensor added to the scores; broadcasts to (batch, window, head, query, key). None for no bias.
    """

    query: Float[Tensor, "batch window head query channel"]
    key: Float[Tensor, "batch window head key channel"]
    scale: float
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape of the weights: (batch, window, head, query, key)."""
        batch, window, head, query, _ = self.query.shape
        return batch, window, head, query, self.key.shape[3]

    @property
    def device(self) -> torch.device:
        """The device of the scores."""
        return self.query.device

    @property
    def num_bytes(self) -> int:
        """The memory of queries, keys and bias in bytes."""
        return self.query.nbytes + self.key.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def blocks(self, selections: Sequence[QuerySelection]) -> Iterator[Weights]:
        """Yield the float32 attention weights of each selection of queries."""
        # Contiguous, because bmm copies strided tensors again for every block.
        queries, keys = (tensor.float().flatten(0, 2).contiguous() for tensor in (self.query, self.key))
        keys = keys.transpose(1, 2)
        for selection in selections:
            with in_float32(keys):
                selected = queries[:, selection]
                scores = torch.baddbmm(selected.new_empty(1), selected, keys, beta=0, alpha=self.scale)
                scores = scores.view(*self.shape[:3], *scores.shape[1:])
                bias = self.bias
                if bias is not None:
                    bias = bias if bias.shape[-2] == 1 else bias[..., selection, :]
                    scores += bias
                # In place, a block needs half the memory and stays in cache. Only the CPU kernel is known to allow it.
                in_place = scores.device.type == "cpu" and not scores.requires_grad
                weights = weights_of(scores, bias, scores if in_place else None)
            yield weights


@dataclass(frozen=True, eq=False)
class Logits(Compact):
    """Scores that the model computes itself and passes to a softmax.

    Attributes:
        logits: scores before the softmax.
    """

    logits: Float[Tensor, "batch window head query key"]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape of the weights: (batch, window, head, query, key)."""
        batch, window, head, query, key = self.logits.shape
        return batch, window, head, query, key

    @property
    def device(self) -> torch.device:
        """The device of the scores."""
        return self.logits.device

    @property
    def num_bytes(self) -> int:
        """The memory of the scores in bytes."""
        return self.logits.nbytes

    def blocks(self, selections: Sequence[QuerySelection]) -> Iterator[Weights]:
        """Yield the float32 attention weights of each selection of queries."""
        for selection in selections:
            with in_float32(self.logits):
                weights = self.logits[:, :, :, selection].float().softmax(-1)
            yield weights


@dataclass(frozen=True, eq=False)
class StoredWeights(Compact):
    """Attention weights that were stored while the model ran.

    Attributes:
        weights: the weights; fused heads are stored as a single head.
    """

    weights: Float[Tensor, "batch window head query key"]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape of the weights: (batch, window, head, query, key)."""
        batch, window, head, query, key = self.weights.shape
        return batch, window, head, query, key

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weights.device

    @property
    def num_bytes(self) -> int:
        """The memory of the weights in bytes."""
        return self.weights.nbytes

    def blocks(self, selections: Sequence[QuerySelection]) -> Iterator[Weights]:
        """Yield the weights of each selection of queries."""
        for selection in selections:
            yield self.weights[:, :, :, selection]


Scores = Factored | Logits | StoredWeights


def without_keys(scores: Scores, dropped: Bool[Tensor, "batch key"]) -> Scores:
    """Return scores without some keys of each image: each row is the softmax over the remaining keys.

    Stored weights are divided by the sum of the remaining ones, which gives the same numbers unless heads were fused
    before.

    Args:
        scores: the scores.
        dropped: True for the keys to leave out; at least one key of each image remains.
    """
    columns = dropped.to(scores.device)[:, None, None, None]
    if isinstance(scores, StoredWeights):
        remaining = scores.weights.masked_fill(columns, 0.0)
        return StoredWeights(remaining / remaining.sum(-1, keepdim=True))
    if isinstance(scores, Logits):
        return Logits(scores.logits.masked_fill(columns, float("-inf")))
    mask = torch.zeros(columns.shape, dtype=torch.float32, device=scores.device).masked_fill(columns, float("-inf"))
    return replace(scores, bias=mask if scores.bias is None else scores.bias + mask)
