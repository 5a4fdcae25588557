"""Input times gradient, its mean under noise (SmoothGrad), and AttnLRP, which is the same with other rules."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitscope.attention.rules import RuleName
from vitscope.methods._gradient import gradient_result, in_batches, pixel_map, require_choice, require_rules
from vitscope.methods.attention_map import grid_of
from vitscope.models.targets import Score, ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients
from vitscope.typing import Target
from vitscope.validation import require_at_least, require_non_negative, require_seed

Place = Literal["patches", "pixels"]


def input_x_gradient(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    rules: RuleName = "plain",
    at: Place = "patches",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by the input times its gradient.

    For patches the input is h₀, the tokens that enter the first block: Σ_c h₀ ⊙ ∂f/∂h₀. For pixels it is the
    preprocessed image: Σ_channel x ⊙ ∂f/∂x.

    Reference: Shrikumar et al., 2016 (arXiv 1605.01713); for ``rules="libra"`` Mehri et al., 2024 (arXiv 2411.16760).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        rules: ``"plain"``, ``"libra"`` or ``"attn_lrp"`` in the backward pass, see :mod:`vitscope.attention.rules`.
        at: the input to explain: ``"patches"`` or ``"pixels"``.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        a signed attribution whose ``values`` (batch, height, width) lie on the finest grid, or are one value for each
        pixel that the patches cover. ``provenance["completeness"]`` holds for each image the explained ``output``, the
        ``prefix`` part on tokens before the patches, and the ``error``: the output less everything that the input
        received.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks of the model are unknown, or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.input_x_gradient(vs.load("vit-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 8, 8])
    """
    require_choice(at, Place, "at")
    options = GradientOptions(weights=False, rules=require_rules(rules), pixels=at == "pixels")
    parameters = {"rules": rules, "at": at}

    return input_relevance("input_x_gradient", model, images, target, options, parameters, output)


