"""Commands that ask a model again and again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitscope.cli.app import Compared, Device, Examples, Json, ModelName, Out, Overwrite, Photos, Target
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.output import (
    checked_name,
    each,
    fill_of,
    load_model,
    print_agreement,
    print_segments,
    reporting,
    save,
    target_path,
)
from vitscope.cli.terminal import say
from vitscope.errors import CallError

if TYPE_CHECKING:
    import numpy as np

COUNT = 5  # segments a side in tables, as in the figure


@model_command
def lime(
    photos: Photos,
    model: ModelName = "vit-nano",
    target: Target = None,
    num_samples: Annotated[
        str, typer.Option("--num-samples", "-n", help="How many masks, or auto: until the order is settled.")
    ] = "1000",
    segments: Annotated[
        str, typer.Option(help="quickshift, slic, patches, or a file of labels (.npy, or an image).")
    ] = "quickshift",
    hide: Annotated[
        str, typer.Option(help="mean, black, grey, blur, noise, drop, a colour (0 to 255, or r,g,b) or an image.")
    ] = "mean",
    sampling: Annotated[
        Literal["lime", "paired", "glime"] | None,
        typer.Option(help="How masks are drawn.", show_default="lime; paired with auto"),
    ] = None,
    output: Annotated[Literal["probability", "logit"], typer.Option(help="What is explained.")] = "probability",
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images to a forward.")] = 64,
    compare: Compared = None,
    examples: Examples = None,
    arrays: Annotated[
        Path | None, typer.Option(help="Also write the numbers: .safetensors, .npz or .json; for one photo.")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
) -> None:
    """What each segment of a photo adds to a class: LIME, with intervals."""
    from vitscope.methods.lime import lime as explain
    from vitscope.metrics.agreement import agreement
    from vitscope.views.segments import seen_as, side_by_side, supporting_regions

    options: dict[str, Any] = {
        "target": target,
        "num_samples": _count(num_samples),
        "segments": _segments(segments),
        "hide": fill_of(hide),
        "sampling": sampling,
        "output": output,
        "seed": seed,
        "batch_size": batch_size,
        "progress": not json_,
    }
    if arrays is not None:
        _check_arrays(arrays, len(photos) * (1 + len(compare or ())), overwrite)
    models = [load_model(model, device, photos, examples, description=description)]
    models += [load_model(name, device, photos, examples) for name in compare or ()]
    with reporting(json_) as report:
        targets = [target_path(photo, "lime", out, len(photos)) for photo in photos]
        for photo, path in each(photos, targets, overwrite, bar=False):
            results = [explain(models[0], photo, **options)]
            for other in models[1:]:
                if results[-1].provenance["interrupted"]:
                    break
                # The same question to all: the first model's class, where the others know it.
                known = target is None and results[0].target in (other.labels or ())
                results.append(explain(other, photo, **options | ({"target": results[0].target} if known else {})))
            alike = agreement(results, names=[one.name for one in models]) if len(results) > 1 else None
            if alike is None:
                scene = supporting_regions(results[0])
            else:
                names = [seen_as(result) for result in results]
                samples = ", ".join(f"{result.provenance['samples']:,}" for result in results)
                title, note = "What speaks for the class", f"lime, samples: {samples}"
                scene = side_by_side(results, names, title=title, note=note)
            save(scene, path, overwrite)
            if arrays is not None:
                results[0].save(arrays)
            if not json_:
                for result in results:
                    say(f"{photo}, as {seen_as(result)}")
                    print_segments(result, COUNT)
                if alike is not None:
                    print_agreement(alike)
            made = {"image": str(photo), "figure": str(path), "results": [result.as_json() for result in results]}
            report.append(made if alike is None else made | {"agreement": alike.as_json()})
            if any(result.provenance["interrupted"] for result in results):
                raise KeyboardInterrupt


def _count(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise CallError(f"--num-samples is {text!r}: pass a whole number, or 'auto'") from None


def _segments(text: str) -> "str | np.ndarray":
    """The name of a way to cut the photo, or the labels in a file."""
    path = Path(text)
    if not path.suffix:
        return text
    checked_name(path, "--segments")
    import numpy as np
    from PIL import Image

    from vitscope.images.reading import check_file

    check_file(path)
    try:
        return np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(Image.open(path))
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise CallError(f"{path} holds no segment labels: {reason}") from None


def _check_arrays(path: Path, results: int, overwrite: bool) -> None:
    if results > 1:
        raise CallError(f"--arrays is {path}, one file for {results} results: explain one photo with one model")
    checked_name(path, "--arrays")
    if path.suffix not in (".safetensors", ".npz", ".json"):
        raise CallError(f"--arrays is {path}: end the name in .safetensors, .npz or .json")
    if path.exists() and not overwrite:
        raise CallError(f"{path} exists already: pass --overwrite or another --arrays")
