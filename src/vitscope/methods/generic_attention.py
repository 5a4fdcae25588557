"""Attention weighted by its gradient, folded over the blocks: the generic rule and gradient rollout."""

from typing import Any

from torch import nn

from vitscope.attention.patch_merging import Merge, check_merge
from vitscope.attention.rules import RuleName
from vitscope.methods._attention_fold import AttentionFold, Combine
from vitscope.methods._gradient import gradient_result, in_batches, require_rules
from vitscope.methods.attention_map import grid_of, require_start_layer
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientOptions, capture_gradients
from vitscope.typing import Fused, Target, Weights
from vitscope.validation import require_ratio


def generic_attention(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    start_layer: int = 0,
    rules: RuleName = "plain",
    merge: Merge = "equal",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by attention times its gradient, folded over all blocks.

    With Ā = E_h[(A ⊙ ∂f/∂A)⁺] of each block and r the readout row, r ← r + r·Ā from the last block to the first.

    Reference: Chefer, Gur & Wolf, 2021 (arXiv 2103.15679).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        start_layer: index of the first block to include, from 0; negative from the end.
        rules: ``"plain"``, ``"libra"`` or ``"attn_lrp"`` in the backward pass, see :mod:`vitscope.attention.rules`.
        merge: the share of each of the four tokens in a merged token, see :func:`vitscope.rollout`.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        an attribution whose ``values`` (batch, height, width), at least 0, are the patches' part of the row on the
        finest grid. ``provenance["padding_mass"]`` is the part on padding.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks cannot be chained, or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.generic_attention(vs.load("vit-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 8, 8])
    """
    parameters = {"start_layer": start_layer, "rules": rules, "merge": merge, "output": output}
    return _explain("generic_attention", model, images, target, parameters, _clamped_mean)


def gradient_rollout(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    rules: RuleName = "plain",
    merge: Merge = "equal",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by a rollout of attention times its gradient.

    With Ā = (E_h[A ⊙ ∂f/∂A])⁺ of each block, Â = rownorm(Ā + I) and r the readout row, r ← r·Â from the last block to
    the first. The implementation of vit-explain multiplies the attention of one layer by the gradient of another
    layer's scores instead; this one does not reproduce that.

    Reference: Gildenblat, 2020 (vit-explain), mended.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        discard_ratio: in [0, 1], the share of the smallest entries of each image's Ā that become zero, see
            :func:`vitscope.rollout`.
        start_layer: index of the first block to include, from 0; negative from the end.
        rules: ``"plain"``, ``"libra"`` or ``"attn_lrp"`` in the backward pass, see :mod:`vitscope.attention.rules`.
        merge: the share of each of the four tokens in a merged token, see :func:`vitscope.rollout`.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        an attribution whose ``values`` (batch, height, width), at least 0, are the patches' part of the row on the
        finest grid. Patches, prefix tokens and padding sum to one.

    Raises:
        CallError: as for :func:`vitscope.generic_attention`.
        UnsupportedModelError: as for :func:`vitscope.generic_attention`.
        WorkError: as for :func:`vitscope.generic_attention`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.gradient_rollout(vs.load("swin-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 16, 16])
    """
    discard_ratio = require_ratio(discard_ratio, "discard_ratio")
    parameters = {
        "discard_ratio": discard_ratio,
        "start_layer": start_layer,
        "rules": rules,
        "merge": merge,
        "output": output,
    }
    return _explain("gradient_rollout", model, images, target, parameters, _mean_clamped)


def _clamped_mean(weights: Weights, gradient: Weights) -> Fused:
    """Return E_h[(A ⊙ ∇A)⁺]."""
    return (weights * gradient).clamp_min_(0).mean(2)


def _mean_clamped(weights: Weights, gradient: Weights) -> Fused:
    """Return (E_h[A ⊙ ∇A])⁺."""
    return (weights * gradient).mean(2).clamp_min_(0)


def _explain(
    method: str,
    model: VisionModel | nn.Module,
    images: Any,
    target: Target | None,
    parameters: dict[str, Any],
    combine: Combine,
) -> Attribution:
    """Return the row of a fold of attention and gradients."""
    rules, merge = require_rules(parameters["rules"]), parameters["merge"]
    check_merge(merge)

    def explain(images: Any, target: Any) -> Attribution:
        options = GradientOptions(rules=rules, merge_norms=merge == "norm")
        with capture_gradients(model, images, options) as run:
            grid = grid_of(run.trace)
            start = require_start_layer(parameters["start_layer"], run.trace.num_layers)
            explained = score(run.model, run.output, run.has_classes, target, parameters["output"])
            fold = AttentionFold(
                run.trace,
                method,
                combine,
                start_layer=start,
                normalize=method == "gradient_rollout",
                discard_ratio=parameters.get("discard_ratio", 0.0),
                merge=merge,
            )
            run.gradients(explained.values, [run.start], fold)
            row, padding = fold.finish()
            facts = {"row_sums": row.sum(-1).tolist(), "padding_mass": padding.tolist()}
            return gradient_result(
                run,
                method,
                {**parameters, "start_layer": start},
                explained,
                grid.patches(row),
                grid,
                signed=False,
                facts=facts,
            )

    return in_batches(images, target, explain)
