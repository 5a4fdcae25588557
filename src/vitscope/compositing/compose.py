"""compose(): what a model says when an object is smaller, elsewhere, apart, or over another background."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from vitscope.compositing.experiments import PLACES, Arena, ExperimentPlan, check_names, planned, planned_experiments
from vitscope.compositing.object_masks import outlined
from vitscope.compositing.predict import EditedImagePredictor
from vitscope.compositing.result import Composition
from vitscope.compositing.stage import EditedImage, Stage
from vitscope.errors import CallError
from vitscope.images.image import InputImage
from vitscope.images.reading import photos, read_photo
from vitscope.interventions.positions import Positions, positions
from vitscope.methods._perturbation import warn_if_interrupted
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import described
from vitscope.perturb.rendering import Subject, subjects
from vitscope.progress import ProgressLike, progress_callback
from vitscope.tracing.capture import as_vision_model, provenance
from vitscope.validation import seed_number


def compose(
    model: VisionModel | nn.Module,
    image: Any,
    objects: Any,
    *,
    tests: Sequence[Literal["size", "location", "split", "controls"]] | str = ("size", "location", "split"),
    composites: Sequence[EditedImage] | EditedImage = (),
    target: int | str | None = None,
    scales: Sequence[float | int] | None = None,
    places: Sequence[int] | int = PLACES,
    location_scale: float | int = 1.0,
    fill: Any = "inpaint",
    background: Any = None,
    feather: float | int | None = None,
    attention: bool = False,
    output: Literal["probability", "logit"] = "probability",
    seed: int = 0,
    batch_size: int = 64,
    progress: ProgressLike = False,
) -> Composition:
    """Cut objects out of a photo, put them back otherwise, and ask the model about every image.

    Args:
        model: from :func:`vitscope.load`, or a live module. One without a classifier answers with the cosine between
            its features and those of the original.
        image: one image: a path, PIL image, uint8 array (H, W, 3), or a tensor (1, 3, height, width) taken as already
            preprocessed.
        objects: a box (left, top, width, height) in pixels, a mask (H, W) or its file, a polygon of corners (x, y),
            what :func:`vitscope.outline` returns, a list of these, or a mapping from names to these.
        tests:
            ``"size"``: each object about its own centre at ``scales``.
            ``"location"``: each at ``places`` (rows, columns), from edge to edge of what the model sees, at
            ``location_scale``, in front of the others, which stay.
            ``"split"``: two objects apart and exchanged, each mirrored, each left out.
            ``"controls"``: each object alone, over its own background, a blank, a blurred, a shuffled and another one
            (``background``, an image; by default a texture of grass), at its place and, over its own and the blank
            one, at ``places``, there also with the model's position embeddings made equal (where
            :func:`vitscope.interventions.positions.positions` knows how); the image without it.
        composites: images of your own, asked about after the original.
        target: the class that maps and curves show by default; see :meth:`Composition.column`.
        scales: of an object's sides, up to 1,000; by default areas that double from 1/16, those that fit.
        places: rows and columns of the location grid, from 2 to 100.
        fill: what is in the hole behind an object that moves: ``"inpaint"``, ``"mean"``, ``"blur"``, a colour or a
            image.
        feather: over how many pixels the edge of a moved object fades; 1 % of the image's shorter side by default.
        attention: keep the rollout of every composite.
        output: a softmax ``"probability"`` or a ``"logit"``.
        seed: of the shuffled background and of noise.
        batch_size: images to a forward, at most.
        progress: True for a bar on stderr, or a function of one :class:`vitscope.Progress`.

    Returns:
        the answers, with tables, location maps, size curves and the images themselves. Photos above 400,000 pixels
        (or twice the model's input, if that is more) are put together on a smaller copy, as the provenance says.

    Raises:
        CallError: several images, an object that is no object of this image, two that overlap, a scale that does
            not fit, an unknown test or class.

    Example:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.compose(vs.load("vit-nano"), skimage.data.chelsea(), {"cat": (105, 20, 235, 200)}, places=3)
        >>> result.location_map("cat").values.shape
        torch.Size([1, 3, 3])
    """
    vision, seed = as_vision_model(model), seed_number(seed)
    own = [composites] if isinstance(composites, EditedImage) else list(composites)
    if background is not None:
        read_photo(background)  # refused now, though not every test uses it
    subject = _one(vision, image)
    photo = subject.view.photo
    asked = planned_experiments(tests, scales, places, location_scale)
    stage = Stage(
        subject.values,
        outlined(photo, objects),
        photo.size,
        fill=fill,
        other=background,
        feather=feather,
        seed=seed,
    )
    known = _positions(vision, asked, own)
    original, *tested = planned(stage, _arena(subject.view), replace(asked, can_be_neutral=known.can_be_neutral))
    shown = [original, *own, *tested]
    _check(vision, shown, stage, known)
    with progress_callback(progress) as tell:
        showing = EditedImagePredictor(
            vision, subject, known, attention=attention, output=output, batch_size=batch_size, progress=tell
        )
        column = None if target is None else showing.target(target)
        for one in stage.outlines.values() if vision.labels else ():
            if one.label is not None:
                showing.target(one.label)  # an unknown class is refused before anything is shown
        answers = showing.show(stage, shown)
    warn_if_interrupted(answers.interrupted, int(answers.evaluated.sum()), len(shown))
    parameters = {
        "tests": list(asked.names),
        "scales": None if asked.scales is None else list(asked.scales),
        "places": list(asked.places),
        "location_scale": asked.location_scale,
        "fill": fill if isinstance(fill, str) else described(fill),
        "background": "grass" if background is None else "an image",
        "feather": stage.feather,
        "composed_at": list(subject.size),
        "positions": list(known.kinds),
        "output": showing.output,
        "seed": seed,
    }
    return Composition(
        original=subject.view,
        composites=shown,
        outputs=answers.outputs,
        labels=[showing.label(at) for at in range(answers.outputs.shape[1])],
        provenance={
            **provenance(vision),
            "method": "compose",
            "parameters": parameters,
            "samples": int(answers.evaluated.sum()),
            "interrupted": answers.interrupted,
        },
        stage=stage,
        known=vision.labels,
        target=column,
        rollouts=showing.rollouts_of(len(shown)) if attention else None,
        grid=vision.layout.grid(*subject.pixels.shape[-2:]) if attention and vision.layout is not None else None,
    )


def _one(model: VisionModel, image: Any) -> Subject:
    count = len(image) if isinstance(image, torch.Tensor) else len(photos(image))
    if count != 1:
        raise CallError(f"compose takes one image a call, {count} came: objects are marked in each by itself")
    (subject,) = subjects(model, image)
    return subject


def _arena(view: InputImage) -> Arena:
    """What of the photo the model sees, in pixels."""
    left, top, right, bottom = view.box
    return max(left, 0.0), max(top, 0.0), min(right, float(view.photo.width)), min(bottom, float(view.photo.height))


def _positions(model: VisionModel, tests: ExperimentPlan, wanted: Sequence[EditedImage]) -> Positions:
    """How the model knows places, if that is asked about at all."""
    if "controls" not in tests.names and not any(one.neutral for one in wanted):
        return Positions({}, (), False)
    return positions(model)


def _check(model: VisionModel, shown: Sequence[EditedImage], stage: Stage, known: Positions) -> None:
    check_names(shown)
    for one in shown:
        if one.neutral and not known.can_be_neutral:
            how = "they are rotary" if known.rotary else "none are known"
            raise CallError(f"{one.name}: the positions of {model.name} cannot be made equal ({how})")
        stage.prepare(one)
