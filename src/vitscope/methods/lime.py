"""LIME for images (Ribeiro et al., 2016): a linear model of what the classifier says when segments are hidden."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn

from vitscope.errors import CallError, warn
from vitscope.methods._perturbation import PerturbationOptions, explain_each, segment_result, warn_if_interrupted
from vitscope.methods.surrogate import Surrogate, fit, upper_tail
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel
from vitscope.perturb.masks import KernelSampler, PairedSampler, Sampler, UniformSampler
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.validation import at_least, number, ratio, seed_number, whole_number

Sampling = Literal["lime", "paired", "glime"]

# num_samples="auto": at how many samples it looks whether the order is settled.
MOST_SAMPLES = 10_000
LOOKS = [*(round(128 * 1.25**look) for look in range(20)), MOST_SAMPLES]

NARROWEST = 1e-3  # kernels: narrower ones weigh nothing but the whole image


def lime(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: int | str | None = None,
    num_samples: int | Literal["auto"] = 1000,
    segments: Any = "quickshift",
    hide: Any = "mean",
    seed: int = 0,
    batch_size: int = 64,
    sampling: Sampling | None = None,
    output: Literal["probability", "logit"] = "probability",
    top_labels: int = 5,
    kernel_width: float = 0.25,
    alpha: float = 1.0,
    confidence: float = 0.95,
    top_segments: int = 5,
    tie: float = 0.1,
    progress: Any = False,
) -> SegmentAttribution:
    """How much each segment of an image adds to the probability of a class.

    Segments are hidden at random, the model answers, and a ridge regression of the answers on what was shown, weighted
    by nearness to the whole image, gives one coefficient a segment. With ``sampling="lime"`` and the same segments
    and seed, coefficients, intercept, score and local prediction are those of PyPI's ``lime`` 0.2
    (``LimeImageExplainer(random_state=seed).explain_instance(photo, …)``). A photo of more than 400,000 pixels is
    explained on a smaller copy; ``provenance["parameters"]["perturbed_at"]`` says at which size.

    Reference: Ribeiro, Singh & Guestrin, 2016 (arXiv 1602.04938); GLIME: Tan et al., 2023 (arXiv 2311.15722).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of these, or a tensor (batch, 3, height, width) taken as already preprocessed.
        target: the class, by index or label; by default the likeliest of each image. ``"similarity"`` for a model
            without a classifier: the cosine between its features and those of the whole image.
        num_samples: how many masks, the whole image included; ``"auto"`` goes on until the order of the
            ``top_segments`` weightiest is settled at ``confidence``: each pair of neighbours among them, and the last
            of them against all others, is either told apart or known to differ by less than ``tie`` times the largest
            weight; 10,000 at most.
        segments: ``"quickshift"`` with lime's settings, ``"slic"``, ``"patches"``, labels (pixel height, pixel width)
            of the photo, or a function of the photo that returns them.
        hide: what stands in the place of hidden segments: ``"mean"`` (of each), ``"black"``, ``"grey"``, ``"blur"``,
            ``"noise"``, a colour (0 to 255, one number or three), an image, or ``"drop"``: no pixels at all, the
            patches that are more than half hidden are left out of the computation, which is the faster the fewer are
            left.
        sampling: ``"lime"``, coin tosses; ``"paired"``, each mask with its complement; ``"glime"``, masks drawn from
            the kernel with nothing left to weigh. By default lime's own, and paired where ``num_samples="auto"``.
        output: what is explained, ``"probability"`` (softmax, as lime does) or ``"logit"``.
        top_labels: how many of the likeliest classes are explained beside the target, from the same answers: see
            :meth:`SegmentAttribution.of`.
        kernel_width, alpha: of the exponential kernel over the cosine distance, and of the ridge penalty; lime's.
        confidence: of the intervals and of ``num_samples="auto"``.
        batch_size: images to a forward; it bounds memory and changes nothing else.
        progress: True for a bar on stderr, or a function of (answered, in all).

    Returns:
        ``values`` (batch, pixel height, pixel width), the weights at each pixel of the photo, and for one image
        ``weights``, ``intervals``, ``intercept``, ``score`` and ``segments``; of a batch take ``result[i]`` first.
        Ctrl-C ends the asking early: the result then stands on the answers so far, a warning and
        ``provenance["interrupted"]`` say so.

    Raises:
        CallError: an option is out of range, the target is not there, the image is one single segment, images
            differ in size.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.lime(vs.load("vit-nano"), skimage.data.chelsea(), segments="slic", num_samples=500)
        >>> result.target, result.weights.shape == (len(result.intervals),)
        ('cat', True)
    """
    plan = Plan.checked(
        num_samples=num_samples,
        sampling=sampling,
        kernel_width=kernel_width,
        alpha=alpha,
        confidence=confidence,
        top_segments=top_segments,
        tie=tie,
        seed=seed,
    )
    options = PerturbationOptions(hide, output, batch_size, plan.seed, progress)
    top_labels = at_least(0, top_labels, "top_labels")

    def explain(masked_model: MaskedModel) -> SegmentAttribution:
        return _explain(masked_model, plan, target, top_labels)

    return explain_each(model, images, segments, options, explain)


@dataclass(frozen=True)
class Plan:
    """How masks are drawn and the regression is weighted."""

    num_samples: int | None  # None: until it is settled
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
        """Options as :func:`lime` takes them, or a CallError that says which cannot be meant."""
        if isinstance(num_samples, str) and num_samples != "auto":
            raise CallError(f"num_samples is {num_samples!r}: pass a whole number, or 'auto'")
        count = None if num_samples == "auto" else whole_number(num_samples, "num_samples")
        if count is not None and count < 2:
            raise CallError(f"num_samples is {count}, at least 2 are expected: the first shows the whole image")
        sampling = sampling or ("paired" if count is None else "lime")
        if sampling not in get_args(Sampling):
            raise CallError(f"unknown sampling {sampling!r}: choose {', '.join(get_args(Sampling))}")
        width, penalty = number(kernel_width, "kernel_width"), number(alpha, "alpha")
        if width < NARROWEST or penalty < 0:
            raise CallError(f"kernel_width is {width} and alpha is {penalty}: at least {NARROWEST} and 0 are expected")
        if not 0 < ratio(confidence, "confidence") < 1:
            raise CallError(f"confidence is {confidence}: between 0 and 1 is expected, as 0.95")
        return cls(
            count,
            sampling,
            width,
            penalty,
            float(confidence),
            at_least(1, top_segments, "top_segments"),
            ratio(tie, "tie"),
            seed_number(seed),
        )

    def sampler(self, segments: int) -> Sampler:
        if self.sampling == "paired":
            return PairedSampler(segments, self.seed)
        if self.sampling == "glime":
            return KernelSampler(segments, self.seed, lambda shown: kernel(shown / segments, self.kernel_width))
        return UniformSampler(segments, self.seed)

    def fitted(
        self,
        rows: Bool[np.ndarray, "sample segment"],
        answers: Float[np.ndarray, "sample label"],
        drawn: Int[np.ndarray, " sample"] | None = None,
    ) -> Surrogate:
        """The regression; ``drawn`` says which of the sampler's rows these are, all by default."""
        drawn = np.arange(len(rows)) if drawn is None else drawn
        weights = np.ones(len(rows)) if self.sampling == "glime" else kernel(rows.mean(1), self.kernel_width)
        groups = (drawn + 1) // 2 if self.sampling == "paired" else drawn
        return fit(rows, answers, weights, self.alpha, np.unique(groups, return_inverse=True)[1])

    @property
    def looks(self) -> Sequence[int]:
        """How many samples there are each time that the order is looked at."""
        return LOOKS if self.num_samples is None else [self.num_samples]


