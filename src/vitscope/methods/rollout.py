"""Attention rollout (Abnar & Zuidema, 2020) as a fold of the readout row over the blocks, last to first."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.arguments import ratio, whole_number
from vitscope.attribution import Attribution, only_finite
from vitscope.errors import CallError
from vitscope.methods.attention_map import grid_of, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.run import run
from vitscope.shapes import Fused, ReadoutRow, Rows
from vitscope.trace import AttentionStep, HeadFusion, Trace, check_head_fusion


def rollout(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    normalize: bool = True,
) -> Attribution:
    """How much of each patch reaches what the classifier reads, through all blocks.

    With E the head fusion, Â = rownorm(E A + I) and r the readout row, the result is r·Â_L ⋯ Â_start. It is computed
    as a row vector from the last block to the first, ``r ← r Â``: O(layers · tokens²) where the matrix product is
    O(layers · tokens³), and equal to it.

    ``rollout(..., normalize=False, start_layer=1, discard_ratio=0.9)`` leaves the first block out, sets the lowest
    90 % to zero and takes A + I as it is.

    Reference: Abnar & Zuidema, 2020 (arXiv 2005.00928); discarding: Gildenblat, 2020 (vit-explain).

    Args:
        model: a model and ``images``, or a :class:`~vitscope.Trace` alone.
        head_fusion: ``"mean"``, ``"max"`` or ``"min"`` over heads.
        discard_ratio: in [0, 1]; of the n entries of one image's fused matrix the floor(ratio · n) smallest become
            zero before the identity is added. No column is spared.
        start_layer: the first block that takes part, from 0; negative from the end.
        normalize: divide each row of A + I by its sum. Without it rows grow with every block.

    Returns:
        values (batch, height, width) ≥ 0: the patches' part of the row, not rescaled. With ``normalize`` patches and
        prefix tokens sum to one; the provenance says what the row sums to.

    Raises:
        CallError: an option is out of range.

    Example:
        >>> import skimage.data, vitscope as vs
        >>> vs.rollout(vs.load("vit-nano"), skimage.data.chelsea()).values.shape
        torch.Size([1, 8, 8])
    """
    trace, recipe = _prepared(model, images, head_fusion, discard_ratio, start_layer, normalize)
    end = trace.num_layers - 1
    (row,) = _fold(trace, recipe, ends=[end])
    return _attribution(trace, row, recipe, end)


def rollout_evolution(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    normalize: bool = True,
) -> list[Attribution]:
    """The rollout as it stands after each block, from ``start_layer`` on, in one pass.

    Entry i is r·Â_(start+i) ⋯ Â_start: what the readout token has gathered when that block is done. All rows are
    folded side by side, so this costs hardly more than the last of them.

    Args and Raises: as for :func:`rollout`.

    Returns:
        one result a block, each normalised as :func:`rollout` says; the last equals :func:`rollout`.
    """
    trace, recipe = _prepared(model, images, head_fusion, discard_ratio, start_layer, normalize)
    ends = list(range(recipe.start_layer, trace.num_layers))
    rows = _fold(trace, recipe, ends)
    return [_attribution(trace, row, recipe, end) for end, row in zip(ends, rows, strict=True)]


@dataclass(frozen=True)
class _Recipe:
    """The options of a rollout; ``start_layer`` counts from the first block."""

    head_fusion: HeadFusion
    discard_ratio: float
    start_layer: int
    normalize: bool


def _prepared(
    model: VisionModel | nn.Module | Trace,
    images: Any,
    head_fusion: HeadFusion,
    discard_ratio: float,
    start_layer: int,
    normalize: bool,
) -> tuple[Trace, _Recipe]:
    check_head_fusion(head_fusion)
    discard_ratio = ratio(discard_ratio, "discard_ratio")
    start_layer = whole_number(start_layer, "start_layer")
    trace = trace_of(model, images, lambda m, i: run(m, i, fuse=head_fusion, start_layer=max(start_layer, 0)).trace)
    if not -trace.num_layers <= start_layer < trace.num_layers:
        raise CallError(f"start_layer {start_layer} is not there: the model has layers 0 to {trace.num_layers - 1}")
    return trace, _Recipe(head_fusion, discard_ratio, start_layer % trace.num_layers, bool(normalize))


def _fold(trace: Trace, recipe: _Recipe, ends: Sequence[int]) -> list[ReadoutRow]:
    """The readout row pulled back from each block of ``ends`` to the start; rows travel side by side."""
    grid_of(trace)
    if trace.readout is None:
        raise CallError("the readout of this model is unknown: pass readout to vitscope.load")
    rows = trace.readout[:, None, :].float()
    travelling = rows[:, :0]
    for layer in range(max(ends), recipe.start_layer - 1, -1):
        if layer in ends:
            travelling = torch.cat([travelling, rows], dim=1)
        travelling = _pull(trace.step(layer), travelling, recipe)
    return list(travelling.unbind(1))[::-1]


def _pull(step: AttentionStep, rows: Rows, recipe: _Recipe) -> Rows:
    """rows · (discard(E A) + I), each row of the matrix divided by its sum when asked to."""
    if recipe.discard_ratio == 0 and recipe.head_fusion == "mean":
        # Rows of a mean of softmaxes sum to one, those of A + I to two; only rows that are asked for are computed.
        scaled = rows / 2 if recipe.normalize else rows
        return step.looked_at(scaled, "mean") + scaled
    fused = discard_smallest(step.fused(recipe.head_fusion), recipe.discard_ratio)
    if recipe.normalize:
        rows = rows / (1 + step.row_sums(fused))[:, None]
    return step.pull(rows, fused) + rows


def discard_smallest(fused: Fused, share: float) -> Fused:
    """The floor(share · n) smallest of each image's n entries set to zero; among equals the first go first."""
    numbers = math.prod(fused.shape[1:])
    discarded = math.floor(share * numbers)
    if discarded == 0:
        return fused
    kept = [_discard(image, discarded) for image in fused.flatten(1)]
    return torch.stack(kept).view_as(fused) if len(kept) > 1 else kept[0].view_as(fused)


def _discard(entries: Tensor, discarded: int) -> Tensor:
    threshold = _kth_smallest(entries, discarded)
    kept = F.threshold(entries, threshold, 0.0)
    spared = entries.numel() - discarded - int(torch.count_nonzero(kept))
    if spared > 0 and threshold > 0:
        equal = (entries == threshold).nonzero().flatten()[-spared:]
        kept[equal] = threshold
    return kept


def _kth_smallest(entries: Tensor, k: int) -> float:
    """The k-th smallest entry, k from 1, by partition: sorting would cost several times as much."""
    if entries.device.type == "cpu":
        return float(np.partition(entries.numpy(), k - 1)[k - 1])
    return float(entries.kthvalue(k).values)


def _attribution(trace: Trace, row: ReadoutRow, recipe: _Recipe, end: int) -> Attribution:
    grid = grid_of(trace)
    sums = only_finite(row, "rollout").sum(-1)
    about = {
        **trace.provenance,
        "method": "rollout",
        "parameters": {**asdict(recipe), "end_layer": end},
        "rows_sum_to_one": bool(((sums - 1).abs() < 1e-4).all()),
        "row_sums": sums.tolist(),
    }
    return Attribution(grid.patches(row), grid, trace.pictures, about)
