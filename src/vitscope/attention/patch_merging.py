"""Patch merging: how the tokens of a coarser grid are made of those of a finer one."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.attention.scores import Compact, in_float32
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.typing import Fallen, Groups, Rows, Shares

Merge = Literal["equal", "norm"]


def check_merge(merge: str) -> None:
    if merge not in get_args(Merge):
        raise CallError(f"unknown merge weights {merge!r}: choose equal or norm")


@dataclass(frozen=True, eq=False)
class Reduction(Compact):
    """What a merging layer was given, and its weights: four neighbours side by side, a LayerNorm, a linear reduction.

    With the LayerNorm's deviation held at its value merging is affine, ``y = Σ_q T_q x_q + c``.
    """

    tokens: Float[Tensor, "batch token channel"]
    weight: Float[Tensor, "out four_channels"]
    gamma: Tensor | None  # of the LayerNorm
    eps: float
    norm_first: bool  # Swin norms the four parts together and reduces; Swin v2 reduces and then norms

    def norms(self, groups: Groups) -> Shares:
        """‖T_q x_q‖ of each part of each merged token; of padding, which is zero, 0."""
        with in_float32(self.tokens):
            # (batch, merged, 4, channel)
            parts = self.tokens.float()[:, groups.clamp_min(0)] * (groups >= 0)[..., None]
            channels = parts.shape[-1]
            weight = self.weight.float().unflatten(1, (4, channels))  # (out, 4, channel)
            gamma = None if self.gamma is None else self.gamma.float()
            if self.norm_first:
                # LN(x)_q = γ_q (x_q − mean) / σ, and the mean is a sum of one share from each part.
                if gamma is not None:
                    weight = weight * gamma.view(4, channels)
                moved = _by_part(parts, weight)
                moved -= parts.sum(-1, keepdim=True) / (4 * channels) * weight.sum((1, 2))
                deviation = parts.flatten(2).var(-1, unbiased=False)
            else:
                moved = _by_part(parts, weight)
                deviation = moved.sum(2).var(-1, unbiased=False)
                moved -= moved.mean(-1, keepdim=True)
                moved = moved if gamma is None else moved * gamma
            return moved.norm(dim=-1) / (deviation + self.eps).sqrt()[..., None]


def _by_part(parts: Tensor, weight: Tensor) -> Tensor:
    """(batch, merged, 4, channel) through (out, 4, channel), each part by its own slice of the weight."""
    merged = parts.permute(2, 0, 1, 3).flatten(1, 2) @ weight.permute(1, 2, 0)  # (4, batch·merged, out)
    return merged.unflatten(1, parts.shape[:2]).permute(1, 2, 0, 3)


@dataclass(frozen=True, eq=False)
class MergeStep(Compact):
    """Each token of the coarser ``merged_grid`` is made of a 2 × 2 group of the finer ``grid``.

    ``groups[merged, part]`` is a token of ``grid``, −1 where an odd grid was padded. ``reduction`` is None where a run
    was told that norms will not be asked for.
    """

    module: str
    groups: Groups
    grid: Grid
    merged_grid: Grid
    reduction: Reduction | None = None

    def shares(self, merge: Merge) -> Shares:
        """How much of each merged token is each of its four parts; the four sum to one.

        ``"equal"``: a quarter each, padding included. ``"norm"``: ‖T_q x_q‖ / Σ, where padding, being zero, has none.
        """
        if merge == "equal":
            return torch.full((1, *self.groups.shape), 0.25, dtype=torch.float32, device=self.groups.device)
        if self.reduction is None:
            raise CallError(f"this trace does not hold the input of {self.module}: capture it anew for merge='norm'")
        norms = self.reduction.norms(self.groups)
        totals = norms.sum(-1, keepdim=True)
        return torch.where(totals > 0, norms / totals.clamp_min(torch.finfo(totals.dtype).tiny), 0.25)

    def pull(self, rows: Float[Tensor, "batch row merged"], merge: Merge) -> tuple[Rows, Fallen]:
        """Row vectors over merged tokens as rows over the finer ones, and what fell on padding."""
        with in_float32(rows):
            parts = rows[..., None] * self.shares(merge)[:, None]  # (batch, row, merged, 4)
        real = self.groups >= 0
        pulled = rows.new_zeros(*rows.shape[:2], self.grid.num_tokens)
        pulled[:, :, self.groups[real]] = parts[:, :, real]
        return pulled, (parts * ~real).sum((2, 3))
