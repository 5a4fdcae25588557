"""AttCAT (Qiang et al., 2022): the tokens of every block times their gradients, weighted by attention."""

from typing import Any

import torch
from torch import Tensor, nn

from vitscope.attention.rules import RuleName
from vitscope.methods._gradient import gradient_result, in_batches, require_rules, to_finest, without_rounding
from vitscope.methods.attention_map import grid_of, require_start_layer
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients
from vitscope.typing import Target


def att_cat(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    start_layer: int = 0,
    rules: RuleName = "plain",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by the tokens of every block times their gradients, weighted by the attention to them.

    With h_l the output of block l, token i has Σ_l E_h[α_l,i] · Σ_c h_l,ic · ∂f/∂h_l,ic, where α_l is the attention of
    the readout to the tokens in block l: the row of the CLS token, or the mean of the rows that the classifier reads.

    This is our reading of the paper. The authors' code, for BERT, takes the input of each block instead of its output,
    and the mean attention of all queries instead of the readout's. In a model that reads its CLS token, the last two
    blocks add nothing: behind the last block no gradient reaches the patches, and before it they pass a norm, so that
    the output does not depend on their length. With ``rules="libra"`` only the last block adds nothing.

    In a window transformer, a block has the readout carried back through patch merging, and its values are carried to
    the finest grid; both with equal shares.

    Reference: Qiang, Pan, Li, Li, Jang & Zhu, 2022 (AttCAT, NeurIPS).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class.
        start_layer: index of the first block to include, from 0; negative from the end.
        rules: rules of the backward pass: ``"plain"``, ``"libra"`` or ``"attn_lrp"``.
        output: the number of the target to explain, see :func:`vitscope.generic_attention`.

    Returns:
        a signed attribution whose ``values`` (batch, height, width) are the patches' part on the finest grid, in units
        of the logit. ``provenance["padding_mass"]`` is the part on the padding of patch merging.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks or the readout of the model are unknown, or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.att_cat(vs.load("vit-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 8, 8])
    """
    options = GradientOptions(weights=False, rules=require_rules(rules))

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(model, images, options, watch=lambda layers: [block.module for block in layers]) as run:
            finest = grid_of(run.trace)
            run.require_streams("generic_attention")
            start = require_start_layer(start_layer, run.trace.num_layers)
            explained = score(run.model, run.output, run.has_classes, target, output)
            outputs = [run.outputs[block.module] for block in run.layers[start:]]
            gradients = run.gradients(explained.values, outputs)
            total = padding = magnitude = torch.zeros((), device=run.pixels.device)
            for layer, (activations, gradient) in enumerate(zip(outputs, gradients, strict=True), start):
                values, absolute = _attended_tokens(run, layer, activations, gradient)
                tokens, on_padding = to_finest(run.trace, values, run.grid(layer), "att_cat")
                total, padding = total + tokens, padding + on_padding
                magnitude = magnitude + to_finest(run.trace, absolute, run.grid(layer), "att_cat")[0]
            parameters = {"start_layer": start, "rules": rules}
            values = without_rounding(finest.patches(total), finest.patches(magnitude), run.dtype)
            facts = {"padding_mass": padding.tolist()}
            return gradient_result(run, "att_cat", parameters, explained, values, finest, signed=True, facts=facts)

    return in_batches(images, target, explain)


def _attended_tokens(run: GradientCapture, layer: int, activations: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return E_h[α] · Σ_c h ⊙ ∇h of a block, and with |h ⊙ ∇h|, from the output h of the block and its gradient.

    Both are (batch, token).
    """
    dtype = torch.promote_types(activations.dtype, torch.float32)
    h, g = (run.tokens(tensor.detach(), layer).to(dtype) for tensor in (activations, gradient))
    step = run.trace.step(layer)
    attention, _ = step.pull_head(run.trace.readout_at(step)[:, None], "mean")
    products = h * g
    return attention[:, 0] * products.sum(-1), attention[:, 0] * products.abs().sum(-1)