def kernel(shown: Float[np.ndarray, " sample"], width: float) -> Float[np.ndarray, " sample"]:
    """lime's weight of a mask that shows this share of the segments: their cosine distance is 1 − √share."""
    distance = 1 - np.sqrt(shown)
    return np.sqrt(np.exp(-(distance**2) / width**2))


def _explain(masked_model: MaskedModel, plan: Plan, target: int | str | None, top_labels: int) -> SegmentAttribution:
    columns = masked_model.columns(target, top_labels)
    segments = masked_model.require_segments().count
    if plan.num_samples is not None and plan.num_samples <= segments:
        warn(
            f"num_samples is {plan.num_samples} for {segments} segments: fewer questions than unknowns, so the weights "
            f"are held up by the ridge penalty alone; take {5 * segments} or more, or fewer segments"
        )
    sampler = plan.sampler(segments)
    rows, answers = np.zeros((0, segments), dtype=bool), np.zeros((0, len(columns)))
    drawn = np.zeros(0, dtype=np.int64)
    settled, interrupted = None, False
    surrogate = None
    for total in plan.looks:
        try:
            masks = sampler.draw(total - len(rows))
            asked = masked_model.ask(
                masked_model.masks(masks), columns, before=len(rows), total=plan.num_samples or MOST_SAMPLES
            )
            drawn = np.concatenate([drawn, len(rows) + np.flatnonzero(asked.asked)])
            rows = np.concatenate([rows, masks[asked.asked]])
            answers = np.concatenate([answers, asked.outputs[asked.asked]])
            interrupted = asked.interrupted
            surrogate = plan.fitted(rows, answers, drawn)
            if plan.num_samples is None:
                # Each look may be wrong; all of them together no more often than was asked for.
                settled = is_settled(surrogate, plan.top_segments, (1 - plan.confidence) / len(LOOKS), plan.tie)
        except KeyboardInterrupt:
            # It came between two questions.
            if len(rows) < 2 or len(rows) != len(answers):
                raise
            interrupted = True
        if settled or interrupted:
            break
    if surrogate is None or interrupted:
        surrogate = plan.fitted(rows, answers, drawn[: len(rows)])
    if plan.num_samples is None and not settled and not interrupted:
        warn(
            f"after {len(rows)} samples the order of the top {plan.top_segments} segments is still not settled at "
            f"{plan.confidence:.0%}: look at the intervals"
        )
    if (np.ptp(answers[:, 0]) == 0) and len(rows) > 1:
        warn(
            f"the answer for {masked_model.label(columns[0])!r} did not change with any of {len(rows)} masks: "
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
        parameters |= {"top_segments": plan.top_segments, "tie": plan.tie, "settled": bool(settled)}
    return segment_result(
        masked_model,
        "lime",
        parameters,
        columns,
        surrogate.weights,
        surrogate.intervals(plan.confidence),
        surrogate.intercepts,
        surrogate.scores,
        samples=len(rows),
        interrupted=interrupted,
    )


def is_settled(surrogate: Surrogate, top: int, error: float, tie: float) -> bool:
    """Whether the order of the ``top`` largest weights of the first class can be relied on.

    Neighbours in that order, and the last of them and each that follows, are taken for different or, if that is the
    surer, for within ``tie`` times the largest weight. The chances that one of these is wrong add up to no more than
    ``error``.
    """
    weights, influences = surrogate.weights[0], surrogate.influences[0]
    order = np.argsort(-weights, kind="stable")
    top = min(top, len(order) - 1)
    first = np.concatenate([order[: top - 1], np.full(len(order) - top, order[top - 1])])
    second = order[1:]
    differences = weights[first] - weights[second]
    deviations = np.sqrt(((influences[:, first] - influences[:, second]) ** 2).sum(0))
    room = tie * np.abs(weights).max() - differences
    known = deviations == 0
    wrong = upper_tail(np.maximum(differences, room) / np.where(known, 1.0, deviations), surrogate.freedom)
    return bool(wrong[~known].sum() <= error)
