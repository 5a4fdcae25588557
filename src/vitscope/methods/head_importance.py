"""The importance of every attention head for a prediction: the drop of the output if the head is switched off."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.step import AttentionStep, require_index
from vitscope.display import Drawn, counted, ends, one_line
from vitscope.errors import CallError, warn
from vitscope.interventions.head_ablation import AblatedModel, Ablation, Head, Replacement, check_replacement
from vitscope.methods._gradient import in_halves
from vitscope.methods._perturbation import one_by_one, perturbation_method, warn_if_interrupted
from vitscope.models.targets import ScoreOutput, one_per_image, score
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import Evaluations, PerturbationOptions
from vitscope.perturb.batching import BatchedPredictor
from vitscope.perturb.options import BatchArguments
from vitscope.perturb.rendering import Subject, subjects
from vitscope.progress import ProgressCallback
from vitscope.tracing.capture import as_vision_model, provenance
from vitscope.tracing.gradients import capture_gradients
from vitscope.typing import ImageTarget, Target, Weights
from vitscope.validation import require_at_least, short_text

By = Literal["ablation", "gradient"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadImportance(Drawn):
    """The importance of every attention head for the target of each image.

    Attributes:
        values: float32 (image, layer, head). Positive if the head supports the target, negative if it opposes it. NaN
            for heads that a layer lacks because it has fewer than others, and for heads that were not evaluated before
            Ctrl-C.
        layers: index of each layer.
        targets: label of the explained class of each image.
        provenance: method, parameters, model and versions of the libraries; ``outputs`` are the outputs of the whole
            model, ``samples`` the number of ablations, ``interrupted`` says whether Ctrl-C ended the evaluation early.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.head_importance(vs.load("vit-nano"), skimage.data.chelsea(), target="cat")
        <HeadImportance of vit-nano by ablation: 1 image, 6 layers of up to 12 heads, target cat>
    """

    values: Float[Tensor, "image layer head"]
    layers: tuple[int, ...]
    targets: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        images, layers, heads = self.values.shape
        by = short_text(self.provenance.get("parameters", {}).get("by"), "an unknown measure")
        targets = short_text(", ".join(dict.fromkeys(self.targets)), "")
        return one_line(
            f"HeadImportance of {short_text(self.provenance.get('model'), 'no model')[:60]} by {by}: "
            f"{counted(images, 'image')}",
            f"{counted(layers, 'layer')} of up to {heads} heads",
            ends(self.values),
            f"target {targets}",
        )

    def top(self, count: int = 5, *, sign: str = "positive", index: int = 0) -> list[Head]:
        """Return the heads with the largest importance for one image, as (layer, head), largest first.

        Args:
            count: maximum number of heads.
            sign: ``"positive"`` for heads that support the target, ``"negative"`` for those that oppose it, ``"both"``
                for the largest magnitudes.
            index: index of the image.

        Raises:
            CallError: ``sign`` is none of these, ``count`` is not a whole number or is negative, or there is no such
                image.

        Examples:
            >>> import torch, vitscope as vs
            >>> values = torch.tensor([[[0.25, -1.0], [0.5, 0.0]]])
            >>> vs.HeadImportance(values, layers=(0, 1), targets=("cat",)).top()
            [(1, 0), (0, 0)]
        """
        signs: dict[str, Callable[[Tensor], Tensor]] = {"positive": lambda x: x, "negative": lambda x: -x, "both": abs}
        if sign not in signs:
            raise CallError(f"sign is {sign!r}: choose {', '.join(signs)}")
        values = self.values[require_index(index, len(self.values), "image", "this result")]
        strength = signs[sign](values.flatten().nan_to_num(nan=0.0))
        order = strength.argsort(descending=True, stable=True)[: require_at_least(0, count, "count")]
        heads = values.shape[1]
        return [(self.layers[i // heads], i % heads) for i in order.tolist() if strength[i] > 0]

    def as_json(self) -> dict[str, Any]:
        """Return all attributes as JSON values; NaN becomes None."""
        values = [
            [[None if math.isnan(value) else value for value in layer] for layer in image]
            for image in self.values.tolist()
        ]
        lists = {"layers": list(self.layers), "targets": list(self.targets)}
        return {"values": values, **lists, "provenance": dict(self.provenance)}


@perturbation_method(BatchArguments, output="logit")
def head_importance(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    by: By = "ablation",
    replacement: Replacement = "mean",
    **options: Unpack[BatchArguments],
) -> HeadImportance:
    """Compute how much every attention head supports a class: the drop of its output without the head.

    The output of a head is o(q) = Σ_k A(q, k) v(k) for each query q, before the projection of the block. It is replaced
    by (1/n) Σ_q o(q), the mean over all n tokens of the image (prefix tokens included, padding excluded, all windows of
    the block), or by zero; all else stays. Each head takes one forward pass, in batches. Values of different heads do
    not add up: heads can replace each other. Heads of a pooling layer are not blocks and have no value.

    Reference: Michel et al., 2019 (arXiv 1905.10650), who set the output of a head to zero, and whose estimate by
    gradients is the magnitude of this one.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images, or a tensor (batch, 3, height, width) that is already preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        by: ``"ablation"`` for the output of the whole model minus the output without the head; ``"gradient"`` for its
            linear estimate with ``replacement="zero"``: Σ A ⊙ ∂f/∂A over queries and keys, which is Σ o ⊙ ∂f/∂o, in one
            forward and one backward pass for all heads.
        replacement: output of a head that is switched off: ``"mean"`` or ``"zero"``. It does not matter for
            ``"gradient"``.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        the importance of each head for each image, (image, layer, head).

    Raises:
        CallError: an option is out of range, the model has no such class, or ``images`` are not valid.
        NoAttentionError: as for :func:`vitscope.capture`.
        UnsupportedModelError: as for :func:`vitscope.capture`, or the mean over the tokens is not available.
        KeyboardInterrupt: Ctrl-C was pressed before two heads were evaluated. After that, Ctrl-C ends the evaluation
            early, with a warning.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.head_importance(vs.load("vit-nano"), skimage.data.chelsea(), replacement="zero")
        >>> result.targets, result.values.shape
        (('cat',), torch.Size([1, 6, 12]))
    """
    settings = PerturbationOptions(**options)
    check_replacement(replacement)
    if by not in get_args(By):
        raise CallError(f"unknown measure {by!r}: choose {' or '.join(get_args(By))}")
    vision = as_vision_model(model)
    inputs = subjects(vision, images)
    if not inputs:
        raise CallError("no image was given")
    if by == "gradient":
        return _with_warnings(_by_gradient(vision, images, target, settings.output))
    ablated: dict[tuple[int, ...], AblatedModel] = {}  # by the size of the input, which decides the blocks

    def explain(item: tuple[Subject, ImageTarget | None], report: ProgressCallback) -> _ImageImportance:
        subject, image_target = item
        size = tuple(subject.pixels.shape[1:])
        if size not in ablated:
            ablated[size] = AblatedModel(vision, subject.pixels)
        predictor = _HeadPredictor(ablated[size], subject, settings, replacement, report)
        column = predictor.target(image_target)
        heads = sorted(ablated[size].heads)
        evaluations = predictor.evaluate(heads, column)
        samples = int(evaluations.evaluated.sum())
        warn_if_interrupted(evaluations.interrupted, samples, len(heads))
        original = float(predictor.original[column])
        drops = dict(zip(heads, original - evaluations.outputs[:, 0], strict=True))
        return _ImageImportance(
            drops, predictor.label(column), original, predictor.output, samples, evaluations.interrupted
        )

    pairs = list(zip(inputs, one_per_image(target, len(inputs)), strict=True))
    results = one_by_one(pairs, explain, lambda result: result.interrupted, settings.progress)
    parameters = {"by": by, "replacement": replacement, "output": results[0].kind}
    record = {**provenance(vision), "method": "head_importance", "parameters": parameters}
    return _with_warnings(_joined(results, record))


def _with_warnings(result: HeadImportance) -> HeadImportance:
    """Return a result; warn of each image for which no head matters."""
    output = result.provenance["parameters"]["output"]
    for label, values in zip(result.targets, result.values, strict=True):
        finite = values[values.isfinite()]
        if len(finite) and not bool(finite.any()):
            warn(f"head_importance of {label!r} is zero everywhere: no head changes its {output}")
    return result


@dataclass(frozen=True)
class _ImageImportance:
    """The importance of every head for one image.

    Attributes:
        drops: importance of each head; NaN if it was not evaluated.
        label: the explained class.
        output: output of the whole model.
        kind: kind of the output.
        samples: number of heads that were evaluated.
        interrupted: whether Ctrl-C ended the evaluation early.
    """

    drops: Mapping[Head, float]
    label: str
    output: float
    kind: str
    samples: int
    interrupted: bool


def _joined(results: Sequence[_ImageImportance], record: Mapping[str, Any]) -> HeadImportance:
    """Return the results of single images as one."""
    layers, heads = (1 + max(head[axis] for head in results[0].drops) for axis in (0, 1))
    values = np.full((len(results), layers, heads), np.nan, np.float32)
    for image, result in zip(values, results, strict=True):
        for head, drop in result.drops.items():
            image[head] = drop
    facts = {
        "outputs": [result.output for result in results],
        "samples": sum(result.samples for result in results),
        "interrupted": any(result.interrupted for result in results),
    }
    targets = tuple(result.label for result in results)
    return HeadImportance(torch.from_numpy(values), tuple(range(layers)), targets, {**record, **facts})


def _by_gradient(model: VisionModel, images: Any, target: Target | None, output: ScoreOutput) -> HeadImportance:
    """Return Σ A ⊙ ∂f/∂A of every head."""

    def explain(images: Any, target: Any) -> HeadImportance:
        return _estimates(model, images, target, output)

    def join(batches: Sequence[HeadImportance]) -> HeadImportance:
        values, targets = torch.cat([batch.values for batch in batches]), sum((batch.targets for batch in batches), ())
        records = [batch.provenance for batch in batches]
        facts = {"outputs": [output for record in records for output in record["outputs"]], "samples": len(values)}
        return replace(batches[0], values=values, targets=targets, provenance={**records[0], **facts})

    return in_halves(images, target, explain, join)


def _estimates(model: VisionModel, images: Any, target: Target | None, output: ScoreOutput) -> HeadImportance:
    """Return the importance of every head by gradient, of a single batch."""
    sums: dict[int, Tensor] = {}

    def on_weights(step: AttentionStep, _: slice, weights: Weights, gradient: Weights) -> None:
        total = (weights * gradient).sum((1, 3, 4))  # (batch, head)
        sums[step.layer] = sums[step.layer] + total if step.layer in sums else total

    with capture_gradients(model, images) as run:
        explained = score(run.model, run.output, run.has_classes, target, output)
        run.gradients(explained.values, [run.start], on_weights)
        record = dict(run.trace.provenance)
        layers = run.trace.num_layers
    heads = max(total.shape[1] for total in sums.values())
    values = torch.full((len(explained.labels), layers, heads), math.nan, dtype=torch.float32, device="cpu")
    for layer, total in sums.items():
        values[:, layer, : total.shape[1]] = total.float().cpu()
    parameters = {"by": "gradient", "replacement": "zero", "output": explained.output}
    facts = {"outputs": explained.values.tolist(), "samples": len(values), "interrupted": False}
    record |= {"method": "head_importance", "parameters": parameters, **facts}
    return HeadImportance(values, tuple(range(layers)), tuple(explained.labels), record)


class _HeadPredictor(BatchedPredictor):
    """A model and one image: the outputs without single heads."""

    def __init__(
        self,
        ablated: AblatedModel,
        subject: Subject,
        options: PerturbationOptions,
        replacement: Replacement,
        report: ProgressCallback,
    ) -> None:
        super().__init__(ablated.model, subject, options, report=report)
        self._ablated, self._replacement = ablated, replacement

    def evaluate(self, heads: Sequence[Head], column: int) -> Evaluations:
        """Return the outputs of a class without each of the heads."""

        def finish(batch: list[int], _: Any) -> Tensor:
            ablations = [Ablation(heads=frozenset({heads[index]})) for index in batch]
            pixels = self.subject.pixels.expand(len(batch), -1, -1, -1)
            return self._ablated.run(self._logits, pixels, ablations, self._replacement)

        no_preparation: Callable[..., None] = lambda *_: None  # noqa: E731
        return self._evaluate(len(heads), self._batches_in_order(len(heads)), no_preparation, finish, [column])
