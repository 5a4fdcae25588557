"""What the methods that question a model have in common: pictures in, a progress bar, a result with its provenance."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from vitscope.errors import CallError, VitscopeWarning
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import Inquiry
from vitscope.perturb.inquiry import Progress
from vitscope.perturb.rendering import Subject, subjects
from vitscope.picture import Picture
from vitscope.run import as_vision_model, provenance
from vitscope.segment_attribution import SegmentAttribution, Weighing, spread

Result = TypeVar("Result")


@dataclass(frozen=True)
class AskOptions:
    """How a model is asked."""

    hide: Any
    output: str
    batch_size: int
    seed: int
    progress: Any


def each_picture(
    model: VisionModel | nn.Module, images: Any, explain: Callable[[VisionModel, Subject], Result]
) -> Result | list[Result]:
    """One result for one picture, a list for several."""
    vision = as_vision_model(model)
    given = subjects(vision, images)
    if not given:
        raise CallError("no picture was given")
    results = [explain(vision, subject) for subject in given]
    return results[0] if len(results) == 1 else results


def inquiry_of(model: VisionModel, subject: Subject, segments: Any, options: AskOptions) -> Inquiry:
    """An inquiry about one picture."""
    return Inquiry(
        model,
        subject,
        segments=segments,
        hide=options.hide,
        output=options.output,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=_progress(options.progress),
    )


def _progress(wanted: Any) -> Progress | None:
    if not isinstance(wanted, bool):
        return wanted
    if not wanted:
        return None
    from rich.console import Console
    from rich.progress import Progress as Bar

    bar = Bar(console=Console(stderr=True), transient=True)
    task = bar.add_task("asking the model")

    def tell(answered: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=answered, total=total)
        if answered >= total:
            bar.stop()

    return tell


def warn_if_interrupted(interrupted: bool, answered: int, total: int | None) -> None:
    """One line when Ctrl-C ended the asking."""
    if interrupted:
        of = "" if total is None else f" of {total}"
        warnings.warn(f"interrupted: the result stands on {answered}{of} samples", VitscopeWarning, stacklevel=2)


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
    assert inquiry.segments is not None
    weighings = [
        Weighing(
            inquiry.label(column),
            float(inquiry.original[column]),
            torch.from_numpy(weights[at].copy()),
            None if intervals is None else torch.from_numpy(intervals[at].copy()),
            float(intercepts[at]),
            float(scores[at]),
        )
        for at, column in enumerate(columns)
    ]
    index = torch.from_numpy(inquiry.segments.index)
    return SegmentAttribution(
        spread(index, weighings[0].weights)[None],
        Grid(*index.shape),
        [whole(inquiry.subject.view)],
        about(inquiry, method, parameters, samples=samples, interrupted=interrupted),
        weighings[0].label,
        True,
        segments=torch.from_numpy(np.array(inquiry.segments.labels)),
        index=index,
        weighings=weighings,
    )
