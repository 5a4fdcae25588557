"""Transition attention (Chen et al., 2023): attention weighted by head, times an integrated gradient."""

from typing import Any

import torch
from torch import Tensor, nn

from vitscope.attention.scores import in_float32
from vitscope.attention.step import AttentionStep
from vitscope.attention.trace import Trace
from vitscope.errors import WorkError
from vitscope.methods._attention_fold import RowFold
from vitscope.methods._gradient import from_windows, gradient_result, in_batches, to_finest
from vitscope.methods.attention_map import grid_of, require_start_layer
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model
from vitscope.tracing.gradients import GradientOptions, capture_gradients
from vitscope.typing import Target, Weights
from vitscope.validation import require_at_least


def transition_attention(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    start_layer: int | None = None,
    steps: int = 20,
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by attention weighted by head, times an integrated gradient of the last block's attention.

    The importance of a head is I_h = mean |A_hᵀ ∇A_h|, divided by the sum over the heads of the block. With r the
    readout row, r ← r + r·Σ_h I_h A_h from the last block to the first. The result is r ⊙ w, where w is the readout row
    of E_h[(mean over α of ∇A)⁺] of the last block for the inputs α·x, α = 1/steps, 2/steps, …, 1, and x is the
    preprocessed image. This is the head-wise variant of the paper. While a block is processed, A_hᵀ ∇A_h takes the
    memory of one of its attention maps of all heads.

    If the classifier reads several tokens, r and w are averages over these tokens. In a window transformer, w is spread
    with equal shares over the finest tokens. In the authors' code, α starts at 0 and ``start_layer`` counts from 1.

    Reference: Chen, Li, Yu, Dou & Xiong, "Beyond Intuition: Rethinking Token Attributions inside Transformers", 2023
    (Transactions on Machine Learning Research).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class.
        start_layer: index of the first block to include, from 0; negative from the end. By default a third of the
            blocks is left out: 4 of 12.
        steps: number of inputs on the way from zero to the image, each a forward pass and a backward pass through the
            last block; at least 1.
        output: the number of the target to explain, see :func:`vitscope.generic_attention`.

    Returns:
        an attribution whose ``values`` (batch, height, width) are at least 0, on the finest grid. The provenance holds
        the ``start_layer`` that was used; ``provenance["padding_mass"]`` is the part of r on padding.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks cannot be chained, or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.transition_attention(vs.load("vit-nano"), skimage.data.chelsea(), target="cat", steps=5)
        >>> result.values.shape, result.provenance["parameters"]["start_layer"]
        (torch.Size([1, 8, 8]), 2)
    """
    steps = require_at_least(1, steps, "steps")
    vision = as_vision_model(model)

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(vision, images) as run:
            grid, count = grid_of(run.trace), run.trace.num_layers
            start = count // 3 if start_layer is None else require_start_layer(start_layer, count)
            explained = score(run.model, run.output, run.has_classes, target, output)
            fold = _HeadFold(run.trace, "transition_attention", start_layer=start)
            run.gradients(explained.values, [run.start], fold)
            row, padding = fold.finish()
        mean = _MeanGradient(run.trace, steps)
        for step in range(1, steps + 1):
            # Only the last block has a graph: the others start one of their own.
            with capture_gradients(vision, run.pixels * (step / steps), GradientOptions(separate_blocks=True)) as point:
                values = score(point.model, point.output, point.has_classes, explained.fixed_target, output).values
                point.gradients(values, [point.streams[-1] if point.streams else point.start], mean)
        tokens = row * mean.finest_row()
        facts = {"row_sums": row.sum(-1).tolist(), "padding_mass": padding.tolist()}
        parameters = {"start_layer": start, "steps": steps}
        return gradient_result(
            run,
            "transition_attention",
            parameters,
            explained,
            grid.patches(tokens),
            grid,
            signed=False,
            facts=facts,
        )

    return in_batches(images, target, explain)


class _HeadFold(RowFold):
    """The fold r ← r + r·Σ_h I_h A_h, where I_h is the share of head h in mean |A_hᵀ ∇A_h|.

    The shares are known after the last query of a block. Until then, r·A_h and A_hᵀ ∇A_h of the block are kept.
    """

    def _open(self, step: AttentionStep) -> None:
        self._in_windows = _to_windows(step, self._row[:, 0])
        self._pulled: Tensor | None = None  # (batch, window, head, key)
        self._products: Tensor | None = None  # (batch · window · head, key, key)

    def _receive(self, rows: slice, weights: Weights, gradient: Weights) -> None:
        with in_float32(weights):
            entries = self._in_windows[:, :, None, None, rows].to(weights.dtype)
            pulled = (entries @ weights)[..., 0, :]
            transposed, gradients = weights.flatten(0, 2).mT, gradient.flatten(0, 2)
            if self._pulled is None or self._products is None:
                self._pulled, self._products = pulled, transposed @ gradients
            else:
                self._pulled += pulled
                self._products.baddbmm_(transposed, gradients)

    def _product(self, step: AttentionStep) -> Tensor:
        assert self._pulled is not None, "a block reports its queries"
        assert self._products is not None, "a block reports its queries"
        sizes = self._products.abs().mean((1, 2)).view(self._pulled.shape[:3]).mean(1)  # (batch, head)
        self._products = None
        total = sizes.sum(-1, keepdim=True)
        shares = sizes / total.masked_fill(total == 0, 1.0)  # no gradient at all: the map is zero
        pulled, on_padding = from_windows(step, torch.einsum("bwhk,bh->bwk", self._pulled, shares))
        self._padding = self._padding + on_padding[:, None]
        return self._row + pulled[:, None]


class _MeanGradient:
    """The mean gradient of the last block's attention over several runs, for the queries that the classifier reads.

    Args:
        trace: the run of the image itself.
        runs: number of runs.
    """

    def __init__(self, trace: Trace, runs: int) -> None:
        self._trace, self._runs, self._step = trace, runs, trace.step(-1)
        self._readout = _to_windows(self._step, trace.readout_at(self._step))
        self._is_read = (self._readout != 0).any(0).any(0)  # (slot,)
        self._places = self._is_read.cumsum(0) - 1
        self._total: Tensor | None = None  # (batch, window, head, query that is read, key)

    def __call__(self, step: AttentionStep, rows: slice, _weights: Weights, gradient: Weights) -> None:
        """Take the gradients of some queries of a block."""
        if step.layer != self._step.layer:
            return
        if self._total is None:
            shape = list(gradient.shape)
            shape[3] = int(self._places[-1]) + 1
            self._total = gradient.new_zeros(shape)
        is_read = self._is_read[rows]
        self._total[:, :, :, self._places[rows][is_read]] += gradient[:, :, :, is_read] / self._runs

    def finest_row(self) -> Tensor:
        """Return the readout row of the positive part, averaged over heads, over the finest tokens, (batch, token).

        Raises:
            WorkError: the block received no gradient.
        """
        if self._total is None:
            raise WorkError(f"no gradient reached the attention of layer {self._step.layer}: its module detaches it")
        positive = self._total.clamp_min(0).mean(2)
        with in_float32(positive):
            row = torch.einsum("bwq,bwqk->bwk", self._readout[:, :, self._is_read].to(positive.dtype), positive)
        tokens, _ = from_windows(self._step, row)
        return to_finest(self._trace, tokens, self._step.require_grid(), "transition_attention")[0]


def _to_windows(step: AttentionStep, tokens: Tensor) -> Tensor:
    """Return (batch, token) in the slots of a block's windows, (batch, window, slot), with 0 on padding."""
    if step.is_plain:
        return tokens[:, None]
    slots = step.require_slots()
    return tokens[:, slots.clamp_min(0)] * (slots >= 0)