def attn_lrp(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    gamma: float = 0.0,
    conv_gamma: float = 0.0,
    at: Place = "patches",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by layer-wise relevance propagation through attention.

    The relevance of an activation is the activation times its gradient under the rules ``"attn_lrp"``, see
    :mod:`vitscope.attention.rules`: Σ_c h₀ ⊙ ∂f/∂h₀ for patches, Σ_channel x ⊙ ∂f/∂x for pixels. It is not complete:
    the biases and the softmax keep a part of the output, which the provenance reports as ``error``.

    The authors' implementation, LXT, carries a note about patents on commercial use of this method.

    Reference: Achtibat et al., 2024 (arXiv 2402.05602).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        gamma: γ of the γ-rule of linear layers, at least 0; the authors try 0 to 1 for each model.
        conv_gamma: γ of the γ-rule of the patch embedding, at least 0. It only matters for pixels.
        at: the input to explain: ``"patches"`` or ``"pixels"``.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        a signed attribution, see :func:`vitscope.input_x_gradient`.

    Raises:
        CallError: as for :func:`vitscope.input_x_gradient`.
        UnsupportedModelError: as for :func:`vitscope.input_x_gradient`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.attn_lrp(vs.load("vit-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 8, 8])
    """
    require_choice(at, Place, "at")
    gamma, conv_gamma = require_non_negative(gamma, "gamma"), require_non_negative(conv_gamma, "conv_gamma")
    options = GradientOptions(
        weights=False, rules="attn_lrp", gamma=gamma, conv_gamma=conv_gamma, pixels=at == "pixels"
    )
    parameters = {"gamma": gamma, "conv_gamma": conv_gamma, "at": at}

    return input_relevance("attn_lrp", model, images, target, options, parameters, output)


def smooth_grad(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    samples: int = 20,
    noise: float = 0.15,
    rules: RuleName = "plain",
    at: Place = "patches",
    seed: int = 0,
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by the input times its mean gradient under noise.

    The input is that of :func:`vitscope.input_x_gradient`. Each sample adds normal noise with a deviation of
    ``noise · (max − min)`` of the input. The gradients of all samples are averaged and multiplied by the input without
    noise.

    Reference: Smilkov et al., 2017 (arXiv 1706.03825).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of the
            image without noise.
        samples: number of samples, at least 1.
        noise: deviation of the noise, as a share of the range of the input; at least 0.
        rules: ``"plain"``, ``"libra"`` or ``"attn_lrp"`` in the backward pass, see :mod:`vitscope.attention.rules`.
        at: the input to explain: ``"patches"`` or ``"pixels"``.
        seed: seed of the noise, 0 to 2³² − 1. All images of a batch receive the same noise.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        a signed attribution, see :func:`vitscope.input_x_gradient`; without completeness.

    Raises:
        CallError: as for :func:`vitscope.input_x_gradient`.
        UnsupportedModelError: as for :func:`vitscope.input_x_gradient`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.smooth_grad(vs.load("vit-nano"), skimage.data.chelsea(), samples=3).values.shape
        torch.Size([1, 8, 8])
    """
    require_choice(at, Place, "at")
    samples, noise = require_at_least(1, samples, "samples"), require_non_negative(noise, "noise")
    seed = require_seed(seed)
    rules = require_rules(rules)
    parameters = {"samples": samples, "noise": noise, "rules": rules, "at": at, "seed": seed}

    def explain(images: Any, target: Any) -> Attribution:
        generator = torch.Generator("cpu").manual_seed(seed)

        def with_noise(clean: Tensor) -> Tensor:
            dims = tuple(range(1, clean.ndim))
            deviation = noise * (clean.amax(dims, keepdim=True) - clean.amin(dims, keepdim=True))
            sample = torch.randn(clean.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
            return clean + sample.to(clean) * deviation

        plain = GradientOptions(weights=False, rules=rules, pixels=at == "pixels")
        with capture_gradients(model, images, plain) as run:
            explained = score(run.model, run.output, run.has_classes, target, output).detached()
            run = run.detached()
        clean = require_start(run, at)
        total = torch.zeros_like(clean)
        noisy = GradientOptions(weights=False, rules=rules, pixels=at == "pixels", start=with_noise)
        for _ in range(samples):
            with capture_gradients(model, images, noisy) as sample:
                values = score(sample.model, sample.output, sample.has_classes, explained.fixed_target, output).values
                total += sample.gradients(values, [require_start(sample, at)])[0] / samples
        return relevance_result(run, "smooth_grad", parameters, explained, clean, total, complete=False)

    return in_batches(images, target, explain)


def input_relevance(
    method: str,
    model: VisionModel | nn.Module,
    images: Any,
    target: Target | None,
    options: GradientOptions,
    parameters: dict[str, Any],
    output: ScoreOutput,
) -> Attribution:
    """Return Σ_c input ⊙ gradient of the patches or pixels, under the rules of ``options``.

    Args:
        method: name of the method.
        model, images, target, output: as for :func:`input_x_gradient`.
        options: rules of the run, and where its graph starts.
        parameters: options of the method, with ``at``.
    """

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(model, images, options) as run:
            explained = score(run.model, run.output, run.has_classes, target, output)
            inputs = require_start(run, parameters["at"])
            (gradient,) = run.gradients(explained.values, [inputs])
            return relevance_result(run, method, parameters, explained, inputs, gradient)

    return in_batches(images, target, explain)


def require_start(run: GradientCapture, place: Place) -> Tensor:
    """Return the input to explain: the pixels, or the tokens that enter the first block."""
    return run.pixels if place == "pixels" else run.require_streams()[0]


def relevance_result(
    run: GradientCapture,
    method: str,
    parameters: dict[str, Any],
    explained: Score,
    inputs: Tensor,
    gradient: Tensor,
    *,
    complete: bool = True,
) -> Attribution:
    """Return Σ_c input ⊙ gradient of the patches or pixels.

    Args:
        run: the run.
        method: name of the method.
        parameters: its options, with ``at``.
        explained: what was differentiated.
        inputs: the tokens that entered the first block, or the pixels.
        gradient: their gradient.
        complete: whether to report the completeness.
    """
    inputs, gradient = inputs.detach(), gradient.detach()
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    relevance = inputs.to(dtype) * gradient.to(dtype)
    outputs = explained.values.detach().to(dtype)
    if parameters["at"] == "pixels":
        values, grid = pixel_map(run, relevance.sum(1))
        prefix = outputs.new_zeros(len(outputs))
    else:
        grid = grid_of(run.trace)
        tokens = run.tokens(relevance, 0).sum(-1)
        values, prefix = grid.patches(tokens), tokens[:, : grid.prefix].sum(-1)
    errors = outputs - relevance.flatten(1).sum(1)
    completeness = [
        {"output": value, "prefix": prefix_sum, "error": error}
        for value, prefix_sum, error in zip(outputs.tolist(), prefix.tolist(), errors.tolist(), strict=True)
    ]
    facts = {"completeness": completeness} if complete else {}
    return gradient_result(run, method, parameters, explained, values, grid, signed=True, facts=facts)
