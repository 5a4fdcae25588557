"""The command line: parse, call, print. Heavy libraries are loaded by the commands, not by ``--help``."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from vitscope.errors import CallError, OutputExistsError, VitscopeError

if TYPE_CHECKING:
    from vitscope.models import Prediction, VisionModel
    from vitscope.trace import Query
    from vitscope.view.scene import Scene

DEBUG_VARIABLE = "VITSCOPE_DEBUG"
INTERRUPTED = 130  # what the command line parser makes of Ctrl-C

app = typer.Typer(
    help="See what a vision transformer looks at.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Photos = Annotated[list[Path], typer.Argument(help="One or more photos.", metavar="PHOTO...", show_default=False)]
ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="vit-nano, swin-nano, a hub id, a local folder, timm:<name> or torchvision:<name>."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The PNG to write; for several photos a folder.", show_default="a new name"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Allow --out to replace a file.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, …", show_default="cuda if there is one")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="How many classes to list.")]
QueryText = Annotated[str, typer.Option("--query", help="readout, cls, register_1, …, or a patch as row,column.")]


@app.command()
def demo(out: Out = None, overwrite: Overwrite = False, device: Device = None, json_: Json = False) -> None:
    """Explain a photo of a cat with the bundled model: no network, no file needed."""
    from PIL import Image
    from skimage.data import chelsea

    photo = Image.fromarray(chelsea())
    _explain([("chelsea", photo)], "vit-nano", out or _fresh("vitscope-demo"), overwrite, device, json_, top_k=5)


@app.command()
def explain(
    photos: Photos,
    model: ModelName = "vit-nano",
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    top_k: TopK = 5,
) -> None:
    """The top classes of a photo, its rollout, and the heads of the last layer."""
    _explain([(str(photo), photo) for photo in photos], model, out, overwrite, device, json_, top_k)


@app.command()
def attention(
    photos: Photos,
    model: ModelName = "vit-nano",
    layer: Annotated[
        int | None, typer.Option("--layer", "-l", help="One layer's heads over the photo.", show_default="all layers")
    ] = None,
    query: QueryText = "readout",
    shifted: Annotated[
        bool, typer.Option("--shifted", help="Swin: the query in --layer and in its shifted partner.")
    ] = False,
    window_cls: Annotated[
        bool, typer.Option("--window-cls", help="Swin: a CLS token in every window, beside rollout with --layer.")
    ] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Raw attention maps: all layers × heads, or one layer's heads; for Swin all blocks, or one block's windows."""
    from vitscope.methods.rollout import rollout as roll
    from vitscope.methods.window_cls import window_cls as read_windows
    from vitscope.run import capture
    from vitscope.view import windows as scenes

    wanted = _query(query)
    if shifted and (layer is None or isinstance(wanted, str)):
        raise CallError("--shifted compares one query in two layers: name both, as in --layer 2 --query 5,6")
    if shifted and window_cls:
        raise CallError("--shifted and --window-cls are two figures: ask for one at a time")
    if window_cls and wanted != "readout":
        raise CallError("--window-cls asks the CLS tokens and takes no --query")
    vision = _load(model, device, photos)
    with _reporting(json_) as report:
        for photo, path in _each(
            photos, [_target(photo, "attention", out, len(photos)) for photo in photos], overwrite
        ):
            if window_cls:
                result = read_windows(vision, photo)
                trace = result.trace
                compared = None if layer is None else scenes.cls_comparison(result, roll(trace), layer)
                scene = compared or scenes.cls_grid(result)
                chosen = trace.blocks if layer is None else [trace.step(layer)]
                shown = {step.layer: result.map(step.layer)[0] for step in chosen}
            else:
                trace = capture(vision, photo)
                shown = scenes.shown_values(trace, layer, wanted)
                if shifted and layer is not None and not isinstance(wanted, str):
                    scene = scenes.shift_effect(trace, layer, wanted)
                else:
                    scene = scenes.attention_scene(trace, layer, wanted)
            asked = {} if window_cls else {"query": query}
            what = "window_cls_mean_of_heads" if window_cls else "values_mean_of_heads"
            about = {**asked, what: {str(at): values.tolist() for at, values in shown.items()}}
            _save(scene, path, overwrite)
            report.append({"picture": str(photo), "figure": str(path), "provenance": dict(trace.provenance), **about})


