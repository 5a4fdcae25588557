"""Two numbers a head: how widely it attends, and how far."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.trace import AttentionStep, Trace
from vitscope.attention.windows import merged_grid
from vitscope.grid import Grid
from vitscope.methods.attention_map import grid_of, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import capture
from vitscope.validation import only_finite


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """(batch, layer, head) each; layers in the order of the trace's blocks, NaN where a layer has fewer heads.

    ``entropy`` is in nats, 0 (one token) to log(tokens) (all alike). ``distance`` is in patches of the finest grid.
    """

    entropy: Float[Tensor, "batch layer head"]
    distance: Float[Tensor, "batch layer head"]
    layers: tuple[int, ...]


def head_statistics(model: VisionModel | nn.Module | Trace, images: Any = None) -> HeadStatistics:
    """Entropy and mean attention distance of every head.

    ``entropy``: −Σ_k A log A of each query's row over all it can look at, padding included, mean over all queries.
    ``distance``: Σ_k A_qk · ‖position(q) − position(k)‖ over patches, the row rescaled to sum to one over patches,
    mean over the patches as queries. Multiply by the patch size for pixels; after patch merging one step of the grid
    is two, four or eight patches.

    Reference: distance: Dosovitskiy et al., 2020 (arXiv 2010.11929, appendix D.7), Raghu et al., 2021
    (arXiv 2108.08810).

    Args:
        model: a model and ``images``, or a :class:`~vitscope.Trace` alone.

    Returns:
        entropy and distance, (batch, layer, head) each.

    Raises:
        CallError: the token grid is unknown, or images are missing.
    """
    trace = trace_of(model, images, capture)
    finest = grid_of(trace)
    heads = max(step.num_heads for step in trace.blocks)
    entropies, distances = [], []
    for step in trace.blocks:
        patches = 1  # of the finest grid to one step of this one
        grid = finest
        while grid != step.require_grid() and grid.num_patches > 1:
            patches, grid = 2 * patches, merged_grid(grid)
        entropy, distance = (only_finite(part, "attention") for part in _statistics(step))
        missing = heads - step.num_heads
        entropies.append(F.pad(entropy, (0, missing), value=math.nan))
        distances.append(F.pad(distance * patches, (0, missing), value=math.nan))
    layers = tuple(step.layer for step in trace.blocks)
    return HeadStatistics(torch.stack(entropies, dim=1), torch.stack(distances, dim=1), layers)


def _statistics(step: AttentionStep) -> tuple[Tensor, Tensor]:
    """(batch, head) each: entropy, and distance in steps of the block's own grid."""
    batch, _, heads, _, _ = step.scores.shape
    grid, slots = step.require_grid(), step.require_slots()
    places = _places(grid).to(slots.device)[slots]  # (window, slot, 2), NaN without a place
    queries, patches = slots >= 0, slots >= grid.prefix
    entropy = torch.zeros(batch, heads, dtype=torch.float32, device=slots.device)
    distance = torch.zeros_like(entropy)
    slices = step.row_slices()
    for part, block in zip(slices, step.scores.blocks(slices), strict=True):
        entropy += (torch.special.entr(block).sum(-1) * queries[:, None, part]).sum((1, 3))
        far = torch.cdist(places[:, part], places).nan_to_num(0.0)
        weights = block * patches[:, None, None]
        mean_far = (weights * far[:, None]).sum(-1) / weights.sum(-1).clamp_min(1e-30)
        distance += (mean_far * patches[:, None, part]).sum((1, 3))
    return entropy / queries.sum(), distance / patches.sum()


def _places(grid: Grid) -> Float[Tensor, "token_and_padding 2"]:
    """Row and column of each token, NaN for prefix tokens; the last line, index −1, is padding."""
    sides = (torch.arange(side, device="cpu") for side in (grid.height, grid.width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    places = torch.full((grid.num_tokens + 1, 2), math.nan, dtype=torch.float32, device="cpu")
    places[grid.prefix : grid.num_tokens] = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    return places
