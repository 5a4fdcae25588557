"""LIME for images (Ribeiro et al., 2016): a linear model of a classifier's output, as segments are hidden."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn

from vitscope.errors import CallError, warn
from vitscope.estimators.surrogate import Surrogate, fit, upper_tail
from vitscope.methods._perturbation import (
    explain_each,
    perturbation_method,
    segment_result,
    stored_samples,
    warn_if_interrupted,
)
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PerturbationArguments, PerturbationOptions
from vitscope.perturb.masks import KernelSampler, PairedSampler, Sampler, UniformSampler
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.typing import ImageTarget, Target
from vitscope.validation import require_at_least, require_integer, require_number, require_ratio, require_seed

Sampling = Literal["lime", "paired", "glime"]

# The numbers of samples after which num_samples="auto" checks whether the ranking is stable.
MAX_SAMPLES = 10_000
LOOKS = [*(round(128 * 1.25**look) for look in range(20)), MAX_SAMPLES]

MIN_KERNEL_WIDTH = 1e-3  # a narrower kernel gives weight to the original image alone


@perturbation_method()
def lime(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    num_samples: int | Literal["auto"] = 1000,
    segments: Any = "quickshift",
    sampling: Sampling | None = None,
    top_labels: int = 5,
    kernel_width: float = 0.25,
    alpha: float = 1.0,
    confidence: float = 0.95,
    top_segments: int = 5,
    tie: float = 0.1,
    **options: Unpack[PerturbationArguments],
) -> SegmentAttribution:
    """Explain a prediction by how much each segment of the image adds to the probability of a class.

    Segments are hidden at random, the model is evaluated, and a ridge regression of the outputs on the visible
    segments, weighted by proximity to the original image, gives one coefficient per segment. With
    ``sampling="lime"`` and the same segments and seed, coefficients, intercept, score and local prediction equal those
    of PyPI's ``lime`` 0.2 (``LimeImageExplainer(random_state=seed).explain_instance(photo, …)``). A photo of more
    than 400,000 pixels is explained on a smaller copy; ``provenance["parameters"]["perturbed_at"]`` is its size.

    Reference: Ribeiro, Singh & Guestrin, 2016 (arXiv 1602.04938); GLIME: Tan et al., 2023 (arXiv 2311.15722).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images of any sizes, or a tensor (batch, 3, height, width) that is already
            preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        num_samples: number of masks, including the original image; at least 2. ``"auto"`` keeps sampling, up to 10,000
            masks, until the ranking of the ``top_segments`` largest weights is stable. It is stable if any two adjacent
            segments of the ranking, and its last segment and any other, differ significantly at ``confidence`` or by
            less than ``tie``.
        segments: ``"quickshift"`` with the settings of PyPI's lime, ``"slic"``, ``"patches"``, an array of labels as
            large as the photo, (pixel height, pixel width), or a function of the photo that returns such an array.
        sampling: ``"lime"`` hides each segment with probability ½. ``"paired"`` does the same, but follows each mask
            with its complement. ``"glime"`` draws masks from the kernel, so that the regression needs no weights. By
            default ``"lime"``, or ``"paired"`` if ``num_samples="auto"``.
        top_labels: number of the most probable classes to explain besides the target, from the same outputs. All other
            classes can be explained later, see :meth:`SegmentAttribution.of`.
        kernel_width: width of the exponential kernel over the cosine distance; by default that of PyPI's lime.
        alpha: ridge penalty; by default that of PyPI's lime.
        confidence: confidence level of the intervals and of ``num_samples="auto"``, between 0 and 1.
        top_segments: number of segments whose ranking has to be stable for ``num_samples="auto"``.
        tie: difference of two weights, as a share of the largest weight, below which they count as equal.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        a result whose ``values`` (batch, pixel height, pixel width) are the weights at each pixel of the photo; those
        of photos of different sizes are enlarged to the largest, see :attr:`Attribution.sizes`. For a single image it
        also has ``weights``, ``intervals``, ``intercept``, ``score``, ``held_out_score`` and ``segments``; take
        ``result[i]`` of a batch first. Ctrl-C ends the evaluation early: the result is then based on the samples so
        far, with a warning, and ``provenance["interrupted"]`` is True.

    Raises:
        CallError: an option is out of range, the model has no such class, or an image has one segment or more than
            4,000.
        UnsupportedModelError: ``hide="drop"`` is not supported for the model.
        WorkError: an image cannot be read, the model's output is NaN or infinity, or there is not enough memory.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.lime(vs.load("vit-nano"), skimage.data.chelsea(), segments="slic", num_samples=500)
        >>> result.target, result.weights.shape == (len(result.intervals),)
        ('cat', True)
    """
    settings = PerturbationOptions(**options)
    plan = Plan.checked(
        num_samples=num_samples,
        sampling=sampling,
        kernel_width=kernel_width,
        alpha=alpha,
        confidence=confidence,
        top_segments=top_segments,
        tie=tie,
        seed=settings.seed,
    )
    top_labels = require_at_least(0, top_labels, "top_labels")

    def explain(masked_model: MaskedModel, image_target: ImageTarget | None) -> SegmentAttribution:
        return _explain(masked_model, plan, masked_model.columns(image_target, top_labels))

    return explain_each(model, images, segments, settings, target, explain)


@dataclass(frozen=True)
class Plan:
    """The checked options of :func:`lime` that say how masks are drawn and how the regression is weighted."""

    num_samples: int | None  # None: until the ranking is stable
    sampling: Sampling
    kernel_width: float
    alpha: float
    confidence: float
    top_segments: int
    tie: float
    seed: int

    @classmethod
    def checked(
        cls,
        *,
        num_samples: Any = 1000,
        sampling: Any = None,
        kernel_width: Any = 0.25,
        alpha: Any = 1.0,
        confidence: Any = 0.95,
        top_segments: Any = 5,
        tie: Any = 0.1,
        seed: Any = 0,
    ) -> "Plan":
        """Return a plan with the options of :func:`lime`, after checking them.

        Raises:
            CallError: an option is out of range.
        """
        if isinstance(num_samples, str) and num_samples != "auto":
            raise CallError(f"num_samples is {num_samples!r}: pass a whole number, or 'auto'")
        count = None if num_samples == "auto" else require_integer(num_samples, "num_samples")
        if count is not None and count < 2:
            raise CallError(f"num_samples is {count}, at least 2 are expected: the first is the original image")
        sampling = sampling or ("paired" if count is None else "lime")
        if sampling not in get_args(Sampling):
            raise CallError(f"unknown sampling {sampling!r}: choose {', '.join(get_args(Sampling))}")
        width, penalty = require_number(kernel_width, "kernel_width"), require_number(alpha, "alpha")
        if width < MIN_KERNEL_WIDTH or penalty < 0:
            raise CallError(
                f"kernel_width is {width} and alpha is {penalty}: at least {MIN_KERNEL_WIDTH} and 0 are expected"
            )
        if not 0 < require_ratio(confidence, "confidence") < 1:
            raise CallError(f"confidence is {confidence}: a value between 0 and 1 is expected, such as 0.95")
        return cls(
            count,
            sampling,
            width,
            penalty,
            float(confidence),
            require_at_least(1, top_segments, "top_segments"),
            require_ratio(tie, "tie"),
            require_seed(seed),
        )

    def sampler(self, segments: int) -> Sampler:
        """Return a sampler of masks over this number of segments."""
        if self.sampling == "paired":
            return PairedSampler(segments, self.seed)
        if self.sampling == "glime":
            return KernelSampler(segments, self.seed, lambda counts: kernel(counts / segments, self.kernel_width))
        return UniformSampler(segments, self.seed)

    def fitted(
        self,
        rows: Bool[np.ndarray, "sample segment"],
        outputs: Float[np.ndarray, "sample label"],
        drawn: Int[np.ndarray, " sample"] | None = None,
    ) -> Surrogate:
        """Return the fitted regression; ``drawn`` holds the indices of these rows among all that were drawn."""
        return fit(rows, outputs, self.sample_weights(rows), self.alpha, self.groups(len(rows), drawn))

    def sample_weights(self, rows: Bool[np.ndarray, "sample segment"]) -> Float[np.ndarray, " sample"]:
        """Return the weight of each row in the regression."""
        return np.ones(len(rows)) if self.sampling == "glime" else kernel(rows.mean(1), self.kernel_width)

    def groups(self, count: int, drawn: Int[np.ndarray, " sample"] | None = None) -> Int[np.ndarray, " sample"]:
        """Return the group of each of ``count`` rows; a row and its complement share one."""
        drawn = np.arange(count) if drawn is None else drawn
        groups = (drawn + 1) // 2 if self.sampling == "paired" else drawn
        return np.unique(groups, return_inverse=True)[1]

    @property
    def looks(self) -> Sequence[int]:
        """Numbers of samples after which the ranking is checked."""
        return LOOKS if self.num_samples is None else [self.num_samples]


def kernel(visible: Float[np.ndarray, " sample"], width: float) -> Float[np.ndarray, " sample"]:
    """Return lime's weight of masks, given their visible share of segments: the cosine distance is 1 − √share."""
    distance = 1 - np.sqrt(visible)
    return np.sqrt(np.exp(-(distance**2) / width**2))


