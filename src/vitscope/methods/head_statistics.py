"""Two numbers a head: how widely it attends, and how far."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attribution import only_finite
from vitscope.grid import Grid
from vitscope.methods.attention_map import grid_of, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.run import capture
from vitscope.trace import AttentionStep, Trace


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """(batch, layer, head) each; layers in the order of the trace's steps.

    ``entropy`` is in nats, 0 (one token) to log(tokens) (all alike). ``distance`` is in patches.
    """

    entropy: Float[Tensor, "batch layer head"]
    distance: Float[Tensor, "batch layer head"]
    layers: tuple[int, ...]


def head_statistics(model: VisionModel | nn.Module | Trace, images: Any = None) -> HeadStatistics:
    """Entropy and mean attention distance of every head.

    ``entropy``: −Σ_k A log A of each query's row over all tokens, mean over all queries.
    ``distance``: Σ_k A_qk · ‖position(q) − position(k)‖ over patches, the row rescaled to sum to one over patches,
    mean over the patches as queries. Multiply by the patch size for pixels.

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
    distances = patch_distances(grid_of(trace)).to(trace.steps[0].scores.device)
    rows = [_statistics(step, distances, grid_of(trace).prefix) for step in trace.steps]
    entropy, distance = (only_finite(torch.stack(column, dim=1), "attention") for column in zip(*rows, strict=True))
    return HeadStatistics(entropy, distance, tuple(step.layer for step in trace.steps))


def patch_distances(grid: Grid) -> Float[Tensor, "patch other"]:
    """Euclidean distance between the centres of all patches, in patches."""
    rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    return torch.cdist(places, places)


def _statistics(step: AttentionStep, distances: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    batch, _, heads, tokens, _ = step.scores.shape
    entropy = torch.zeros(batch, heads, dtype=torch.float32, device=distances.device)
    distance = torch.zeros_like(entropy)
    slices = step.row_slices()
    for part, block in zip(slices, step.scores.blocks(slices), strict=True):
        weights = block[:, 0]
        entropy += torch.special.entr(weights).sum((2, 3))
        patches = weights[:, :, max(prefix - part.start, 0) :, prefix:]
        far = distances[max(part.start - prefix, 0) : max(part.stop - prefix, 0)]
        distance += ((patches * far).sum(-1) / patches.sum(-1).clamp_min(1e-30)).sum(-1)
    return entropy / tokens, distance / (tokens - prefix)