@app.command()
def rollout(
    photos: Photos,
    model: ModelName = "vit-nano",
    head_fusion: Annotated[
        Literal["mean", "max", "min"] | None,
        typer.Option("--head-fusion", help="How heads are fused.", show_default="mean and max, side by side"),
    ] = None,
    discard_ratio: Annotated[float, typer.Option(help="Share of the lowest attention set to zero, 0 to 1.")] = 0.0,
    start_layer: Annotated[int, typer.Option(help="The first block that takes part.")] = 0,
    normalize: Annotated[bool, typer.Option(help="Divide each row of A + I by its sum.")] = True,
    merge: Annotated[
        Literal["equal", "norm"], typer.Option(help="Swin: how much of a merged patch each of its four parts is.")
    ] = "equal",
    target: Annotated[
        str | None, typer.Option(help="Swin: start from a class's own tokens.", show_default="what the model reads")
    ] = None,
    evolution: Annotated[bool, typer.Option("--evolution", help="The rollout after each block.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Swin: the rollout after each stage.")] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Attention rollout through all blocks."""
    from vitscope.methods.rollout import rollout as roll
    from vitscope.methods.rollout import rollout_evolution
    from vitscope.run import capture
    from vitscope.view import scene as scenes
    from vitscope.view.windows import stage_evolution

    if evolution and stages:
        raise CallError("--evolution and --stages are two figures: ask for one at a time")
    options: dict[str, Any] = {
        "discard_ratio": discard_ratio,
        "start_layer": start_layer,
        "normalize": normalize,
        "merge": merge,
        "target": target,
    }
    vision = _load(model, device, photos)
    with _reporting(json_) as report:
        for photo, path in _each(photos, [_target(photo, "rollout", out, len(photos)) for photo in photos], overwrite):
            trace = capture(vision, photo)
            if evolution or stages:
                results = rollout_evolution(trace, head_fusion=head_fusion or "mean", **options)
                scene = stage_evolution(trace, results) if stages else scenes.evolution(results)
            else:
                fusions: Sequence[Literal["mean", "max", "min"]] = [head_fusion] if head_fusion else ["mean", "max"]
                results = [roll(trace, head_fusion=fusion, **options) for fusion in fusions]
                scene = scenes.rollout_panels(results)
            _save(scene, path, overwrite)
            values = [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in results]
            report.append({"picture": str(photo), "figure": str(path), "rollouts": values})


@app.command()
def models(json_: Json = False) -> None:
    """Which models can be loaded here."""
    from importlib.metadata import PackageNotFoundError, version

    from vitscope.models.catalogue import CATALOGUE

    rows = []
    for entry in CATALOGUE:
        try:
            installed = version(entry.library)
        except PackageNotFoundError:
            installed = None
        rows.append(
            {"library": entry.library, "installed": installed, "families": entry.families, "example": entry.example}
        )
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = row["installed"] or f"not installed: pip install 'vitscope[{row['library']}]'"
        typer.echo(f"{typer.style(str(row['library']), bold=True)} {state}")
        typer.echo(f"  {row['families']}")
        typer.echo(f"  --model {row['example']}\n")


def _explain(
    photos: Sequence[tuple[str, Any]],
    model: str,
    out: Path | None,
    overwrite: bool,
    device: str | None,
    json_: bool,
    top_k: int,
) -> None:
    from vitscope.methods.rollout import rollout as roll
    from vitscope.run import run
    from vitscope.view.scene import explanation

    vision = _load(model, device, [photo for _, photo in photos if isinstance(photo, Path)])
    with _reporting(json_) as report:
        targets = [_target(Path(name), "explain", out, len(photos)) for name, _ in photos]
        for (name, photo), path in _each(photos, targets, overwrite):
            done = run(vision, photo)
            rollouts = [roll(done.trace, head_fusion=fusion) for fusion in ("mean", "max")]
            predictions = [] if done.logits is None else vision.predictions(done.logits, top_k)[0]
            _save(explanation(done.trace, rollouts), path, overwrite)
            if not json_:
                _print_classes(name, vision, predictions)
            report.append(
                {
                    "picture": name,
                    "predictions": [vars(prediction) for prediction in predictions],
                    "figure": str(path),
                    "rollouts": [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in rollouts],
                }
            )


def _print_classes(name: str, model: "VisionModel", predictions: Sequence["Prediction"]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"{name}, as {model.name} sees it:", highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not predictions:
        console.print("  this model has no classifier, so it names no class", highlight=False)
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2))
    table.add_column("class")
    table.add_column("probability", justify="right")
    table.add_column("")
    for prediction in predictions:
        bar = "█" * round(prediction.probability * 30)
        table.add_row(Text(prediction.label), f"{prediction.probability:.1%}", Text(bar, "cyan"))
    console.print(table)


def _load(name: str, device: str | None, photos: Sequence[Path]) -> "VisionModel":
    """The model, once every photo is known to be there."""
    import torch

    from vitscope.models import load
    from vitscope.picture import check_file

    for photo in photos:
        check_file(photo)

    return load(name, device=device or ("cuda" if torch.cuda.is_available() else None))


def _query(text: str) -> "Query":
    row, comma, column = text.partition(",")
    if not comma:
        return text
    try:
        return int(row), int(column)
    except ValueError:
        raise CallError(f"unknown query {text!r}: pass readout, the name of a prefix token, or row,column") from None


def _target(photo: Path, what: str, out: Path | None, count: int) -> Path:
    """Where a photo's figure goes: --out, a name in the folder --out, or a new name here."""
    name = f"{photo.stem}-{what}"
    if out is None:
        return _fresh(name)
    if out.is_dir():
        return out / f"{name}.png"
    if count > 1:
        if out.suffix or out.exists():
            raise CallError(f"--out is {out}, one file for {count} photos: pass a folder")
        return out / f"{name}.png"
    if out.suffix.lower() != ".png":
        raise CallError(f"--out is {out}: figures are PNG, end the name in .png")
    return out


def _fresh(name: str) -> Path:
    """A name in this folder that is not taken."""
    path, number = Path(f"{name}.png"), 1
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}.png")
    return path


