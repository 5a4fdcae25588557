"""compose(): a model's outputs if objects are scaled, moved, separated, or pasted over another background."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from torch import nn

from vitscope.compositing.experiments import (
    PLACES,
    Box,
    ExperimentPlan,
    check_names,
    plan_edited_images,
    plan_experiments,
)
from vitscope.compositing.object_masks import object_masks
from vitscope.compositing.predict import EditedImagePredictor
from vitscope.compositing.result import Composition
from vitscope.compositing.stage import EditedImage, Stage
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.images.image import InputImage
from vitscope.images.reading import photos, read_photo
from vitscope.interventions.positions import Positions, positions
from vitscope.methods._perturbation import perturbation_method, warn_if_interrupted
from vitscope.models.targets import one_per_image
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import describe_hide
from vitscope.perturb.options import EvaluationArguments, PerturbationOptions
from vitscope.perturb.rendering import Subject, subjects
from vitscope.progress import progress_callback
from vitscope.tracing.capture import as_vision_model, provenance
from vitscope.typing import Target


@perturbation_method(EvaluationArguments)
def compose(
    model: VisionModel | nn.Module,
    image: Any,
    objects: Any,
    *,
    tests: Sequence[Literal["size", "location", "split", "controls"]] | str = ("size", "location", "split"),
    edited_images: Sequence[EditedImage] | EditedImage = (),
    target: Target | None = None,
    scales: Sequence[float | int] | None = None,
    places: Sequence[int] | int = PLACES,
    location_scale: float | int = 1.0,
    fill: Any = "inpaint",
    background: Any = None,
    feather: float | int | None = None,
    attention: bool = False,
    **options: Unpack[EvaluationArguments],
) -> Composition:
    """Cut objects out of a photo, paste them back changed, and evaluate the model on every edited image.

    The backgrounds of the controls follow Xiao et al., Noise or Signal: The Role of Image Backgrounds in Object
    Recognition, 2020, arXiv:2006.09994.

    Args:
        model: from :func:`vitscope.load`, or a live module. For a model without a classifier, the output is the
            cosine similarity of its features to those of the original.
        image: one image: a path, PIL image, uint8 array (H, W, 3), or a preprocessed tensor (1, 3, height, width).
        objects: a box (left, top, width, height) in pixels, a mask (H, W) or the path of one, a polygon of corners
            (x, y), the result of :func:`vitscope.object_mask`, a list of these, or a mapping from names to these.
        tests:
            ``"size"``: each object at ``scales``, around its own centre.
            ``"location"``: each object at ``places`` (rows, columns), from edge to edge of what the model sees, at
            ``location_scale``, in front of the others, which do not move.
            ``"split"``: every pair of objects apart and exchanged, each object mirrored, and each object left out.
            ``"controls"``: each object alone, over its own, a blank, a blurred, a shuffled and another background
            (``background``), at its original place; over its own and the blank background also at ``places``, and
            over the blank one there with neutral position embeddings (for models that
            :func:`vitscope.interventions.positions.positions` supports); and the image without the object.
        edited_images: your own edited images, evaluated after the original.
        target: what maps and curves show, see :data:`~vitscope.typing.Target`; by default the class of each object, see
            :meth:`Composition.column`.
        scales: factors for the object's sides, above 0; at most 1,000 of them. By default, of seven scales from 1/4 to
            2, whose areas double, those at which the object fits into the image.
        places: number of rows and columns of the location grid, from 2 to 100.
        location_scale: scale of the object in the location test, above 0.
        fill: filling of the hole behind a moved object: ``"inpaint"``, ``"mean"``, ``"blur"``, a colour or an image.
        background: the image for the background ``"other"``; by default a texture of grass.
        feather: width in pixels over which the edge of a moved object fades; by default 1 % of the image's shorter
            side, at most a quarter of it.
        attention: keep the rollout of every edited image.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        The outputs, with tables, location maps, size curves and the edited images. A photo of more than 400,000 pixels
        (or twice the model's input, if that is more) is edited on a smaller copy, whose size is in the provenance.

    Raises:
        CallError: more than one image, an invalid object, objects that overlap, a scale that does not fit, or an
            unknown test or class.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.compose(vs.load("vit-nano"), skimage.data.chelsea(), {"cat": (105, 20, 235, 200)}, places=3)
        >>> result.location_map("cat").values.shape
        torch.Size([1, 3, 3])
    """
    settings, vision = PerturbationOptions(**options), as_vision_model(model)
    custom_images = [edited_images] if isinstance(edited_images, EditedImage) else list(edited_images)
    if background is not None:
        read_photo(background)  # an invalid background is an error even if no test uses it
    subject = _require_single_image(vision, image)
    (image_target,) = one_per_image(target, 1)
    photo = subject.view.photo
    plan = plan_experiments(tests, scales, places, location_scale)
    stage = Stage(
        subject.values,
        object_masks(photo, objects),
        photo.size,
        fill=fill,
        background_image=background,
        feather=feather,
        seed=settings.seed,
    )
    model_positions = _positions_if_needed(vision, plan, custom_images)
    plan = replace(plan, can_be_neutral=model_positions.can_be_neutral)
    original, *test_images = plan_edited_images(stage, _seen_box(subject.view), plan)
    images = [original, *custom_images, *test_images]
    _check_images(vision, images, stage, model_positions)
    with progress_callback(settings.progress) as report:
        predictor = EditedImagePredictor(vision, subject, model_positions, settings, attention=attention, report=report)
        column = None if image_target is None else predictor.target(image_target)
        for object_mask in stage.objects.values() if vision.labels else ():
            if object_mask.label is not None:
                predictor.target(object_mask.label)  # an unknown class is an error before the first prediction
        evaluations = predictor.predict(stage, images)
    evaluated = int(evaluations.evaluated.sum())
    warn_if_interrupted(evaluations.interrupted, evaluated, len(images))
    parameters = {
        "tests": list(plan.names),
        "scales": None if plan.scales is None else list(plan.scales),
        "places": list(plan.places),
        "location_scale": plan.location_scale,
        "fill": fill if isinstance(fill, str) else describe_hide(fill),
        "background": "grass" if background is None else "an image",
        "feather": stage.feather,
        "composed_at": list(subject.size),
        "positions": list(model_positions.kinds),
        "output": predictor.output,
        "seed": settings.seed,
    }
    return Composition(
        original=subject.view,
        edited_images=images,
        outputs=evaluations.outputs,
        labels=[predictor.label(index) for index in range(evaluations.outputs.shape[1])],
        provenance={
            **provenance(vision),
            "method": "compose",
            "parameters": parameters,
            "samples": evaluated,
            "interrupted": evaluations.interrupted,
        },
        stage=stage,
        model_labels=vision.labels,
        target=column,
        num_classes=predictor.num_classes,
        target_output=None if column is None else predictor.output_of(column),
        rollouts=predictor.rollouts_of(len(images)) if attention else None,
        grid=vision.layout.grid(*subject.pixels.shape[-2:]) if attention and vision.layout is not None else None,
    )


def _require_single_image(model: VisionModel, image: Any) -> Subject:
    count = len(image) if isinstance(image, torch.Tensor) else len(photos(image))
    if count != 1:
        raise CallError(f"compose takes one image, not {count}: call it for each image with the objects of that image")
    (subject,) = subjects(model, image)
    return subject


def _seen_box(view: InputImage) -> Box:
    """Return the (left, top, right, bottom) of the part of the photo that the model sees, in pixels."""
    left, top, right, bottom = view.box
    return max(left, 0.0), max(top, 0.0), min(right, float(view.photo.width)), min(bottom, float(view.photo.height))


def _positions_if_needed(model: VisionModel, plan: ExperimentPlan, custom_images: Sequence[EditedImage]) -> Positions:
    """Return the position embeddings of the model, or an empty set of them if no image needs them to be neutral."""
    if "controls" not in plan.names and not any(image.neutral for image in custom_images):
        return Positions({}, (), False)
    return positions(model)


def _check_images(model: VisionModel, images: Sequence[EditedImage], stage: Stage, model_positions: Positions) -> None:
    check_names(images)
    for image in images:
        if image.neutral and not model_positions.can_be_neutral:
            reason = "they are rotary" if model_positions.rotary else "it has none that are known"
            raise UnsupportedModelError(
                f"{image.name}: neutral positions are not supported for {model.name}, because {reason}: leave out "
                "neutral=True"
            )
        stage.prepare(image)
