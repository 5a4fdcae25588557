"""Patch merging: the share of each fine token in a token of the coarser grid."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.attention.scores import Compact, in_float32
from vitscope.display import one_line
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.typing import Groups, PaddingMass, Rows, Shares

Merge = Literal["equal", "norm"]


def check_merge(merge: str) -> None:
    """Raise a CallError if ``merge`` is neither "equal" nor "norm"."""
    if merge not in get_args(Merge):
        raise CallError(f"unknown merge weights {merge!r}: choose equal or norm")


@dataclass(frozen=True, eq=False)
class Reduction(Compact):
    """The input and weights of a patch merging layer: concatenation of four neighbours, LayerNorm, linear reduction.

    If the standard deviation in the LayerNorm is held constant, merging is affine: ``y = Σ_q T_q x_q + c``.

    Attributes:
        tokens: input of the layer.
        weight: weight of the linear reduction.
        gamma: weight of the LayerNorm; None if it has none.
        eps: epsilon of the LayerNorm.
        norm_first: True if the LayerNorm comes before the reduction (Swin), False if after it (Swin v2).
    """

    tokens: Float[Tensor, "batch token channel"]
    weight: Float[Tensor, "out four_channels"]
    gamma: Tensor | None
    eps: float
    norm_first: bool

    def norms(self, groups: Groups) -> Shares:
        """Return ‖T_q x_q‖ of each of the four neighbours of each merged token; 0 for padding."""
        with in_float32(self.tokens):
            # (batch, merged, 4, channel)
            neighbours = self.tokens.float()[:, groups.clamp_min(0)] * (groups >= 0)[..., None]
            channels = neighbours.shape[-1]
            weight = self.weight.float().unflatten(1, (4, channels))  # (out, 4, channel)
            gamma = None if self.gamma is None else self.gamma.float()
            if self.norm_first:
                # LN(x)_q = γ_q (x_q − mean) / σ, and each neighbour contributes one share to the mean.
                if gamma is not None:
                    weight = weight * gamma.view(4, channels)
                projected = _project(neighbours, weight)
                projected -= neighbours.sum(-1, keepdim=True) / (4 * channels) * weight.sum((1, 2))
                variance = neighbours.flatten(2).var(-1, unbiased=False)
            else:
                projected = _project(neighbours, weight)
                variance = projected.sum(2).var(-1, unbiased=False)
                projected -= projected.mean(-1, keepdim=True)
                projected = projected if gamma is None else projected * gamma
            return projected.norm(dim=-1) / (variance + self.eps).sqrt()[..., None]


def _project(neighbours: Tensor, weight: Tensor) -> Tensor:
    """Return (batch, merged, 4, out): each neighbour times its own slice of the weight (out, 4, channel)."""
    projected = neighbours.permute(2, 0, 1, 3).flatten(1, 2) @ weight.permute(1, 2, 0)  # (4, batch·merged, out)
    return projected.unflatten(1, neighbours.shape[:2]).permute(1, 2, 0, 3)


@dataclass(frozen=True, eq=False)
class MergeStep(Compact):
    """A patch merging layer of a trace: each 2 × 2 group of tokens becomes one token of a coarser grid.

    Attributes:
        module: path of the merging layer.
        groups: (merged, 4), the tokens of ``grid`` in each merged token; −1 for the padding of a grid with an odd side.
        grid: token grid before merging.
        merged_grid: token grid after merging.
        reduction: input and weights of the layer; None if the run did not record them (``merge="equal"``).

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
        >>> step = next(step for step in trace.steps if isinstance(step, vs.MergeStep))
        >>> step.merged_grid.num_patches * 4 == step.grid.num_patches
        True
    """

    module: str
    groups: Groups
    grid: Grid
    merged_grid: Grid
    reduction: Reduction | None = None

    def __repr__(self) -> str:
        before, after = (f"{grid.height}×{grid.width}" for grid in (self.grid, self.merged_grid))
        return one_line(f"MergeStep {self.module}: grid {before} to {after}")

    def shares(self, merge: Merge) -> Shares:
        """Return the share of each of the four tokens in each merged token.

        Args:
            merge: ``"equal"`` for a quarter each, padding included; ``"norm"`` for ‖T_q x_q‖ divided by the sum of
                the four norms, which gives padding no share.

        Returns:
            float32 (batch or 1, merged, 4); the four shares sum to one.

        Raises:
            CallError: ``merge`` is ``"norm"`` and the trace does not hold the input of the layer.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> step = next(step for step in trace.steps if isinstance(step, vs.MergeStep))
            >>> step.shares("equal")[0, 0].tolist()
            [0.25, 0.25, 0.25, 0.25]
        """
        if merge == "equal":
            return torch.full((1, *self.groups.shape), 0.25, dtype=torch.float32, device=self.groups.device)
        if self.reduction is None:
            raise CallError(
                f"this trace does not hold the input of {self.module}: capture the model again for merge='norm'"
            )
        norms = self.reduction.norms(self.groups)
        totals = norms.sum(-1, keepdim=True)
        return torch.where(totals > 0, norms / totals.clamp_min(torch.finfo(totals.dtype).tiny), 0.25)

    def pull(self, rows: Float[Tensor, "batch row merged"], merge: Merge) -> tuple[Rows, PaddingMass]:
        """Return row vectors over merged tokens as row vectors over the tokens before merging.

        Args:
            rows: float32 (batch, row, merged).
            merge: ``"equal"`` or ``"norm"``, see :meth:`shares`.

        Returns:
            The row vectors, float32 (batch, row, token), and the sums that fall on padding, float32 (batch, row).

        Raises:
            CallError: ``merge`` is ``"norm"`` and the trace does not hold the input of the layer.

        Examples:
            >>> import skimage.data, torch, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> step = next(step for step in trace.steps if isinstance(step, vs.MergeStep))
            >>> rows, padding = step.pull(torch.ones(1, 1, step.merged_grid.num_patches), "equal")
            >>> rows.shape[-1] == step.grid.num_patches, padding.tolist()
            (True, [[0.0]])
        """
        with in_float32(rows):
            quarters = rows[..., None] * self.shares(merge)[:, None]  # (batch, row, merged, 4)
        is_token = self.groups >= 0
        pulled = rows.new_zeros(*rows.shape[:2], self.grid.num_tokens)
        pulled[:, :, self.groups[is_token]] = quarters[:, :, is_token]
        return pulled, (quarters * ~is_token).sum((2, 3))
