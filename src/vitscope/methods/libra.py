"""LibraGrad (Mehri et al., 2024): gradients that are complete, and the maps that they make."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitscope.errors import CallError, warn
from vitscope.methods._gradient import gradient_result, in_batches, require_choice, to_finest
from vitscope.methods.attention_map import grid_of
from vitscope.methods.input_x_gradient import Place, input_relevance
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients
from vitscope.typing import Target
from vitscope.validation import require_non_negative

MAX_ERROR_SHARE = 1e-3  # of the absolute relevance; more is not rounding

LibraVariant = Literal["full_grad_plus", "full_grad", "grad_cam_plus", "input_x_gradient"]


def libra(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    variant: LibraVariant = "full_grad_plus",
    gamma: float = 0.0,
    conv_gamma: float = 0.0,
    at: Place = "patches",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by gradients under Libra's rules, which account for the whole output.

    Attention weights, the gates of activation functions and the deviations of norms are constants, so at every block l
    Σ h_l ⊙ ∇h_l + Σ (later biases ⊙ their gradients) = f. With h_l the input of block l, token by token:

    ========================  =====================================================
    ``"full_grad_plus"``      Σ_l Σ_c h_l ⊙ ∇h_l + Σ biases ⊙ ∇
    ``"full_grad"``           Σ_c h₀ ⊙ ∇h₀ + Σ biases ⊙ ∇; everything sums to f
    ``"grad_cam_plus"``       Σ_l Σ_c h_l · mean over all tokens of ∇h_l
    ``"input_x_gradient"``    Σ_c h₀ ⊙ ∇h₀
    ========================  =====================================================

    Blocks on coarser grids are carried to the finest grid with equal shares in patch merging.

    Reference: Mehri et al., 2024 (arXiv 2411.16760); Srinivas & Fleuret, 2019 (arXiv 1905.00780).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        variant: a row of the table.
        gamma: γ of the γ-rule of linear layers, at least 0. With γ > 0, the law above does not hold.
        conv_gamma: γ of the γ-rule of the patch embedding, at least 0. It only matters for pixels.
        at: the input to explain: ``"patches"``; or ``"pixels"``, only for the variant ``"input_x_gradient"``.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        a signed attribution whose ``values`` (batch, height, width) are the patches' part on the finest grid.
        ``provenance["completeness"]`` holds for each image the explained ``output``, the ``prefix`` part on tokens
        before the patches, the ``unplaced`` part of biases that belong to no token or to padding, and the ``error`` of
        the law above at the first block, which is rounding.

    Raises:
        CallError: as for :func:`vitscope.input_x_gradient`, or the variant has no map of pixels.
        UnsupportedModelError: as for :func:`vitscope.input_x_gradient`.
        WorkError: as for :func:`vitscope.capture`.

    Warns:
        VitscopeWarning: without γ, the law does not hold for the logit: the model computes with functions that have no
            rule.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.libra(vs.load("vit-nano"), skimage.data.chelsea(), target="cat")
        >>> result.values.shape, abs(result.provenance["completeness"][0]["error"]) < 1e-4
        (torch.Size([1, 8, 8]), True)
    """
    require_choice(variant, LibraVariant, "variant")
    require_choice(at, Place, "at")
    gamma, conv_gamma = require_non_negative(gamma, "gamma"), require_non_negative(conv_gamma, "conv_gamma")
    if at == "pixels" and variant != "input_x_gradient":
        raise CallError(f"variant={variant!r} has no map of pixels: pass at='patches' or variant='input_x_gradient'")
    parameters = {"variant": variant, "gamma": gamma, "conv_gamma": conv_gamma, "at": at}
    with_biases = variant != "input_x_gradient"
    options = GradientOptions(
        weights=False, rules="libra", gamma=gamma, conv_gamma=conv_gamma, pixels=at == "pixels", biases=with_biases
    )

    if not with_biases:
        return input_relevance("libra", model, images, target, options, parameters, output)

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(model, images, options) as run:
            explained = score(run.model, run.output, run.has_classes, target, output)
            streams = list(run.require_streams())
            gradients = run.gradients(explained.values, streams)
            return _map(run, parameters, explained, streams, gradients)

    return in_batches(images, target, explain)


def _map(
    run: GradientCapture, parameters: dict[str, Any], explained: Any, streams: list[Tensor], gradients: list[Tensor]
) -> Attribution:
    """Return the map of the inputs of all blocks and of the biases."""
    variant, finest = parameters["variant"], grid_of(run.trace)
    dtype = torch.promote_types(streams[0].dtype, torch.float32)
    outputs = explained.values.detach().to(dtype)
    total = outputs.new_zeros(len(outputs), finest.num_tokens)
    unplaced, attributed, absolute = (torch.zeros_like(outputs) for _ in range(3))
    for layer, (stream, gradient) in enumerate(zip(streams, gradients, strict=True)):
        h, g = (run.tokens(tensor.detach(), layer).to(dtype) for tensor in (stream, gradient))
        if layer == 0:
            attributed += (h * g).sum((1, 2))
            absolute += (h * g).abs().sum((1, 2))
        elif variant == "full_grad":
            break
        relevance = (h * g.mean(1, keepdim=True)).sum(-1) if variant == "grad_cam_plus" else (h * g).sum(-1)
        tokens, padding = to_finest(run.trace, relevance, run.grid(layer), "libra")
        total, unplaced = total + tokens, unplaced + padding
    for term in run.bias_terms():
        attributed += term.values.to(dtype).sum(1) + term.padding.to(dtype)
        if variant == "grad_cam_plus":
            continue
        unplaced += term.padding.to(dtype)
        if term.grid is None:
            unplaced += term.values.to(dtype).sum(1)
        else:
            tokens, padding = to_finest(run.trace, term.values.to(dtype), term.grid, "libra")
            total, unplaced = total + tokens, unplaced + padding
    prefix = total[:, : finest.prefix].sum(1)
    columns = (outputs, prefix, unplaced, outputs - attributed)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    completeness = [dict(zip(("output", "prefix", "unplaced", "error"), row, strict=True)) for row in rows]
    if not parameters["gamma"] and not parameters["conv_gamma"] and explained.output == "logit":
        _check_law(run, outputs - attributed, absolute)
    return gradient_result(
        run,
        "libra",
        parameters,
        explained,
        finest.patches(total),
        finest,
        signed=True,
        facts={"completeness": completeness},
    )


def _check_law(run: GradientCapture, errors: Tensor, absolute: Tensor) -> None:
    """Warn if the law does not hold, because the model computes with a function that has no rule.

    Args:
        run: the run.
        errors: the part of each output that nothing received, (batch,).
        absolute: sum of the absolute relevance of the first tokens, (batch,).
    """
    if run.dtype not in (torch.float32, torch.float64):
        return  # rounding alone may reach a percent
    share = float((errors.abs() / absolute.clamp_min(torch.finfo(absolute.dtype).tiny)).max())
    if share > MAX_ERROR_SHARE:
        warn(
            f"libra does not account for the whole output of {run.model.name}: {share:.2g} of the absolute relevance "
            "is missing, because the model computes with functions for which Libra has no rule"
        )