def _each(items: Sequence[Any], targets: Sequence[Path], overwrite: bool) -> Iterator[tuple[Any, Path]]:
    """Each item with its target, behind a progress bar where there is more than one."""
    taken = [target for target in targets if target.exists() and not overwrite]
    if taken:
        raise OutputExistsError(f"{taken[0]} exists already: pass --overwrite or another --out")
    if len(set(targets)) < len(targets):
        raise CallError("two photos have the same name, so their figures would too: explain them one by one")
    if len(items) == 1:
        yield items[0], targets[0]
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    pairs = list(zip(items, targets, strict=True))
    yield from track(pairs, description="photos", console=console, transient=True, disable=not console.is_terminal)


def _save(scene: "Scene", path: Path, overwrite: bool) -> None:
    from vitscope.view.figure import save_figure

    save_figure(scene, path, overwrite=overwrite)


@contextmanager
def _reporting(json_: bool) -> Iterator[list[dict[str, Any]]]:
    """A list of what was made, printed in the end; also when a later photo fails."""
    report: list[dict[str, Any]] = []
    try:
        yield report
    finally:
        if json_ and report:
            typer.echo(json.dumps(report, indent=2, allow_nan=False))
        for entry in () if json_ else report:
            typer.echo(f"wrote {entry['figure']}")


def main() -> NoReturn:
    """Run the command line; every error is one line on stderr, with exit code 1 (work) or 2 (call)."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except VitscopeError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what was finished before is kept", 1)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            sys.exit(2)
        if hasattr(error, "format_message"):  # what the parser of the command line raises
            _fail(error.format_message(), 2)
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        _fail(f"{type(error).__name__}: {first} (set {DEBUG_VARIABLE}=1 for the whole story)", 1)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"vitscope: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
