"""What the methods that question a model have in common: pictures in, a progress bar, a result with its provenance."""

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
from vitscope.images.image import Picture
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import Inquiry
from vitscope.perturb.batching import Progress
from vitscope.perturb.rendering import subjects
from vitscope.results.attribution import Attribution
from vitscope.results.segment_attribution import SegmentAttribution, SegmentedPicture, Weighing
from vitscope.tracing.capture import as_vision_model, provenance

Result = TypeVar("Result", bound=Attribution)


@dataclass(frozen=True)
class AskOptions:
    """How a model is asked."""

    hide: Any
    output: str
    batch_size: int
    seed: int
    progress: Any


def each_picture(
    model: VisionModel | nn.Module,
    images: Any,
    segments: Any,
    options: AskOptions,
    explain: Callable[[Inquiry], Result],
    *,
    on_pixels: bool = True,
) -> Result:
    """The results of all pictures, one after another, as one.

    Maps ``on_pixels`` are as large as the photos, so photos of different size are refused before anything is asked.
    """
    vision = as_vision_model(model)
    given = subjects(vision, images)
    if not given:
        raise CallError("no picture was given")
    sizes = dict.fromkeys("×".join(map(str, subject.view.photo.size[::-1])) for subject in given)
    if on_pixels and len(sizes) > 1:
        raise CallError(
            f"the pictures are {' and '.join(sizes)} pixels large, so their maps make no batch: explain them one by one"
        )
    results: list[Result] = []
    for subject in given:
        try:
            with telling(options.progress) as tell:
                inquiry = Inquiry(
                    vision,
                    subject,
                    segments=segments,
                    hide=options.hide,
                    output=options.output,
                    batch_size=options.batch_size,
                    seed=options.seed,
                    progress=tell,
                )
                results.append(explain(inquiry))
        except KeyboardInterrupt:
            if not results:
                raise
            break
        if results[-1].provenance["interrupted"]:
            break
    if len(results) < len(given):
        warn(f"interrupted: the result holds the first {len(results)} of {len(given)} pictures")
    return results[0] if len(given) == 1 else results[0].joined(results)


@contextmanager
def telling(wanted: Any, what: str = "asking the model") -> Iterator[Progress | None]:
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
    inquiry: Inquiry, method: str, parameters: Mapping[str, Any], *, samples: int, interrupted: bool
) -> dict[str, Any]:
    """The provenance of a result."""
    return {
        **provenance(inquiry.model),
        "method": method,
        "parameters": {**inquiry.parameters, **parameters},
        "samples": samples,
        "interrupted": interrupted,
    }


def whole(picture: Picture) -> Picture:
    """The picture with all of the photo in view: results on pixels cover what the model did not see too."""
    return Picture(picture.photo, (0.0, 0.0, float(picture.photo.width), float(picture.photo.height)), picture.name)


def segment_result(
    inquiry: Inquiry,
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
    segments = inquiry.known_segments()
    weighings = [
        Weighing(
            inquiry.label(column),
            column,
            float(inquiry.original[column]),
            torch.from_numpy(weights[at].copy()),
            None if intervals is None else torch.from_numpy(intervals[at].copy()),
            float(intercepts[at]),
            float(scores[at]),
        )
        for at, column in enumerate(columns)
    ]
    labels, index = (torch.from_numpy(np.array(part)) for part in (segments.labels, segments.index))
    part = SegmentedPicture(labels, index, weighings)
    return SegmentAttribution(
        part.values(),
        Grid(*index.shape),
        [whole(inquiry.subject.view)],
        about(inquiry, method, parameters, samples=samples, interrupted=interrupted),
        weighings[0].label,
        True,
        parts=[part],
    )
