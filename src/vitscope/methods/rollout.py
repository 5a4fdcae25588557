"""Attention rollout (Abnar & Zuidema, 2020) as a fold of the readout row over the blocks, last to first."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.patch_merging import Merge, MergeStep, check_merge
from vitscope.attention.scores import HeadFusion, check_head_fusion
from vitscope.attention.trace import AttentionStep, Trace
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.methods.attention_map import grid_of, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import run_and_capture
from vitscope.typing import Fallen, Fused, ReadoutRow, Rows
from vitscope.validation import only_finite, ratio, whole_number


def rollout(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    normalize: bool = True,
    merge: Merge = "equal",
    target: int | str | None = None,
) -> Attribution:
    """How much of each patch reaches what the classifier reads, through all blocks.

    With E the head fusion, Â = rownorm(E A + I) and r the readout row, the result is r·Â_L ⋯ Â_start. It is computed
    as a row vector from the last block to the first, ``r ← r Â``: O(layers · tokens²) where the matrix product is
    O(layers · tokens³), and equal to it. In a window transformer A holds each window where its tokens are, shifted or
    not, and patch merging M stands between the stages, so the row arrives at the finest tokens:
    O(layers · tokens · window) and no tokens² anywhere.

    ``rollout(..., normalize=False, start_layer=1, discard_ratio=0.9)`` leaves the first block out, sets the lowest
    90 % to zero and takes A + I as it is.

    Reference: Abnar & Zuidema, 2020 (arXiv 2005.00928); discarding: Gildenblat, 2020 (vit-explain); windows and
    merging: Liu et al., 2021 (arXiv 2103.14030).

    Args:
        model: a model and ``images``, or a :class:`~vitscope.Trace` alone.
        head_fusion: ``"mean"``, ``"max"`` or ``"min"`` over heads.
        discard_ratio: in [0, 1]; of the n entries of one image's fused matrix (all pairs of tokens, in a window
            transformer those that share a window) the floor(ratio · n) smallest become zero before the identity is
            added. No column is spared.
        start_layer: the first block that takes part, from 0; negative from the end. Merging before it stays, so that
            the result lies on the finest grid whatever it is.
        normalize: divide each row of A + I by its sum, what falls on padding included. Without it rows grow with
            every block.
        merge: how much of a merged token each of its four parts is: ``"equal"`` a quarter, ``"norm"`` the share of
            the length that it adds, ‖T_q x_q‖ / Σ, with the LayerNorm's deviation held. Nothing merges in a plain ViT.
        target: a class, by index or label: the row starts from the share of each last token in its logit,
            ∝ (w_c · LN(x_i))⁺, instead of the readout. For models whose classifier is linear in the mean of the last
            tokens (Swin and Swin v2 of all three libraries).

    Returns:
        values (batch, height, width) ≥ 0: the patches' part of the row, not rescaled. With ``normalize`` patches and
        prefix tokens sum to one, less what fell on padding; the provenance says what the row sums to
        (``row_sums``) and how much fell on padding (``padding_mass``).

    Raises:
        CallError: an option is out of range, the target is not there, or the model's blocks cannot be chained.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.rollout(vs.load("vit-nano"), skimage.data.chelsea()).values.shape
        torch.Size([1, 8, 8])
        >>> vs.rollout(vs.load("swin-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 16, 16])
    """
    recipe = _Recipe(head_fusion, discard_ratio, start_layer, normalize, merge, target)
    trace, recipe = _prepared(model, images, recipe)
    end = trace.num_layers - 1
    return _attribution(trace, _fold(trace, recipe, [end])[0], recipe, end)


def rollout_evolution(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    normalize: bool = True,
    merge: Merge = "equal",
    target: int | str | None = None,
) -> list[Attribution]:
    """The rollout as it stands after each block, from ``start_layer`` on, in one pass.

    Entry i is r·Â_(start+i) ⋯ Â_start: what the readout token has gathered when that block is done. All rows are
    folded side by side, so this costs hardly more than the last of them. Before the last stage of a window
    transformer r is the readout brought back to that block's tokens through merging alone, as if the classifier read
    them there.

    Args and Raises: as for :func:`rollout`.

    Returns:
        one result a block, each normalised as :func:`rollout` says; the last equals :func:`rollout`.
    """
    recipe = _Recipe(head_fusion, discard_ratio, start_layer, normalize, merge, target)
    trace, recipe = _prepared(model, images, recipe)
    ends = list(range(recipe.start_layer, trace.num_layers))
    folded = _fold(trace, recipe, ends)
    return [_attribution(trace, row, recipe, end) for end, row in zip(ends, folded, strict=True)]


@dataclass(frozen=True)
class _Recipe:
    """The options of a rollout; once prepared, ``start_layer`` counts from the first block."""

    head_fusion: HeadFusion
    discard_ratio: float
    start_layer: int
    normalize: bool
    merge: Merge
    target: int | str | None


Folded = tuple[ReadoutRow, Float[Tensor, " batch"]]  # a row over the finest tokens, and what fell on padding


def _prepared(model: VisionModel | nn.Module | Trace, images: Any, asked: _Recipe) -> tuple[Trace, _Recipe]:
    check_head_fusion(asked.head_fusion)
    check_merge(asked.merge)
    discard_ratio = ratio(asked.discard_ratio, "discard_ratio")
    start = whole_number(asked.start_layer, "start_layer")
    options: dict[str, Any] = {"fuse": asked.head_fusion, "merge": asked.merge, "by_class": asked.target is not None}
    trace = trace_of(model, images, lambda m, i: run_and_capture(m, i, start_layer=max(start, 0), **options).trace)
    if not -trace.num_layers <= start < trace.num_layers:
        raise CallError(f"start_layer {start} is not there: the model has layers 0 to {trace.num_layers - 1}")
    return trace, replace(
        asked,
        discard_ratio=discard_ratio,
        start_layer=start % trace.num_layers,
        normalize=bool(asked.normalize),
    )


def _fold(trace: Trace, recipe: _Recipe, ends: Sequence[int]) -> list[Folded]:
    """The readout row pulled back from each block of ``ends`` to the finest tokens; rows travel side by side."""
    grid_of(trace)
    trace.require_chain()
    for layer in range(recipe.start_layer, max(ends) + 1):
        trace.step(layer)
    row = trace.readout_row(recipe.target)[:, None, :].float()
    lost = row.new_zeros(row.shape[:2])
    rows, fallen = row[:, :0], lost[:, :0]
    for step in reversed(trace.steps):
        if isinstance(step, MergeStep):
            # The row that has met merging alone starts the next end, and goes along with the others.
            both, more = step.pull(torch.cat([rows, row], dim=1), recipe.merge)
            rows, row = both[:, :-1], both[:, -1:]
            fallen, lost = fallen + more[:, :-1], lost + more[:, -1:]
        elif step.layer >= recipe.start_layer:
            if step.layer in ends:
                rows, fallen = torch.cat([rows, row], dim=1), torch.cat([fallen, lost], dim=1)
            if rows.shape[-1] != step.require_grid().num_tokens:
                raise UnsupportedModelError(
                    f"how the tokens of layer {step.layer} become those of the next is unknown in this model, so it "
                    "has no rollout: attention_map shows each block"
                )
            rows, more = _pull(step, rows, recipe)
            fallen = fallen + more
    return list(zip(rows.unbind(1), fallen.unbind(1), strict=True))[::-1]


def _pull(step: AttentionStep, rows: Rows, recipe: _Recipe) -> tuple[Rows, Fallen]:
    """rows · (discard(E A) + I), each row of the matrix divided by its sum when asked to; and what fell on padding."""
    if recipe.discard_ratio == 0 and recipe.head_fusion == "mean":
        # Rows of a mean of softmaxes sum to one, those of A + I to two; only rows that are asked for are computed.
        scaled = rows / 2 if recipe.normalize else rows
        pulled, fallen = step.looked_at(scaled, "mean")
        return pulled + scaled, fallen
    fused = discard_smallest(step.fused(recipe.head_fusion), recipe.discard_ratio, step.pairs)
    if recipe.normalize:
        rows = rows / (1 + step.row_sums(fused))[:, None]
    pulled, fallen = step.pull(rows, fused)
    return pulled + rows, fallen


def discard_smallest(fused: Fused, share: float, pairs: Tensor | None = None) -> Fused:
    """The floor(share · n) smallest of each image's n entries set to zero; among equals the first go first.

    ``pairs`` (window, query, key) says which entries are pairs of tokens; the rest, padding, is neither counted nor
    touched.
    """
    if pairs is not None:
        kept = fused.clone()
        for image, entries in zip(kept, fused[:, pairs], strict=True):
            image[pairs] = _discard(entries, math.floor(share * entries.numel()))
        return kept
    kept_images = [_discard(image, math.floor(share * image.numel())) for image in fused.flatten(1)]
    return torch.stack(kept_images).view_as(fused) if len(fused) > 1 else kept_images[0].view_as(fused)


def _discard(entries: Tensor, discarded: int) -> Tensor:
    if discarded == 0:
        return entries
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


def _attribution(trace: Trace, folded: Folded, recipe: _Recipe, end: int) -> Attribution:
    grid = grid_of(trace)
    row, fallen = folded
    sums = only_finite(row, "rollout").sum(-1)
    label = None if recipe.target is None else trace.label(trace.target_index(recipe.target))
    about = {
        **trace.provenance,
        "method": "rollout",
        "parameters": {**asdict(recipe), "target": label, "end_layer": end},
        "rows_sum_to_one": bool(((sums - 1).abs() < 1e-4).all()),
        "row_sums": sums.tolist(),
        "padding_mass": fallen.tolist(),
    }
    return Attribution(grid.patches(row), grid, trace.images, about, label)
