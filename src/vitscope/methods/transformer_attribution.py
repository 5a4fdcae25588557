"""Transformer attribution (Chefer, Gur & Wolf, 2021): relevance of attention times its gradient, over all blocks."""

from typing import Any

from torch import nn

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.trace import Trace
from vitscope.errors import UnsupportedModelError, warn
from vitscope.methods._attention_fold import AttentionFold
from vitscope.methods._gradient import gradient_result, in_batches
from vitscope.methods.attention_map import grid_of, require_start_layer
from vitscope.models.targets import score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientOptions, capture_gradients
from vitscope.typing import Fused, Target, Weights

TOLERANCE = 1e-2  # of the total relevance, which is 1


def transformer_attribution(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    start_layer: int = 0,
) -> Attribution:
    """Explain a class by the relevance of attention times its gradient, folded over all blocks.

    Relevance starts as 1 at the target's logit and goes back through the model by layer-wise relevance propagation with
    α = 1, β = 0, see :mod:`vitscope.attention.alpha_beta_rules`. With R_A the relevance of the attention weights of a
    block and ∇A their gradient, Ā = E_h[(∇A ⊙ R_A)⁺]. With r the readout row, r ← r + r·Ā from the last block to the
    first. Each image is explained on its own; the authors' code normalises sums over the whole batch.

    Reference: Chefer, Gur & Wolf, 2021 (arXiv 2012.09838).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        start_layer: index of the first block to include, from 0; negative from the end.

    Returns:
        an attribution whose ``values`` (batch, height, width), at least 0, are the patches' part of the row on the
        finest grid. If the readout is a mean of N patches, each value contains 1/N of the readout row itself; what
        exceeds it is due to attention. ``provenance["relevance"]`` is the relevance that reaches the input of the first
        block, and ``provenance["padding_relevance"]`` that of the padding of windows and merged tokens. For each image
        they add up to 1, less what outputs without a positive contribution lose. ``provenance["padding_mass"]`` is the
        part of the row on padding.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks are unknown or cannot be chained, or the model has no gradients or no logits.
        WorkError: as for :func:`vitscope.capture`.

    Warns:
        VitscopeWarning: relevance is lost in a function that the rules do not cover.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.transformer_attribution(vs.load("vit-nano"), skimage.data.chelsea(), target="cat")
        >>> result.values.shape, round(result.provenance["relevance"][0], 3)
        (torch.Size([1, 8, 8]), 1.0)
    """
    method = "transformer_attribution"

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(model, images, GradientOptions(rules="alpha_beta")) as run:
            grid = grid_of(run.trace)
            if not run.streams or run.model.meaning == "probabilities":
                reason = "its blocks are unknown" if not run.streams else "it returns probabilities, not logits"
                raise UnsupportedModelError(
                    f"{method} is not available for {run.model.name}: {reason}; use generic_attention"
                )
            start = require_start_layer(start_layer, run.trace.num_layers)
            explained = score(run.model, run.output, run.has_classes, target)
            fold = AttentionFold(run.trace, method, _clamped_mean, start_layer=start)
            (relevance,) = run.relevance(explained.values, [run.start], fold)
            row, padding = fold.finish()
            totals = relevance.double().flatten(1).sum(1).tolist()
            on_padding = run.relevance_on_zeros.tolist() if _is_padded(run.trace) else [0.0] * len(totals)
            sums = [total + share for total, share in zip(totals, on_padding, strict=True)]
            worst = max(sums, key=lambda total: abs(total - 1))
            if abs(worst - 1) > TOLERANCE:
                warn(
                    f"relevance is not conserved in {run.model.name}: {worst:.3g} of 1 reaches the first block or "
                    "padding, so the model uses a function without a relevance rule"
                )
            facts = {
                "relevance": totals,
                "padding_relevance": on_padding,
                "row_sums": row.sum(-1).tolist(),
                "padding_mass": padding.tolist(),
            }
            parameters = {"start_layer": start}
            values = grid.patches(row)
            return gradient_result(run, method, parameters, explained, values, grid, signed=False, facts=facts)

    return in_batches(images, target, explain)


def _is_padded(trace: Trace) -> bool:
    """Return whether a window or a merged token holds padding."""
    places = (step.groups if isinstance(step, MergeStep) else step.slots for step in trace.steps)
    return any(indices is not None and bool((indices < 0).any()) for indices in places)


def _clamped_mean(weights: Weights, product: Weights) -> Fused:
    """Return E_h[(∇A ⊙ R_A)⁺] from A and ∇A ⊙ dA, where R_A = A ⊙ dA."""
    return (weights * product).clamp_min(0).mean(2)
