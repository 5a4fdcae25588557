"""The command ``vitscope explain``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.inputs import TargetNames, load_model, with_contrast
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import Contrast, Device, Json, ModelName, Out, Overwrite, Photos, SkipExisting, Target, TopK
from vitscope.cli.output import save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_agreement, print_classes, print_meanings
from vitscope.errors import CallError, UnsupportedModelError, VitscopeError, WorkError

if TYPE_CHECKING:
    from torch import Tensor

    from vitscope.methods.registry import Method
    from vitscope.metrics.agreement import Agreement
    from vitscope.models import Prediction, VisionModel
    from vitscope.results.attribution import Attribution
    from vitscope.views.report import Report
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle


BASELINES = {"hide": "hidden parts", "baseline": "baseline"}  # parameters of methods, and their names in figures


@model_command
@drawing
def explain(
    photos: Photos,
    model: ModelName = "vit-nano",
    out: Out = None,
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    device: Device = None,
    json_: Json = False,
    top_k: TopK = 5,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Method, such as lime; see vitscope methods. May be repeated, to compare results.",
            show_default="rollout, libra and heads",
        ),
    ] = None,
    target: Target = None,
    contrast: Contrast = None,
    *,
    description: Description,
    style: "FigureStyle",
) -> None:
    """Explain photos: top classes, rollout, a class, heads."""
    explain_photos(
        photos,
        model,
        out,
        overwrite,
        device,
        json_,
        top_k,
        style,
        method,
        with_contrast(target, contrast),
        description,
        skip_existing=skip_existing,
    )


def explain_photos(
    photos: Sequence[Any],
    model: str,
    out: Path | None,
    overwrite: bool,
    device: str | None,
    json_: bool,
    top_k: int,
    style: "FigureStyle",
    methods: Sequence[str] | None = None,
    target: TargetNames | None = None,
    description: Description | None = None,
    *,
    skip_existing: bool = False,
    names: Sequence[str] | None = None,
) -> None:
    """Explain each photo, save its figure, and print its classes.

    Args:
        photos: files or images.
        methods: names of methods to compare; None for rollout, the map of a class, and the heads of the last layer.
        target: the class to explain, or the two of a contrast; by default the most likely.
        skip_existing: skip the photos whose figure exists.
        names: a name for each image; by default the paths.
    """
    from vitscope.views.subject import with_subject

    if methods is not None:
        methods = list(dict.fromkeys(methods))
        check_methods(methods, target)
    vision = load_model(model, device, description=description)
    label = ", ".join(methods or ("rollout", "libra", "heads"))
    with PhotoBatch(
        photos,
        "explain",
        out,
        overwrite=overwrite,
        skip_existing=skip_existing,
        json_=json_,
        bar=methods is None,
        names=names,
        report=True,
    ) as batch:
        for photo, path in batch:
            with batch.explaining(photo):
                if methods is None:
                    explanation = _explain_by_default(vision, photo, target)
                else:
                    explanation = _explain_by_methods(vision, photo, methods, target, progress=not json_)
                name, predictions = batch.name(photo), explanation.predictions
                scene = with_subject(explanation.scene, name, vision.name, predictions, explanation.target or "")
                explanation = replace(explanation, scene=scene)
                save(scene, path, overwrite, style, partial(_report, name, vision, explanation, top_k))
                reason = "" if predictions else why_no_classes(vision, photo)
                if not json_:
                    print_classes(name, vision, predictions[:top_k], reason)
                    print_meanings(explanation.meanings)
                    if explanation.agreement is not None:
                        print_agreement(explanation.agreement)
                entries = {
                    "predictions": [vars(prediction) for prediction in predictions[:top_k]],
                    **({"no_classes": reason} if reason else {}),
                    **explanation.entries,
                }
                batch.add(vision, photo, path, entries, target=explanation.target, method=label)
                if explanation.interrupted:
                    raise KeyboardInterrupt


def check_methods(names: Sequence[str], target: TargetNames | None) -> None:
    """Check that every method exists, and that one of them takes the target if there is one."""
    from vitscope.methods.registry import METHODS

    for name in names:
        if name not in METHODS:
            raise CallError(f"unknown method {name!r}: choose {', '.join(METHODS)}")
    if target is not None and not any(_takes(METHODS[name], target) for name in names):
        takers = ", ".join(name for name, method in METHODS.items() if _takes(method, target))
        noun, value = ("contrast", target[1]) if isinstance(target, tuple) else ("target", target)
        raise CallError(f"--{noun} is {value!r}, but {', '.join(names)} takes no {noun}: add one of {takers}")


def _takes(method: "Method", target: TargetNames) -> bool:
    """Return whether a method takes a target; attention has a readout of a class, but none of a contrast."""
    return method.takes_target and not (isinstance(target, tuple) and method.kind == "attention")


def why_no_classes(vision: "VisionModel", photo: Any) -> str:
    """Return the reason why the model predicts no class for a photo; empty if it has no classifier."""
    from vitscope.errors import UnclearOutputError

    try:
        vision.predict(photo)
    except UnclearOutputError as error:  # it is uncertain which outputs are the classes
        return str(error)
    except VitscopeError:
        return ""
    return ""


@dataclass(frozen=True)
class _Explanation:
    """The figure of a photo, with everything that is printed or reported.

    Attributes:
        predictions: of all classes, the most probable first.
        entries: values for the JSON report.
        meanings: a sentence for each map, by its name.
        interrupted: whether Ctrl-C ended it early.
        results: the maps.
        names: of their methods; empty for the default maps.
    """

    scene: "Scene"
    predictions: Sequence["Prediction"]
    entries: dict[str, Any]
    meanings: Mapping[str, str] = field(default_factory=dict)
    agreement: "Agreement | None" = None
    interrupted: bool = False
    results: Sequence["Attribution"] = ()
    names: Sequence[str] = ()

    @property
    def target(self) -> str | None:
        """The label of the explained class; None if no class was explained."""
        return next((result.target for result in self.results if result.target), None)


def _explain_by_default(vision: "VisionModel", photo: Any, target: TargetNames | None) -> _Explanation:
    """Explain a photo by rollout, by the map of a class, and by the heads of the last layer.

    A model that classifies by CLS tokens in its windows has a figure of these tokens instead.
    """
    from vitscope.methods.rollout import rollout
    from vitscope.models.heads import WindowClassified
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.scene import ROLLOUT_MEANING, explanation, meaning_of_class_map
    from vitscope.views.subject import describe_target
    from vitscope.views.windows import cls_grid
    from vitscope.window_tokens.window_cls import window_cls

    result = run_and_capture(vision, photo)
    if isinstance(vision.module, WindowClassified):
        if target is not None:
            raise CallError(f"--target of {vision.name}, which has CLS tokens in its windows, needs a --method")
        return _Explanation(cls_grid(window_cls(vision, photo)), _predictions(vision, result.logits), {"rollouts": []})
    rollouts = [rollout(result.trace, head_fusion=fusion) for fusion in ("mean", "max")]
    class_map, reason = _class_map(vision, photo, result.logits, target)
    entries: dict[str, Any] = {
        "rollouts": [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in rollouts]
    }
    meanings = {"rollout": ROLLOUT_MEANING}
    if class_map is None:
        entries["no_class_map"] = meanings["libra"] = reason
        meanings["libra"] = f"not available: {reason}"
    else:
        entries["class_map"] = {**class_map.as_json(), "values": class_map.values[0].tolist()}
        meanings["libra"] = meaning_of_class_map(class_map)
    predictions = _predictions(vision, result.logits)
    labels = "" if class_map is None else describe_target(class_map.target, predictions)
    scene = explanation(result.trace, rollouts, class_map, labels)
    explained = [*rollouts, *([] if class_map is None else [class_map])]
    return _Explanation(scene, predictions, entries, meanings, results=explained)


def _class_map(
    vision: "VisionModel", photo: Any, logits: "Tensor | None", target: TargetNames | None
) -> "tuple[Attribution | None, str]":
    """Return the map of a class, or None and the reason why there is none.

    Raises:
        VitscopeError: there is none for the ``target``.
    """
    from vitscope.methods.libra import libra

    if logits is None and target is None:
        return None, "the model names no class"
    try:
        if vision.meaning == "probabilities":  # under Libra's rules no gradient passes their softmax
            raise UnsupportedModelError(f"{vision.name} returns probabilities, and libra explains logits")
        return libra(vision, photo, target=target), ""
    except (UnsupportedModelError, WorkError) as error:
        if target is not None:
            raise
        return None, str(error)


def _explain_by_methods(
    vision: "VisionModel",
    photo: Any,
    methods: Sequence[str],
    target: TargetNames | None,
    *,
    progress: bool,
) -> _Explanation:
    """Explain a photo by several methods, one after another, until all are done or Ctrl-C comes."""
    from vitscope.metrics.agreement import agreement
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.segments import side_by_side
    from vitscope.views.subject import describe_target

    logits = run_and_capture(vision, photo).logits
    results, interrupted = [], False
    for method in methods:
        try:
            results.append(_result(vision, photo, method, target, methods, progress=progress))
        except KeyboardInterrupt:
            if not results:
                raise
            interrupted = True
        if interrupted or results[-1].provenance.get("interrupted"):
            interrupted = True
            break
    names = methods[: len(results)]
    explained = next((result.target for result in results if result.target), None)
    predictions = _predictions(vision, logits)
    title = f"What {vision.name} looks at"
    if explained is not None:
        title = f"What supports {describe_target(explained, predictions)} for {vision.name}"
    lines = [_lines(name, result) for name, result in zip(names, results, strict=True)]
    alike = agreement(results, names=names) if len(results) > 1 else None
    scene = side_by_side(results, names, title=title, lines=lines, agreement=alike)
    entries: dict[str, Any] = {"results": {name: r.as_json() for name, r in zip(names, results, strict=True)}}
    if alike is not None:
        entries["agreement"] = alike.as_json()
    return _Explanation(
        scene, predictions, entries, agreement=alike, interrupted=interrupted, results=results, names=names
    )


def _lines(name: str, result: "Attribution") -> list[str]:
    """Return what a map explains, how many forward passes it took, and its baseline if it has one."""
    from vitscope.methods.registry import METHODS

    samples = result.provenance.get("samples")
    passes = METHODS[name].forwards if samples is None else f"{samples:,}"
    parameters = result.provenance["parameters"]
    baseline = next((f"{noun}: {parameters[key]}" for key, noun in BASELINES.items() if key in parameters), None)
    return [_explained_number(name, result), f"forward passes: {passes}", *([baseline] if baseline else [])]


def _explained_number(name: str, result: "Attribution") -> str:
    """Return what a map explains: attention, or a number of the output."""
    from vitscope.methods.registry import METHODS

    if METHODS[name].kind == "attention":
        return "attention, the same for every class" if result.target is None else "attention, for the class"
    output = str(result.provenance["parameters"]["output"]).replace("_", "-")
    return f"the {output}"


def _result(
    vision: "VisionModel",
    photo: Any,
    name: str,
    target: TargetNames | None,
    methods: Sequence[str],
    *,
    progress: bool,
) -> "Attribution":
    """Compute one method, for the target if it takes one.

    Whether rollout has a readout by class depends on the model. If it has none, it is computed without the target, as
    long as another method explains it.
    """
    from vitscope.methods.registry import METHODS

    method = METHODS[name]
    options: dict[str, Any] = {"progress": progress} if method.kind == "perturbation" else {}
    if target is None or not _takes(method, target):
        return method.compute(vision, photo, **options)
    try:
        return method.compute(vision, photo, target=target, **options)
    except UnsupportedModelError:
        if method.kind != "attention" or not any(METHODS[other].kind != "attention" for other in methods):
            raise
        return method.compute(vision, photo, **options)


def _report(name: str, vision: "VisionModel", explanation: _Explanation, top_k: int) -> "Report":
    """Return the content of the report of a photo."""
    from vitscope.methods.registry import METHODS
    from vitscope.views.report import Report, numbers_of

    results = explanation.results
    names = explanation.names or [_map_name(result) for result in results]
    kinds = [METHODS[method].kind for method in explanation.names] or ["attention"]
    if not explanation.names and any(result.signed for result in results):
        kinds.append("gradient")
    return Report(
        photo=name,
        image=explanation.scene.photo,
        model=vision.name,
        predictions=explanation.predictions[:top_k],
        scenes=[explanation.scene],
        kinds=kinds,
        meanings=explanation.meanings or {method: METHODS[method].summary for method in explanation.names},
        numbers=[row for map_name, result in zip(names, results, strict=True) for row in numbers_of(map_name, result)],
        agreement=explanation.agreement,
        provenance={map_name: result.provenance for map_name, result in zip(names, results, strict=True)},
    )


def _map_name(result: "Attribution") -> str:
    """Return the name of a map of the default figure."""
    fusion = result.provenance["parameters"].get("head_fusion")
    return str(result.provenance["method"]) + (f", {fusion} of heads" if fusion else "")


def _predictions(vision: "VisionModel", logits: "Tensor | None") -> Sequence["Prediction"]:
    """Return the classes of the one photo of a run, the most probable first; none if the model has no classifier."""
    return [] if logits is None else vision.predictions(logits, logits.shape[-1])[0]
