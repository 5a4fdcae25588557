"""vitscope explain: the classes of a photo, and what any of the methods says about it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.app import Device, Json, ModelName, Out, Overwrite, Photos, Target, TopK
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.output import (
    each,
    load_model,
    print_agreement,
    print_classes,
    reporting,
    save,
    target_path,
)
from vitscope.errors import CallError, UnsupportedModelError, VitscopeError

if TYPE_CHECKING:
    from vitscope.models import VisionModel
    from vitscope.results.attribution import Attribution


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
            "--method", help="Another method, as lime; several are set side by side.", show_default="rollout and heads"
        ),
    ] = None,
    target: Target = None,
    *,
    description: Description,
) -> None:
    """The top classes of a photo, its rollout and the heads of the last layer, or what other methods say."""
    named = [(str(photo), photo) for photo in photos]
    if method is None and target is not None:
        raise CallError("--target needs a --method that explains a class, as --method lime")
    explain_photos(named, model, out, overwrite, device, json_, top_k, method, target, description)


def explain_photos(
    photos: Sequence[tuple[str, Any]],
    model: str,
    out: Path | None,
    overwrite: bool,
    device: str | None,
    json_: bool,
    top_k: int,
    methods: Sequence[str] | None = None,
    target: str | None = None,
    description: Description | None = None,
) -> None:
    from vitscope.methods.rollout import rollout as roll
    from vitscope.models.heads import WindowClassified
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.scene import explanation
    from vitscope.views.windows import cls_grid
    from vitscope.window_tokens.window_cls import window_cls

    methods = None if methods is None else list(dict.fromkeys(methods))
    check_methods(methods or (), target)
    files = [photo for _, photo in photos if isinstance(photo, Path)]
    vision = load_model(model, device, files, description=description)
    with reporting(json_) as report:
        targets = [target_path(Path(name), "explain", out, len(photos)) for name, _ in photos]
        for (name, photo), path in each(photos, targets, overwrite, bar=methods is None):
            if methods is not None:
                made, interrupted = compared(vision, name, photo, path, methods, target, overwrite, json_, top_k)
                report.append(made)
                if interrupted:
                    raise KeyboardInterrupt
                continue
            done = run_and_capture(vision, photo)
            reads_windows = isinstance(vision.module, WindowClassified)
            rollouts = [] if reads_windows else [roll(done.trace, head_fusion=fusion) for fusion in ("mean", "max")]
            predictions = [] if done.logits is None else vision.predictions(done.logits, top_k)[0]
            scene = cls_grid(window_cls(vision, photo)) if reads_windows else explanation(done.trace, rollouts)
            save(scene, path, overwrite)
            reason = "" if predictions else why_no_classes(vision, photo)
            if not json_:
                print_classes(name, vision, predictions, reason)
            report.append(
                {
                    "image": name,
                    "predictions": [vars(prediction) for prediction in predictions],
                    **({"no_classes": reason} if reason else {}),
                    "figure": str(path),
                    "rollouts": [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in rollouts],
                }
            )


def check_methods(names: Sequence[str], target: str | None) -> None:
    """Refuse an unknown method, and a target that none of the methods takes."""
    from vitscope.methods.registry import METHODS

    for name in names:
        if name not in METHODS:
            raise CallError(f"unknown method {name!r}: choose {', '.join(METHODS)}")
    if target is not None and not any(METHODS[name].takes_target for name in names):
        takers = ", ".join(name for name, method in METHODS.items() if method.takes_target)
        raise CallError(f"--target is {target!r}, but {', '.join(names)} takes no target: add one of {takers}")


def _result(
    vision: "VisionModel", photo: Any, name: str, target: str | None, methods: Sequence[str], *, progress: bool
) -> "Attribution":
    """Compute one method, for the target if it takes one.

    Whether rollout has a readout by class depends on the model. If it has none, it is computed without the target, as
    long as another method explains it.
    """
    from vitscope.methods.registry import METHODS

    method = METHODS[name]
    options: dict[str, Any] = {"progress": progress} if method.kind == "perturbation" else {}
    if target is None or not method.takes_target:
        return method.compute(vision, photo, **options)
    try:
        return method.compute(vision, photo, target=target, **options)
    except UnsupportedModelError:
        if method.kind != "attention" or not any(METHODS[other].kind != "attention" for other in methods):
            raise
        return method.compute(vision, photo, **options)


def why_no_classes(vision: "VisionModel", photo: Any) -> str:
    """Return why a run of the model names no class; empty if the model has no classifier."""
    from vitscope.models.outputs import UnclearOutputError

    try:
        vision.predict(photo)
    except UnclearOutputError as error:  # which part of the output are the classes is not certain
        return str(error)
    except VitscopeError:
        return ""
    return ""


def compared(
    vision: "VisionModel",
    name: str,
    photo: Any,
    path: Path,
    methods: Sequence[str],
    target: str | None,
    overwrite: bool,
    json_: bool,
    top_k: int,
) -> tuple[dict[str, Any], bool]:
    """Methods side by side over one photo, and how far they agree; and whether Ctrl-C ended it early."""
    from vitscope.metrics.agreement import agreement
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.segments import side_by_side

    logits = run_and_capture(vision, photo).logits
    predictions = [] if logits is None else vision.predictions(logits, top_k)[0]
    results, interrupted = [], False
    for method in methods:
        try:
            results.append(_result(vision, photo, method, target, methods, progress=not json_))
        except KeyboardInterrupt:
            if not results:
                raise
            interrupted = True
        if interrupted or results[-1].provenance.get("interrupted"):
            interrupted = True
            break
    shown = methods[: len(results)]
    explained = next((result.target for result in results if result.target), None)
    title = f"What {vision.name} looks at" if explained is None else f"Why {vision.name} says {explained}"
    asked = [f"{method} {r.provenance.get('samples', 1):,}" for method, r in zip(shown, results, strict=True)]
    save(side_by_side(results, shown, title=title, note=f"forwards: {', '.join(asked)}"), path, overwrite)
    alike = agreement(results, names=shown) if len(results) > 1 else None
    reason = "" if predictions else why_no_classes(vision, photo)
    if not json_:
        print_classes(name, vision, predictions, reason)
        if alike is not None:
            print_agreement(alike)
    report: dict[str, Any] = {
        "image": name,
        "predictions": [vars(prediction) for prediction in predictions],
        **({"no_classes": reason} if reason else {}),
        "figure": str(path),
        "results": {method: r.as_json() for method, r in zip(shown, results, strict=True)},
    }
    if alike is not None:
        report["agreement"] = alike.as_json()
    return report, interrupted
