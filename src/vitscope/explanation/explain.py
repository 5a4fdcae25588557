"""vs.explain: several maps of a photo, with its classes and the agreement of the maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitscope.errors import (
    CallError,
    UnclearOutputError,
    UnsupportedModelError,
    VitscopeError,
    WorkError,
    warn,
)
from vitscope.explanation.requests import MethodRequest, check_target, method_requests
from vitscope.explanation.result import Explanation, PhotoExplanation
from vitscope.images.reading import photos, read_image
from vitscope.methods._perturbation import one_by_one
from vitscope.methods.attention_map import attention_map
from vitscope.methods.libra import libra
from vitscope.methods.rollout import rollout
from vitscope.metrics.agreement import agreement
from vitscope.models.heads import WindowClassified
from vitscope.models.loader import load
from vitscope.models.prediction import Prediction
from vitscope.models.targets import one_per_image
from vitscope.models.vision_model import VisionModel
from vitscope.progress import Progress, ProgressCallback, ProgressLike, progress_callback
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.typing import ImageTarget, Target
from vitscope.validation import short_label
from vitscope.window_tokens.window_cls import window_cls

ROLLOUT_MEANING = "which patches reach the readout; the same for every class"


def explain(
    model: VisionModel | nn.Module | str | Path,
    images: Any,
    methods: str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    target: Target | None = None,
    *,
    progress: ProgressLike = False,
    **options: Any,
) -> Explanation:
    """Explain photos by several maps, with the predicted classes, as ``vitscope explain`` does.

    By default the maps are LibraGrad's map of the predicted class or of the target, attention rollout with the mean and
    with the max of heads, and the attention of each head of the last layer. The prediction depends far more on the
    patches that LibraGrad ranks highest than on those of a rollout (docs/baselines.md). If a model has no map of a
    class, :attr:`Explanation.meanings` says why. A model that classifies by CLS tokens in its windows has the attention
    of these tokens instead.

    Args:
        model: from :func:`vitscope.load`, a live module, or a name that :func:`vitscope.load` takes.
        images: an image, a list of images of any sizes, or a tensor (batch, channel, height, width) that is already
            preprocessed. The images are explained one after another.
        methods: names of methods, see ``vitscope methods``: one, several to compare, or a mapping from names to the
            options of each method, as in ``{"lime": {"num_samples": 500}, "rise": {}}``.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
            Methods that take none ignore it, but one has to take it.
        progress: True for bars on stderr, or a function that receives each :class:`vitscope.Progress`.
        **options: options of methods, such as ``hide``, ``num_samples``, ``seed`` or ``output``. Each goes to all
            methods that have an option of this name. ``hide``, what hidden parts become, is also the ``baseline`` of
            the methods that have one. If several methods have either, it is ``"mean"`` by default in all of them.

    Returns:
        the maps, classes and agreement of each photo, with a figure and a report. Ctrl-C ends the computation early:
        the result then holds the maps so far, with a warning, and ``interrupted`` is True.

    Raises:
        CallError: there is no such method or class, no method takes the target or an option, an option is out of
            range, or the images are not valid.
        UnsupportedModelError: a method is not available for the model.
        WorkError: an image cannot be read, or the model fails on the input.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> explanation = vs.explain("vit-nano", skimage.data.chelsea(), target="dog")
        >>> explanation.predictions[0].label, explanation.target
        ('cat', 'dog')
        >>> list(explanation.results)
        ['libra', 'rollout, mean of heads', 'rollout, max of heads']
        >>> methods = ["libra", "occlusion", "rollout"]
        >>> vs.explain("vit-nano", skimage.data.chelsea(), methods, hide="black").agreement.names
        ['libra', 'occlusion', 'rollout']
    """
    requests = method_requests(methods, options)
    vision = as_vision_model(load(model) if isinstance(model, str | Path) else model)
    sources = [image[None] for image in images] if isinstance(images, Tensor) else list(map(read_image, photos(images)))
    targets = one_per_image(target, len(sources))
    for image_target in targets:
        check_target(requests, image_target)
    has_bars = methods is not None and any(request.takes_progress for request in requests)

    def explain_source(item: tuple[int, Any, ImageTarget | None], _: ProgressCallback) -> PhotoExplanation:
        index, source, image_target = item
        if methods is None:
            result = _default_maps(vision, source, image_target, *requests)
        else:
            result = _maps(vision, source, image_target, requests, progress=progress)
        report(Progress("explaining", index + 1, len(sources)))
        return result

    with progress_callback(False if has_bars else progress) as report:
        items = list(zip(range(len(sources)), sources, targets, strict=True))
        return Explanation(vision.name, one_by_one(items, explain_source, lambda result: result.interrupted, False))


def _default_maps(
    vision: VisionModel,
    source: Any,
    target: ImageTarget | None,
    rollout_request: MethodRequest,
    libra_request: MethodRequest,
) -> PhotoExplanation:
    """Explain a photo by the map of a class, by rollout, and by the heads of the last layer."""
    captured = run_and_capture(vision, source)
    image, trace = captured.trace.images[0], captured.trace
    predictions, no_classes = _predictions(vision, source, captured.logits)
    if isinstance(vision.module, WindowClassified):
        if target is not None:
            raise CallError(f"{vision.name} has CLS tokens in its windows, which take no target: choose methods")
        return PhotoExplanation(image, predictions, window_cls=window_cls(vision, source), no_classes=no_classes)
    class_map, no_class_map = _class_map(vision, source, captured.logits, target, libra_request)
    meaning = f"not available: {no_class_map}" if class_map is None else _meaning_of_class_map(class_map)
    results = {} if class_map is None else {"libra": class_map}
    for fusion in ("mean", "max"):
        results[f"rollout, {fusion} of heads"] = rollout(trace, head_fusion=fusion, **rollout_request.options)
    heads = [attention_map(trace, layer=-1, head=head) for head in range(trace.step(-1).num_heads)]
    return PhotoExplanation(
        image,
        predictions,
        results,
        {"libra": meaning, "rollout": ROLLOUT_MEANING},
        heads=heads,
        no_classes=no_classes,
        no_class_map=no_class_map,
    )


def _class_map(
    vision: VisionModel, source: Any, logits: Tensor | None, target: ImageTarget | None, request: MethodRequest
) -> tuple[Attribution | None, str]:
    """Return the map of a class, or None and the reason why there is none.

    Raises:
        VitscopeError: there is none for the ``target``.
    """
    if logits is None and target is None:
        return None, "the model names no class"
    try:
        if vision.meaning == "probabilities":  # under Libra's rules no gradient passes their softmax
            raise UnsupportedModelError(f"{vision.name} returns probabilities, and libra explains logits")
        return libra(vision, source, target=target, **request.options), ""
    except (UnsupportedModelError, WorkError) as error:
        if target is not None:
            raise
        return None, str(error)


def _meaning_of_class_map(class_map: Attribution) -> str:
    """Return what a signed map of a class can tell, as a sentence."""
    output = str(class_map.provenance["parameters"]["output"]).replace("_", "-")
    return f"which patches raise (red) or lower (blue) the {output} of {short_label(class_map.target)}"


def _maps(
    vision: VisionModel,
    source: Any,
    target: ImageTarget | None,
    requests: Sequence[MethodRequest],
    *,
    progress: ProgressLike,
) -> PhotoExplanation:
    """Explain a photo by several methods, one after another, until all are done or Ctrl-C comes."""
    captured = run_and_capture(vision, source)
    results: dict[str, Attribution] = {}
    interrupted = False
    for request in requests:
        try:
            result = request.compute(vision, source, target, requests, progress=progress)
        except KeyboardInterrupt:
            if not results:
                raise
            interrupted = True
            break
        results[request.name] = result
        if result.provenance.get("interrupted"):
            interrupted = True
            break
    if len(results) < len(requests):
        warn(f"interrupted: the explanation holds the first {len(results)} of {len(requests)} methods")
    predictions, no_classes = _predictions(vision, source, captured.logits)
    return PhotoExplanation(
        captured.trace.images[0],
        predictions,
        results,
        {request.name: request.method.summary for request in requests[: len(results)]},
        agreement(list(results.values()), names=list(results)) if len(results) > 1 else None,
        no_classes=no_classes,
        interrupted=interrupted,
    )


def _predictions(vision: VisionModel, source: Any, logits: Tensor | None) -> tuple[Sequence[Prediction], str]:
    """Return the classes of a photo, the most probable first, or the reason why there are none.

    The reason is empty if the model has no classifier.
    """
    if logits is not None:
        return vision.predictions(logits, logits.shape[-1])[0], ""
    try:
        vision.predict(source)
    except UnclearOutputError as error:  # it is uncertain which outputs are the classes
        return [], str(error)
    except VitscopeError:
        return [], ""
    return [], ""
