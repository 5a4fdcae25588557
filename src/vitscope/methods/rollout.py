"""Attention rollout (Abnar & Zuidema, 2020), computed as one row vector from the last block to the first."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitscope.attention.patch_merging import Merge, MergeStep, check_merge
from vitscope.attention.scores import HeadFusion, check_head_fusion
from vitscope.attention.trace import AttentionStep, Trace
from vitscope.errors import UnsupportedModelError
from vitscope.interventions.artefact_dropping import (
    DropArtefacts,
    DroppedArtefacts,
    dropped_artefacts,
    require_drop_artefacts,
)
from vitscope.methods.attention_map import grid_of, require_start_layer, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import run_and_capture
from vitscope.typing import Fused, PaddingMass, ReadoutRow, Rows
from vitscope.validation import require_finite_tensor, require_integer, require_ratio


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
    drop_artefacts: DropArtefacts = False,
) -> Attribution:
    """Compute how much of each patch reaches the readout through all blocks.

    With E the head fusion, Â = rownorm(E A + I) and r the readout row, the result is r·Â_L ⋯ Â_start. It is computed
    as a row vector from the last block to the first, ``r ← r Â``, in O(layers · tokens²); the matrix product would
    give the same result in O(layers · tokens³). In a window transformer A contains each window, shifted or not, at the
    positions of its tokens, and a patch merging matrix M lies between the stages, so that the row ends on the finest
    grid. This takes O(layers · tokens · window) time and no matrix of tokens².

    For example, ``rollout(..., normalize=False, start_layer=1, discard_ratio=0.9)`` skips the first block, sets the
    lowest 90 % of the entries to zero and does not normalise A + I.

    Reference: Abnar & Zuidema, 2020 (arXiv 2005.00928); discarding: Gildenblat, 2020 (vit-explain); windows and
    merging: Liu et al., 2021 (arXiv 2103.14030).

    Args:
        model: from :func:`vitscope.load`, or a live module; or a :class:`~vitscope.Trace`, without ``images``.
        images: see :func:`vitscope.capture`; None for a trace, which has its own.
        head_fusion: ``"mean"``, ``"max"`` or ``"min"`` over heads.
        discard_ratio: in [0, 1]. The floor(ratio · n) smallest of the n entries of one image's fused matrix become
            zero before the identity is added; in a window transformer only pairs of tokens that share a window count.
            No column is exempt, not even that of the CLS token.
        start_layer: index of the first block to include, from 0; negative from the end. Merging before it is always
            included, so the result lies on the finest grid.
        normalize: divide each row of A + I by its sum, including padding. If False, rows grow with every block.
        merge: the share of each of the four tokens in a merged token: a quarter for ``"equal"``, or for ``"norm"`` its
            share of the length, ‖T_q x_q‖ / Σ, with the LayerNorm's deviation fixed. A plain ViT merges no tokens.
        target: a class, by index or label. The row then starts from the share of each last token in the logit of this
            class, ∝ (w_c · LN(x_i))⁺, instead of the readout. This is supported only for models whose classifier is
            linear in the mean of the last tokens (Swin and Swin v2 of all three libraries).
        drop_artefacts: whether artefact tokens are left out, as in :func:`vitscope.attention_map`: of the keys of every
            block, and of the readout. The result is the rollout of the other tokens among themselves. The rollout that
            keeps them is computed too, for the share of the map that lay on them.

    Returns:
        an attribution whose ``values`` (batch, height, width), at least 0, are the patches' part of the row, not
        rescaled. With ``normalize``, patches, prefix tokens and padding sum to one. The provenance holds the sum of
        the row without padding (``row_sums``) and the part on padding (``padding_mass``). Dropped patches are zero and
        True in ``dropped``; ``provenance["dropped_artefacts"]`` names them and their share of the map with them.

    Raises:
        CallError: an option is out of range, the model has no such class, ``images`` are missing or not valid, or
            ``drop_artefacts`` does not fit the images.
        UnsupportedModelError: the model's blocks cannot be chained, or it has no readout by class; for dropping, as for
            :func:`vitscope.artefact_tokens`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.rollout(vs.load("vit-nano"), skimage.data.chelsea()).values.shape
        torch.Size([1, 8, 8])
        >>> vs.rollout(vs.load("swin-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 16, 16])
    """
    recipe = _Recipe(head_fusion, discard_ratio, start_layer, normalize, merge, target)
    trace, recipe, dropped = _prepared(model, images, recipe, drop_artefacts)
    return _attributions(trace, recipe, [trace.num_layers - 1], dropped)[0]


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
    drop_artefacts: DropArtefacts = False,
) -> list[Attribution]:
    """Compute the rollout after each block, from ``start_layer`` on, in one pass.

    Entry i is r·Â_(start+i) ⋯ Â_start: what the readout token has collected after that block. All rows are computed
    together, so this takes little longer than the last of them alone. Before the last stage of a window transformer, r
    is the readout carried back to that block's tokens through merging alone, as if the classifier read them there.

    Reference: see :func:`rollout`.

    Args:
        model: see :func:`rollout`.
        images: see :func:`rollout`.
        head_fusion: see :func:`rollout`.
        discard_ratio: see :func:`rollout`.
        start_layer: index of the first block to include, and the first to return a result for.
        normalize: see :func:`rollout`.
        merge: see :func:`rollout`.
        target: see :func:`rollout`.
        drop_artefacts: see :func:`rollout`; the same patches for every block.

    Returns:
        one attribution per block, each normalised as in :func:`rollout`; the last equals that of :func:`rollout`.

    Raises:
        CallError: as for :func:`rollout`.
        UnsupportedModelError: as for :func:`rollout`.
        WorkError: as for :func:`rollout`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> evolution = vs.rollout_evolution(vs.load("vit-nano"), skimage.data.chelsea())
        >>> len(evolution), evolution[0].values.shape
        (6, torch.Size([1, 8, 8]))
    """
    recipe = _Recipe(head_fusion, discard_ratio, start_layer, normalize, merge, target)
    trace, recipe, dropped = _prepared(model, images, recipe, drop_artefacts)
    return _attributions(trace, recipe, list(range(recipe.start_layer, trace.num_layers)), dropped)


@dataclass(frozen=True)
class _Recipe:
    """The options of a rollout; after :func:`_prepared`, ``start_layer`` is not negative."""

    head_fusion: HeadFusion
    discard_ratio: float
    start_layer: int
    normalize: bool
    merge: Merge
    target: int | str | None


Folded = tuple[ReadoutRow, Float[Tensor, " batch"]]  # a row over the finest tokens, and the part on padding


def _prepared(
    model: VisionModel | nn.Module | Trace, images: Any, recipe: _Recipe, drop_artefacts: DropArtefacts
) -> tuple[Trace, _Recipe, DroppedArtefacts | None]:
    """Return the trace, the checked options and the artefacts; the model is run if there is no trace yet."""
    check_head_fusion(recipe.head_fusion)
    check_merge(recipe.merge)
    discard_ratio = require_ratio(recipe.discard_ratio, "discard_ratio")
    start = require_integer(recipe.start_layer, "start_layer")
    drop = require_drop_artefacts(drop_artefacts)
    fuse = recipe.head_fusion if drop is False else None  # a key is left out of each head before the heads are fused
    options: dict[str, Any] = {"fuse": fuse, "merge": recipe.merge, "by_class": recipe.target is not None}
    trace = trace_of(model, images, lambda m, i: run_and_capture(m, i, start_layer=max(start, 0), **options).trace)
    recipe = replace(
        recipe,
        discard_ratio=discard_ratio,
        start_layer=require_start_layer(start, trace.num_layers),
        normalize=bool(recipe.normalize),
    )
    return trace, recipe, dropped_artefacts(trace, drop, model, images)


def _attributions(
    trace: Trace, recipe: _Recipe, ends: Sequence[int], dropped: DroppedArtefacts | None
) -> list[Attribution]:
    """Return the rollout after each block of ``ends``."""
    results = [_attribution(trace, row, recipe, end) for end, row in zip(ends, _fold(trace, recipe, ends), strict=True)]
    if dropped is None:
        return results
    records = [{**dropped.record, "share_of_map": dropped.shares(result.values)} for result in results]
    places = dropped.places_or_none
    if places is not None:
        folded = _fold(dropped.masked(trace), recipe, ends, dropped.tokens(trace))
        results = [_attribution(trace, row, recipe, end) for end, row in zip(ends, folded, strict=True)]
    return [
        replace(result, dropped=places, provenance={**result.provenance, "dropped_artefacts": record})
        for result, record in zip(results, records, strict=True)
    ]


def _fold(
    trace: Trace, recipe: _Recipe, ends: Sequence[int], dropped: Bool[Tensor, "batch token"] | None = None
) -> list[Folded]:
    """Return the readout row of each block of ``ends``, pulled back to the finest tokens, all rows together.

    ``dropped`` tokens have no weight in the trace, and discarding does not count them.
    """
    grid_of(trace)
    trace.require_chain()
    for layer in range(recipe.start_layer, max(ends) + 1):
        trace.step(layer)
    row = trace.readout_row(recipe.target)[:, None, :].float()
    row_padding = row.new_zeros(row.shape[:2])
    rows, padding = row[:, :0], row_padding[:, :0]
    for step in reversed(trace.steps):
        if isinstance(step, MergeStep):
            # ``row`` has passed through merging alone. It starts the rollout of earlier ends, and is pulled with the
            # others.
            pulled, on_padding = step.pull(torch.cat([rows, row], dim=1), recipe.merge)
            rows, row = pulled[:, :-1], pulled[:, -1:]
            padding, row_padding = padding + on_padding[:, :-1], row_padding + on_padding[:, -1:]
        elif step.layer >= recipe.start_layer:
            if step.layer in ends:
                rows, padding = torch.cat([rows, row], dim=1), torch.cat([padding, row_padding], dim=1)
            if rows.shape[-1] != step.require_grid().num_tokens:
                raise UnsupportedModelError(
                    f"rollout is not supported for this model: how its tokens change after layer {step.layer} is "
                    "unknown; use attention_map for each block"
                )
            rows, on_padding = _pull(step, rows, recipe, dropped)
            padding = padding + on_padding
    return list(zip(rows.unbind(1), padding.unbind(1), strict=True))[::-1]


def _pull(
    step: AttentionStep, rows: Rows, recipe: _Recipe, dropped: Bool[Tensor, "batch token"] | None
) -> tuple[Rows, PaddingMass]:
    """Return rows · (discard(E A) + I), with the matrix normalised by row if requested, and the part on padding."""
    if recipe.discard_ratio == 0 and recipe.head_fusion == "mean":
        # Rows of a mean of softmaxes sum to one and those of A + I to two, so the row sums need not be computed.
        scaled = rows / 2 if recipe.normalize else rows
        pulled, on_padding = step.pull_head(scaled, "mean")
        return pulled + scaled, on_padding
    pairs = step.pairs
    if dropped is not None:
        remaining = ~dropped.to(rows.device)
        pairs = (remaining[:, :, None] & remaining[:, None, :])[:, None]
    fused = discard_smallest(step.fused(recipe.head_fusion), recipe.discard_ratio, pairs)
    if recipe.normalize:
        rows = rows / (1 + step.row_sums(fused))[:, None]
    pulled, on_padding = step.pull(rows, fused)
    return pulled + rows, on_padding


def discard_smallest(fused: Fused, share: float, pairs: Tensor | None = None) -> Fused:
    """Return the matrices with the floor(share · n) smallest of each image's n entries set to zero.

    Of equal entries, the first become zero first. ``pairs`` (window, query, key) is True for entries that are pairs of
    tokens; with an axis for the images before, for each image. All other entries are neither counted nor changed.
    """
    if pairs is not None:
        thinned = fused.clone()
        for image, chosen in zip(thinned, pairs.expand_as(fused), strict=True):
            entries = image[chosen]
            image[chosen] = _discard(entries, math.floor(share * entries.numel()))
        return thinned
    images = [_discard(image, math.floor(share * image.numel())) for image in fused.flatten(1)]
    return torch.stack(images).view_as(fused) if len(fused) > 1 else images[0].view_as(fused)


def _discard(entries: Tensor, discarded: int) -> Tensor:
    if discarded == 0:
        return entries
    threshold = _kth_smallest(entries, discarded)
    thinned = F.threshold(entries, threshold, 0.0)
    num_spared = entries.numel() - discarded - int(torch.count_nonzero(thinned))
    if num_spared > 0 and threshold > 0:
        equal = (entries == threshold).nonzero().flatten()[-num_spared:]
        thinned[equal] = threshold
    return thinned


def _kth_smallest(entries: Tensor, k: int) -> float:
    """Return the k-th smallest entry, with k from 1, by partition: sorting would take several times as long."""
    if entries.device.type == "cpu":
        return float(np.partition(entries.numpy(), k - 1)[k - 1])
    return float(entries.kthvalue(k).values)


def _attribution(trace: Trace, folded: Folded, recipe: _Recipe, end: int) -> Attribution:
    grid = grid_of(trace)
    row, padding = folded
    sums = require_finite_tensor(row, "rollout").sum(-1)
    label = None if recipe.target is None else trace.label(trace.target_index(recipe.target))
    provenance = {
        **trace.provenance,
        "method": "rollout",
        "parameters": {**asdict(recipe), "target": label, "end_layer": end},
        "rows_sum_to_one": bool(((sums - 1).abs() < 1e-4).all()),
        "row_sums": sums.tolist(),
        "padding_mass": padding.tolist(),
    }
    return Attribution(grid.patches(row), grid, trace.images, provenance, label)
