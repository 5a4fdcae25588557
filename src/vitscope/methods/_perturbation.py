"""Code that LIME, KernelSHAP, RISE and occlusion share: options, the loop over images, and the provenance."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from textwrap import fill
from typing import Any, ParamSpec, TypeVar, Unpack, get_type_hints

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn

from vitscope.docstrings import attribute_entries
from vitscope.errors import CallError, warn
from vitscope.grid import Grid
from vitscope.models.targets import one_per_image
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PerturbationArguments, PerturbationOptions
from vitscope.perturb.rendering import Subject, subjects
from vitscope.progress import ProgressCallback, ProgressLike, progress_callback
from vitscope.results.attribution import Attribution
from vitscope.results.samples import SampledOutput, Samples
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.results.segmented_image import LinearFit, SegmentedImage, number_or_none
from vitscope.tracing.capture import as_vision_model, provenance
from vitscope.typing import ImageTarget, Target

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", bound=Attribution)
Returned = TypeVar("Returned")
Item = TypeVar("Item")

WIDTH = 120  # columns of a docstring


def perturbation_method(
    arguments: type = PerturbationArguments, /, **defaults: Unpack[PerturbationArguments]
) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    """Return a decorator for a method whose ``**options`` are those of :class:`PerturbationOptions`.

    The decorated method lists these options in its signature and docstring, as if it declared each of them. An unknown
    keyword is a TypeError, as for any function.

    Args:
        arguments: the options that the method takes, as a TypedDict.
        defaults: defaults of this method that differ from those of :class:`PerturbationOptions`.
    """
    hints = get_type_hints(arguments)

    def decorate(method: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        declared = [p for p in signature(method).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        shared = [
            Parameter(
                option.name,
                Parameter.KEYWORD_ONLY,
                default=defaults.get(option.name, option.default),
                annotation=hints[option.name],
            )
            for option in fields(PerturbationOptions)
            if option.name in hints
        ]
        full = signature(method).replace(parameters=[*declared, *shared])

        @wraps(method)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            for name in kwargs:
                if name not in full.parameters:
                    raise TypeError(f"{method.__name__}() got an unexpected keyword argument {name!r}")
            return method(*args, **{**defaults, **kwargs})  # type: ignore[arg-type]

        call.__signature__ = full  # type: ignore[attr-defined]
        call.__doc__ = _with_described_options(method.__doc__, hints)
        return call

    return decorate


def _with_described_options(docstring: str | None, names: Container[str]) -> str | None:
    """Return a docstring with the entry ``**options`` replaced by these options of :class:`PerturbationOptions`."""
    texts = attribute_entries(PerturbationOptions)
    if docstring is None or not texts:  # python -OO
        return docstring
    entries = (
        fill(f"{name}: {text}", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
        for name, text in texts.items()
        if name in names
    )
    return re.sub(r"^ *\*\*options: .*$", lambda _: "\n".join(entries), docstring, flags=re.MULTILINE)


def explain_each(
    model: VisionModel | nn.Module,
    images: Any,
    segments: Any,
    options: PerturbationOptions,
    target: Target | None,
    explain: Callable[[MaskedModel, ImageTarget | None], Result],
) -> Result:
    """Explain all images, one after another, and return one result.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: the images, as the method takes them.
        segments: see :class:`~vitscope.perturb.MaskedModel`.
        options: options of the method.
        target: what to explain, of all images or in a list of one target per image.
        explain: returns the result of one image and its target.

    Raises:
        CallError: there are no images, or there is another number of targets.
    """
    vision = as_vision_model(model)
    inputs = subjects(vision, images)
    if not inputs:
        raise CallError("no image was given")

    def explain_subject(item: tuple[Subject, ImageTarget | None], report: ProgressCallback) -> Result:
        subject, image_target = item
        return explain(MaskedModel(vision, subject, options, segments=segments, report=report), image_target)

    pairs = list(zip(inputs, one_per_image(target, len(inputs)), strict=True))
    results = one_by_one(
        pairs, explain_subject, lambda result: bool(result.provenance["interrupted"]), options.progress
    )
    return results[0] if len(inputs) == 1 else results[0].join(results)


def one_by_one(
    inputs: Sequence[Item],
    explain: Callable[[Item, ProgressCallback], Returned],
    is_interrupted: Callable[[Returned], bool],
    progress: ProgressLike,
) -> list[Returned]:
    """Return the results of the images up to the one during which Ctrl-C was pressed, with a warning if it was.

    Args:
        inputs: the images, or pairs of an image and its target.
        explain: returns the result of one image, and reports its progress.
        is_interrupted: whether Ctrl-C ended the work on a result early.
        progress: see :data:`~vitscope.progress.ProgressLike`.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed before the first result.
    """
    results: list[Returned] = []
    for item in inputs:
        try:
            with progress_callback(progress) as report:
                results.append(explain(item, report))
        except KeyboardInterrupt:
            if not results:
                raise
            break
        if is_interrupted(results[-1]):
            break
    if len(results) < len(inputs):
        warn(f"interrupted: the result holds the first {len(results)} of {len(inputs)} images")
    return results


def warn_if_interrupted(interrupted: bool, evaluated: int, total: int | None) -> None:
    """Warn if Ctrl-C ended the evaluation early, with the number of samples that the result is based on."""
    if interrupted:
        of_total = "" if total is None else f" of {total}"
        warn(f"interrupted: the result is based on {evaluated}{of_total} samples")


def perturbation_provenance(
    masked_model: MaskedModel,
    method: str,
    parameters: Mapping[str, Any],
    column: int,
    *,
    samples: int,
    interrupted: bool,
) -> dict[str, Any]:
    """Return the provenance of a result: model, method, all parameters, the explained output, and the sample count."""
    return {
        **provenance(masked_model.model),
        "method": method,
        "parameters": {**masked_model.parameters, "output": masked_model.output_of(column), **parameters},
        "samples": samples,
        "interrupted": interrupted,
    }


def stored_samples(
    masked_model: MaskedModel,
    masks: Bool[np.ndarray, "sample cell"],
    class_outputs: Float[np.ndarray, "sample stored"],
    stored: Sequence[int],
    **numbers: np.ndarray,
) -> Samples | None:
    """Return the samples of a result, without classes whose outputs are not finite; None if no class is left.

    Args:
        masked_model: the model and its image.
        masks: of the samples that were evaluated.
        class_outputs: the outputs for them.
        stored: indices of the classes of these outputs.
        numbers: other fields of :class:`~vitscope.results.samples.Samples`.
    """
    classes, labels = np.array(stored, dtype=np.int64), masked_model.class_labels
    original = masked_model.original[classes].astype(np.float32)
    finite = np.isfinite(class_outputs).all(0) & np.isfinite(original)
    if not finite.any():
        return None
    outputs = np.ascontiguousarray(class_outputs[:, finite])
    return Samples(masks, outputs, classes[finite], original[finite], labels, **numbers)


def sampled_output(masked_model: MaskedModel, column: int, values: Float[np.ndarray, " sample"]) -> SampledOutput:
    """Return the outputs of a column for all masks, with its label."""
    index = masked_model.class_index(column)
    return SampledOutput(masked_model.label(column), index, values, float(masked_model.original[column]))


def segment_result(
    masked_model: MaskedModel,
    method: str,
    parameters: Mapping[str, Any],
    columns: Sequence[int],
    weights: Float[np.ndarray, "label segment"],
    intervals: Float[np.ndarray, "label segment 2"] | None,
    intercepts: Float[np.ndarray, " label"],
    scores: tuple[Float[np.ndarray, " label"], Float[np.ndarray, " label"]],
    *,
    stored: Samples | None,
    samples: int,
    interrupted: bool,
) -> SegmentAttribution:
    """Return a result with one weight per segment for each of ``columns``, the first of which is the target.

    Args:
        masked_model: the model and its image.
        method: its name.
        parameters: its options.
        columns: what was explained.
        weights: by column.
        intervals: of the weights; None if the method has none.
        intercepts: by column.
        scores: R² of the fit by column, and that on held-out samples.
        stored: for the explanation of other classes.
        samples: number of evaluated masks.
        interrupted: whether Ctrl-C ended the evaluation early.
    """
    segments = masked_model.require_segments()
    fits = [
        LinearFit(
            masked_model.label(column),
            masked_model.class_index(column),
            float(masked_model.original[column]),
            torch.from_numpy(weights[row].copy()),
            None if intervals is None else torch.from_numpy(intervals[row].copy()),
            float(intercepts[row]),
            float(scores[0][row]),
            number_or_none(scores[1][row]),
        )
        for row, column in enumerate(columns)
    ]
    labels, index = (torch.from_numpy(np.array(pixels)) for pixels in (segments.labels, segments.index))
    image = SegmentedImage(labels, index, fits, stored)
    return SegmentAttribution(
        image.values(),
        Grid(*index.shape),
        [masked_model.subject.view.uncropped()],
        perturbation_provenance(masked_model, method, parameters, columns[0], samples=samples, interrupted=interrupted),
        fits[0].label,
        True,
        segmented_images=[image],
    )