def _explain(masked_model: MaskedModel, plan: Plan, columns: Sequence[int]) -> SegmentAttribution:
    """Sample, evaluate and fit, until the number of samples is reached or the ranking is stable."""
    segments = masked_model.require_segments().count
    if plan.num_samples is not None and plan.num_samples <= segments:
        warn(
            f"num_samples is {plan.num_samples} for {segments} segments: fewer samples than unknowns, so the weights "
            f"depend on the ridge penalty; use {5 * segments} samples or more, or fewer segments"
        )
    sampler = plan.sampler(segments)
    stored = masked_model.stored_classes(plan.num_samples or MAX_SAMPLES)
    rows, outputs = np.zeros((0, segments), dtype=bool), np.zeros((0, len(columns)))
    class_outputs = np.zeros((0, len(stored)), dtype=np.float32)
    drawn = np.zeros(0, dtype=np.int64)
    stable, interrupted = None, False
    surrogate = None
    for total in plan.looks:
        try:
            masks = sampler.draw(total - len(rows))
            evaluations = masked_model.evaluate(
                masked_model.masks(masks),
                columns,
                stored=stored,
                before=len(rows),
                total=plan.num_samples or MAX_SAMPLES,
            )
            evaluated = evaluations.evaluated
            drawn = np.concatenate([drawn, len(rows) + np.flatnonzero(evaluated)])
            rows = np.concatenate([rows, masks[evaluated]])
            outputs = np.concatenate([outputs, evaluations.outputs[evaluated]])
            class_outputs = np.concatenate([class_outputs, evaluations.class_outputs[evaluated]])
            interrupted = evaluations.interrupted
            surrogate = plan.fitted(rows, outputs, drawn)
            if plan.num_samples is None:
                # Each check may be wrong; dividing the error bounds that of all checks together by 1 − confidence.
                stable = is_stable(surrogate, plan.top_segments, (1 - plan.confidence) / len(LOOKS), plan.tie)
        except KeyboardInterrupt:
            # Ctrl-C was pressed between two batches.
            if len(rows) < 2 or len(rows) != len(class_outputs):
                raise
            interrupted = True
        if stable or interrupted:
            break
    if surrogate is None or interrupted:
        surrogate = plan.fitted(rows, outputs, drawn[: len(rows)])
    if plan.num_samples is None and not stable and not interrupted:
        warn(
            f"after {len(rows)} samples the ranking of the top {plan.top_segments} segments is still not stable at "
            f"{plan.confidence:.0%}: see the intervals"
        )
    if (np.ptp(outputs[:, 0]) == 0) and len(rows) > 1:
        warn(
            f"the output for {masked_model.label(columns[0])!r} is the same for all {len(rows)} masks: "
            "all weights are zero"
        )
    warn_if_interrupted(interrupted, len(rows), plan.num_samples)
    parameters = {
        "num_samples": "auto" if plan.num_samples is None else plan.num_samples,
        "sampling": plan.sampling,
        "kernel_width": plan.kernel_width,
        "alpha": plan.alpha,
        "confidence": plan.confidence,
        "seed": plan.seed,
    }
    if plan.num_samples is None:
        parameters |= {"top_segments": plan.top_segments, "tie": plan.tie, "stable": bool(stable)}
    numbers = {"weights": plan.sample_weights(rows), "groups": plan.groups(len(rows), drawn[: len(rows)])}
    return segment_result(
        masked_model,
        "lime",
        parameters,
        columns,
        surrogate.weights,
        surrogate.intervals(plan.confidence),
        surrogate.intercepts,
        (surrogate.scores, surrogate.held_out_scores),
        stored=stored_samples(masked_model, rows, class_outputs, stored, **numbers),
        samples=len(rows),
        interrupted=interrupted,
    )


def is_stable(surrogate: Surrogate, top: int, error: float, tie: float) -> bool:
    """Return whether the ranking of the ``top`` largest weights of the first class is stable.

    Two adjacent weights of the top, and the last of the top and each that follows, are concluded to differ or, if that
    is more certain, to differ by less than ``tie`` times the largest weight. The ranking is stable if the probabilities
    that these conclusions are wrong add up to at most ``error``.
    """
    weights, influences = surrogate.weights[0], surrogate.influences[0]
    order = np.argsort(-weights, kind="stable")
    top = min(top, len(order) - 1)
    first = np.concatenate([order[: top - 1], np.full(len(order) - top, order[top - 1])])
    second = order[1:]
    differences = weights[first] - weights[second]
    deviations = np.sqrt(((influences[:, first] - influences[:, second]) ** 2).sum(0))
    margin = tie * np.abs(weights).max() - differences
    certain = deviations == 0
    wrong = upper_tail(np.maximum(differences, margin) / np.where(certain, 1.0, deviations), surrogate.freedom)
    return bool(wrong[~certain].sum() <= error)
