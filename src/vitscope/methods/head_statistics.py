"""Entropy and attention distance of every head: how widely it attends, and how far."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.trace import AttentionStep, Trace
from vitscope.attention.windows import merged_grid
from vitscope.display import Tabulated, counted, ends, one_line
from vitscope.grid import Grid
from vitscope.methods.attention_map import grid_of, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import capture
from vitscope.validation import require_finite_tensor


@dataclass(frozen=True, eq=False)
class HeadStatistics(Tabulated):
    """Entropy and attention distance of every head.

    Attributes:
        entropy: (batch, layer, head) in nats, from 0 (all attention on one token) to log(tokens) (uniform attention).
            NaN for heads that a layer lacks because it has fewer than others.
        distance: (batch, layer, head) in patches of the finest grid; NaN as in ``entropy``.
        layers: index of each layer, in the order of the trace's blocks.
    """

    entropy: Float[Tensor, "batch layer head"]
    distance: Float[Tensor, "batch layer head"]
    layers: tuple[int, ...]

    def __repr__(self) -> str:
        images, layers, heads = self.entropy.shape
        return one_line(
            f"HeadStatistics: {counted(images, 'image')}",
            f"{counted(layers, 'layer')} of up to {heads} heads",
            f"entropy {ends(self.entropy)} nats",
            f"distance {ends(self.distance)} patches",
        )


def head_statistics(model: VisionModel | nn.Module | Trace, images: Any = None) -> HeadStatistics:
    """Compute the entropy and the mean attention distance of every head.

    ``entropy`` is −Σ_k A_qk log A_qk over each query's row, including padding, averaged over all queries.
    ``distance`` is Σ_k A_qk · ‖position(q) − position(k)‖ over patches, with the row rescaled to sum to one over
    patches, averaged over the patches as queries. Multiply it by the patch size to get pixels. After patch merging,
    one step of the grid is two, four or eight patches.

    Reference: for the distance, Dosovitskiy et al., 2020 (arXiv 2010.11929, appendix D.7) and Raghu et al., 2021
    (arXiv 2108.08810).

    Args:
        model: from :func:`vitscope.load`, or a live module; or a :class:`~vitscope.Trace`, without ``images``.
        images: see :func:`vitscope.capture`; None for a trace, which has its own.

    Returns:
        entropy and distance, (batch, layer, head) each.

    Raises:
        CallError: the token grid is unknown, or ``images`` are missing or not valid.
        UnsupportedModelError: as for :func:`vitscope.capture`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> statistics = vs.head_statistics(vs.load("vit-nano"), skimage.data.chelsea())
        >>> statistics.entropy.shape == statistics.distance.shape
        True
    """
    trace = trace_of(model, images, capture)
    finest = grid_of(trace)
    heads = max(step.num_heads for step in trace.blocks)
    entropies, distances = [], []
    for step in trace.blocks:
        patches = 1  # patches of the finest grid per step of this grid
        grid = finest
        while grid != step.require_grid() and grid.num_patches > 1:
            patches, grid = 2 * patches, merged_grid(grid)
        entropy, distance = (require_finite_tensor(statistic, "attention") for statistic in _statistics(step))
        missing = heads - step.num_heads
        entropies.append(F.pad(entropy, (0, missing), value=math.nan))
        distances.append(F.pad(distance * patches, (0, missing), value=math.nan))
    layers = tuple(step.layer for step in trace.blocks)
    return HeadStatistics(torch.stack(entropies, dim=1), torch.stack(distances, dim=1), layers)


def _statistics(step: AttentionStep) -> tuple[Tensor, Tensor]:
    """Return (batch, head) each: the entropy, and the distance in steps of the block's own grid."""
    batch, _, heads, _, _ = step.scores.shape
    grid, slots = step.require_grid(), step.require_slots()
    positions = _positions(grid).to(slots.device)[slots]  # (window, slot, 2), NaN without a position
    queries, patches = slots >= 0, slots >= grid.prefix
    entropy = torch.zeros(batch, heads, dtype=torch.float32, device=slots.device)
    distance = torch.zeros_like(entropy)
    slices = step.row_slices()
    for rows, block in zip(slices, step.scores.blocks(slices), strict=True):
        entropy += (torch.special.entr(block).sum(-1) * queries[:, None, rows]).sum((1, 3))
        distances = torch.cdist(positions[:, rows], positions).nan_to_num(0.0)
        weights = block * patches[:, None, None]
        mean_distance = (weights * distances[:, None]).sum(-1) / weights.sum(-1).clamp_min(1e-30)
        distance += (mean_distance * patches[:, None, rows]).sum((1, 3))
    return entropy / queries.sum(), distance / patches.sum()


def _positions(grid: Grid) -> Float[Tensor, "token_and_padding 2"]:
    """Return row and column of each token, NaN for prefix tokens; the last entry, index −1, is padding."""
    sides = (torch.arange(side, device="cpu") for side in (grid.height, grid.width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    positions = torch.full((grid.num_tokens + 1, 2), math.nan, dtype=torch.float32, device="cpu")
    positions[grid.prefix : grid.num_tokens] = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    return positions
