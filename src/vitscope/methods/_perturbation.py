"""What the methods that question a model have in common: images in, a progress bar, a result with its provenance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from vitscope.errors import CallError, warn
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel
from vitscope.perturb.batching import Progress
from vitscope.perturb.rendering import subjects
from vitscope.results.attribution import Attribution
from vitscope.results.segment_attribution import LinearFit, SegmentAttribution, SegmentedImage
from vitscope.tracing.capture import as_vision_model, provenance

Result = TypeVar("Result", bound=Attribution)


@dataclass(frozen=True)
class PerturbationOptions:
    """How a model is asked."""

    hide: Any
    output: str
    batch_size: int
    seed: int
    progress: Any


def explain_each(
    model: VisionModel | nn.Module,
    images: Any,
    segments: Any,
    options: PerturbationOptions,
    explain: Callable[[MaskedModel], Result],
    *,
    on_pixels: bool = True,
) -> Result:
    """The results of all images, one after another, as one.

    Maps ``on_pixels`` are as large as the photos, so photos of different size are refused before anything is asked.
    """
    vision = as_vision_model(model)
    given = subjects(vision, images)
    if not given:
        raise CallError("no image was given")
    sizes = dict.fromkeys("×".join(map(str, subject.view.photo.size[::-1])) for subject in given)
    if on_pixels and len(sizes) > 1:
        raise CallError(
            f"the images are {' and '.join(sizes)} pixels large, so their maps make no batch: explain them one by one"
        )
    results: list[Result] = []
    for subject in given:
        try:
            with progress_bar(options.progress) as tell:
                masked_model = MaskedModel(
                    vision,
                    subject,
                    segments=segments,
                    hide=options.hide,
                    output=options.output,
                    batch_size=options.batch_size,
                    seed=options.seed,
                    progress=tell,
                )
                results.append(explain(masked_model))
        except KeyboardInterrupt:
            if not results:
                raise
            break
        if results[-1].provenance["interrupted"]:
            break
    if len(results) < len(given):
        warn(f"interrupted: the result holds the first {len(results)} of {len(given)} images")
    return results[0] if len(given) == 1 else results[0].joined(results)


@contextmanager
def progress_bar(wanted: Any, what: str = "asking the model") -> Iterator[Progress | None]:
    """Whom to tell about progress: a bar on stderr where one was asked for and someone can see it."""
    if not isinstance(wanted, bool) or not wanted:
        if wanted and not callable(wanted):
            raise CallError(f"progress is {wanted!r}: pass True, or a function of (answered, in all)")
        yield wanted or None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda answered, total: bar.update(task, completed=answered, total=total)


def warn_if_interrupted(interrupted: bool, answered: int, total: int | None) -> None:
    """One line when Ctrl-C ended the asking."""
    if interrupted:
        of = "" if total is None else f" of {total}"
        warn(f"interrupted: the result stands on {answered}{of} samples")


def about(
    masked_model: MaskedModel, method: str, parameters: Mapping[str, Any], *, samples: int, interrupted: bool
) -> dict[str, Any]:
    """The provenance of a result."""
    return {
        **provenance(masked_model.model),
        "method": method,
        "parameters": {**masked_model.parameters, **parameters},
        "samples": samples,
        "interrupted": interrupted,
    }


def whole(image: InputImage) -> InputImage:
    """The image with all of the photo in view: results on pixels cover what the model did not see too."""
    return InputImage(image.photo, (0.0, 0.0, float(image.photo.width), float(image.photo.height)), image.name)


def segment_result(
    masked_model: MaskedModel,
    method: str,
    parameters: Mapping[str, Any],
    columns: Sequence[int],
    weights: Float[np.ndarray, "label segment"],
    intervals: Float[np.ndarray, "label segment 2"] | None,
    intercepts: Float[np.ndarray, " label"],
    scores: Float[np.ndarray, " label"],
    *,
    samples: int,
    interrupted: bool,
) -> SegmentAttribution:
    """One weight a segment for each class of ``columns``, the first of which is the target."""
    segments = masked_model.require_segments()
    fits = [
        LinearFit(
            masked_model.label(column),
            column,
            float(masked_model.original[column]),
            torch.from_numpy(weights[at].copy()),
            None if intervals is None else torch.from_numpy(intervals[at].copy()),
            float(intercepts[at]),
            float(scores[at]),
        )
        for at, column in enumerate(columns)
    ]
    labels, index = (torch.from_numpy(np.array(part)) for part in (segments.labels, segments.index))
    part = SegmentedImage(labels, index, fits)
    return SegmentAttribution(
        part.values(),
        Grid(*index.shape),
        [whole(masked_model.subject.view)],
        about(masked_model, method, parameters, samples=samples, interrupted=interrupted),
        fits[0].label,
        True,
        parts=[part],
    )
