"""The command ``vitscope explain``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.inputs import TargetNames, load_model, with_contrast
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import Contrast, Device, Json, ModelName, Out, Overwrite, Photos, Target, TopK
from vitscope.cli.output import each_photo, figure_paths, reporting, save
from vitscope.cli.tables import print_agreement, print_classes
from vitscope.errors import CallError, UnsupportedModelError, VitscopeError

if TYPE_CHECKING:
    from torch import Tensor

    from vitscope.methods.registry import Method
    from vitscope.metrics.agreement import Agreement
    from vitscope.models import Prediction, VisionModel
    from vitscope.results.attribution import Attribution
    from vitscope.views.scene import Scene


@model_command
def explain(
    photos: Photos,
    model: ModelName = "vit-nano",
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    top_k: TopK = 5,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Method, such as lime; see vitscope methods. May be repeated, to compare results.",
            show_default="rollout and heads",
        ),
    ] = None,
    target: Target = None,
    contrast: Contrast = None,
    *,
    description: Description,
) -> None:
    """Explain photos: top classes, rollout, heads, other methods."""
    for option, value in (("--target", target), ("--contrast", contrast)):
        if method is None and value is not None:
            raise CallError(f"{option} needs a --method that explains a class, such as --method lime")
    named_photos = [(str(photo), photo) for photo in photos]
    explain_photos(
        named_photos, model, out, overwrite, device, json_, top_k, method, with_contrast(target, contrast), description
    )


def explain_photos(
    photos: Sequence[tuple[str, Any]],
    model: str,
    out: Path | None,
    overwrite: bool,
    device: str | None,
    json_: bool,
    top_k: int,
    methods: Sequence[str] | None = None,
    target: TargetNames | None = None,
    description: Description | None = None,
) -> None:
    """Explain each photo, save its figure, and print its classes.

    Args:
        photos: names and photos; a photo is a path or an image.
        methods: names of methods to compare; None for rollout and the heads of the last layer.
        target: the class to explain, or the two of a contrast; by default the most likely.
    """
    methods = None if methods is None else list(dict.fromkeys(methods))
    check_methods(methods or (), target)
    files = [photo for _, photo in photos if isinstance(photo, Path)]
    vision = load_model(model, device, files, description=description)
    paths = figure_paths([Path(name) for name, _ in photos], "explain", out)
    with reporting(json_) as report:
        for (name, photo), path in each_photo(photos, paths, overwrite, bar=methods is None):
            if methods is None:
                explanation = _explain_by_attention(vision, photo, top_k)
            else:
                explanation = _explain_by_methods(vision, photo, top_k, methods, target, progress=not json_)
            save(explanation.scene, path, overwrite)
            reason = "" if explanation.predictions else why_no_classes(vision, photo)
            if not json_:
                print_classes(name, vision, explanation.predictions, reason)
                if explanation.agreement is not None:
                    print_agreement(explanation.agreement)
            report.append(
                {
                    "image": name,
                    "predictions": [vars(prediction) for prediction in explanation.predictions],
                    **({"no_classes": reason} if reason else {}),
                    "figure": str(path),
                    **explanation.entries,
                }
            )
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
        entries: values for the JSON report.
        interrupted: whether Ctrl-C ended it early.
    """

    scene: "Scene"
    predictions: Sequence["Prediction"]
    entries: dict[str, Any]
    agreement: "Agreement | None" = None
    interrupted: bool = False


def _explain_by_attention(vision: "VisionModel", photo: Any, top_k: int) -> _Explanation:
    """Explain a photo by rollout and the heads of the last layer, or by the CLS tokens that the classifier reads."""
    from vitscope.methods.rollout import rollout
    from vitscope.models.heads import WindowClassified
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.scene import explanation
    from vitscope.views.windows import cls_grid
    from vitscope.window_tokens.window_cls import window_cls

    result = run_and_capture(vision, photo)
    if isinstance(vision.module, WindowClassified):
        rollouts, scene = [], cls_grid(window_cls(vision, photo))
    else:
        rollouts = [rollout(result.trace, head_fusion=fusion) for fusion in ("mean", "max")]
        scene = explanation(result.trace, rollouts)
    values = [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in rollouts]
    return _Explanation(scene, _predictions(vision, result.logits, top_k), {"rollouts": values})


def _explain_by_methods(
    vision: "VisionModel",
    photo: Any,
    top_k: int,
    methods: Sequence[str],
    target: TargetNames | None,
    *,
    progress: bool,
) -> _Explanation:
    """Explain a photo by several methods, one after another, until all are done or Ctrl-C comes."""
    from vitscope.metrics.agreement import agreement
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.segments import side_by_side

    predictions = _predictions(vision, run_and_capture(vision, photo).logits, top_k)
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
    title = f"What {vision.name} looks at"
    if explained is not None:
        title = f"Explanations of {explained} for {vision.name}"
    forwards = [f"{name} {r.provenance.get('samples', 1):,}" for name, r in zip(names, results, strict=True)]
    scene = side_by_side(results, names, title=title, note=f"forward passes: {', '.join(forwards)}")
    entries: dict[str, Any] = {"results": {name: r.as_json() for name, r in zip(names, results, strict=True)}}
    alike = agreement(results, names=names) if len(results) > 1 else None
    if alike is not None:
        entries["agreement"] = alike.as_json()
    return _Explanation(scene, predictions, entries, alike, interrupted)


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


def _predictions(vision: "VisionModel", logits: "Tensor | None", top_k: int) -> Sequence["Prediction"]:
    """Return the most likely classes of the one photo of a run; none if the model has no classifier."""
    return [] if logits is None else vision.predictions(logits, top_k)[0]
