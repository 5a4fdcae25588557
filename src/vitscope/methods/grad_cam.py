"""Class activation maps of tokens: Grad-CAM and its kin."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitscope.attention.rules import RuleName
from vitscope.attention.step import require_index
from vitscope.errors import UnsupportedModelError
from vitscope.grid import Grid
from vitscope.methods._gradient import gradient_result, in_batches, require_choice, require_rules, without_rounding
from vitscope.methods.attention_map import grid_of
from vitscope.models.blocks import Block
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients
from vitscope.typing import Target

Variant = Literal["grad_cam", "hires_cam", "layer_cam", "grad_cam++", "x_grad_cam", "element_wise", "eigen_cam"]
Position = Literal["norm", "block"]


def grad_cam(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    layer: int = -1,
    variant: Variant = "grad_cam",
    at: Position = "norm",
    rules: RuleName = "plain",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by the activations of one block, weighted by their gradients.

    With x_ic the activation of patch i in channel c and g its gradient:

    ==================  ===========================================================
    ``"grad_cam"``      Σ_c x_ic · mean_j g_jc
    ``"hires_cam"``     Σ_c x_ic · g_ic
    ``"layer_cam"``     Σ_c x_ic · (g_ic)⁺
    ``"element_wise"``  Σ_c (x_ic · g_ic)⁺
    ``"x_grad_cam"``    Σ_c x_ic · Σ_j (x_jc · g_jc / Σ_k x_kc)
    ``"grad_cam++"``    Σ_c x_ic · Σ_j (g_jc)⁺ · g_jc² / (2 g_jc² + g_jc³ Σ_k x_kc)
    ``"eigen_cam"``     first principal component of x over patches; no class
    ==================  ===========================================================

    Prefix tokens are left out of all means and sums. ``"grad_cam++"`` depends on the scale of the logits, so its maps
    are not comparable between models. The sign of ``"eigen_cam"`` is arbitrary; it is chosen so that the largest
    magnitude is positive.

    Reference: Selvaraju et al., 2017 (arXiv 1610.02391); Draelos & Carin, 2020 (arXiv 2011.08891); Jiang et al., 2021
    (LayerCAM, TIP); Chattopadhay et al., 2018 (arXiv 1710.11063); Fu et al., 2020 (arXiv 2008.02312);
    Muhammad & Yeasin, 2020 (arXiv 2008.00299).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        layer: index of the block, from 0; negative from the end.
        variant: a row of the table.
        at: ``"norm"`` for the output of the norm before attention (for the input of a block that normalises after
            attention), ``"block"`` for the output of the block. If a model reads its CLS token, no gradient reaches the
            patches in the output of the last block.
        rules: ``"plain"``, ``"libra"`` or ``"attn_lrp"`` in the backward pass, see :mod:`vitscope.attention.rules`.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        a signed attribution whose ``values`` (batch, height, width) are raw: not clamped, not rescaled. They lie on the
        finest grid; a patch of a coarser block repeats its value.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks of the model are unknown, or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.grad_cam(vs.load("vit-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 8, 8])
    """
    require_choice(variant, Variant, "variant")
    require_choice(at, Position, "at")
    options = GradientOptions(weights=False, rules=require_rules(rules))

    def watched(blocks: Sequence[Block]) -> list[nn.Module]:
        if not blocks:
            return []
        block = blocks[require_index(layer, len(blocks), "layer", "the model")]
        module = block.module if at == "block" else block.first_norm
        return [] if module is None else [module]

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(model, images, options, watch=watched) as run:
            finest = grid_of(run.trace)
            streams = run.require_streams()
            index = require_index(layer, len(streams), "layer", "the model") % len(streams)
            tensor = next(iter(run.outputs.values()), streams[index])
            explained = score(run.model, run.output, run.has_classes, target, output)
            (gradient,) = run.gradients(explained.values, [tensor])
            grid = _grid_of_output(run, index, tensor) if at == "block" else run.grid(index)
            activations, gradients = (run.patches(value.detach(), grid) for value in (tensor, gradient))
            values = _cam(activations, gradients, variant)
            if variant == "hires_cam":
                values = without_rounding(values, (activations * gradients).abs().sum(-1), run.dtype)
            values = values.view(-1, grid.height, grid.width)
            parameters = {"layer": index, "variant": variant, "at": at, "rules": rules}
            return gradient_result(
                run, "grad_cam", parameters, explained, _repeated(values, grid, finest), finest, signed=True
            )

    return in_batches(images, target, explain)


def _grid_of_output(run: GradientCapture, layer: int, tensor: Tensor) -> Grid:
    """Return the grid of a block's output, which is coarser than the block's own if the block ends in merging."""
    grid = run.grid(layer)
    count = tensor[0, ..., 0].numel()
    if count != grid.num_tokens and layer + 1 < run.trace.num_layers and run.grid(layer + 1).num_tokens == count:
        return run.grid(layer + 1)
    return grid


def _cam(x: Tensor, g: Tensor, variant: Variant) -> Tensor:
    """Return the map, (batch, patch), from activations and gradients, both (batch, patch, channel)."""
    if variant == "hires_cam":
        return (x * g).sum(-1)
    if variant == "eigen_cam":
        centred = x.to(torch.promote_types(x.dtype, torch.float32)) - x.mean(1, keepdim=True)
        component = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]
        projection = (centred @ component[..., None])[..., 0]
        largest = projection.gather(1, projection.abs().argmax(1, keepdim=True))
        return torch.where(largest < 0, -projection, projection)
    if variant == "layer_cam":
        return (x * g.clamp_min(0)).sum(-1)
    if variant == "element_wise":
        return (x * g).clamp_min(0).sum(-1)
    if variant == "grad_cam":
        weights = g.mean(1, keepdim=True)
    elif variant == "x_grad_cam":
        weights = (x * g / (x.sum(1, keepdim=True) + 1e-7)).sum(1, keepdim=True)
    else:
        ratios = g**2 / (2 * g**2 + x.sum(1, keepdim=True) * g**3 + 1e-6)
        weights = (torch.where(g == 0, 0.0, ratios) * g.clamp_min(0)).sum(1, keepdim=True)
    return (x * weights).sum(-1)


def _repeated(values: Tensor, grid: Grid, finest: Grid) -> Tensor:
    """Return a map of a coarser grid on the finest grid, with every value repeated."""
    if (grid.height, grid.width) == (finest.height, finest.width):
        return values
    factor = 1
    while -(-finest.height // factor) > grid.height:
        factor *= 2
    if (-(-finest.height // factor), -(-finest.width // factor)) != (grid.height, grid.width):
        raise UnsupportedModelError(
            f"a block has a grid of {grid.height}×{grid.width}, which is not the finest grid of "
            f"{finest.height}×{finest.width} merged by halves"
        )
    repeated = values.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return repeated[:, : finest.height, : finest.width]
