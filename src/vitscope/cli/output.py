"""Where figures go, what is printed, and how photos and models are read on the command line."""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vitscope.cli.terminal import say
from vitscope.errors import CallError, ModelUnavailableError, OutputExistsError
from vitscope.validation import LONGEST_NAME
from vitscope.views.plain_text import visible

if TYPE_CHECKING:
    from vitscope.compositing.effects import Effect
    from vitscope.compositing.result import Composition
    from vitscope.metrics.agreement import Agreement
    from vitscope.models import Prediction, VisionModel
    from vitscope.results.segment_attribution import SegmentAttribution
    from vitscope.views.scene import Scene

WIDE = 120  # letters of a terminal that has room for explanations
LONGEST_STEM = 200  # bytes of a photo's name in the name of its figure


def load_model(
    name: str,
    device: str | None,
    photos: Sequence[Path],
    examples: Path | None = None,
    image_size: int | None = None,
    description: Mapping[str, Any] | None = None,
) -> "VisionModel":
    """Load the model if every photo exists, with classes by example if ``examples`` names a folder of them.

    ``description`` holds more arguments of :func:`vitscope.load`.
    """
    checked_name(name, "--model")
    for photo in photos:
        checked_name(photo, "a photo")
    if examples is not None:
        checked_name(examples, "--examples")
    import torch

    from vitscope.images.reading import check_file
    from vitscope.models import load

    for photo in photos:
        check_file(photo)
    if device is not None and device.partition(":")[0].strip() == "meta":
        raise ModelUnavailableError("--device is 'meta', which holds no numbers: pass cpu, cuda or mps")
    chosen = device or ("cuda" if torch.cuda.is_available() else None)
    model = load(name, device=chosen, image_size=image_size, **(description or {}))
    if examples is None:
        return model
    from vitscope.models.nearest_class_mean import few_shot_classifier

    return few_shot_classifier(model, examples)


def target_path(photo: Path, what: str, out: Path | None, count: int) -> Path:
    """Where a photo's figure goes: --out, a name in the folder --out, or a new name here."""
    name = f"{shortened(photo.stem)}-{what}"
    if out is None:
        return fresh(name)
    checked_name(out, "--out")
    if out.is_dir():
        return out / f"{name}.png"
    if count > 1:
        if out.suffix or out.exists():
            raise CallError(f"--out is {out}, one file for {count} photos: pass a folder")
        return out / f"{name}.png"
    if out.suffix.lower() != ".png":
        raise CallError(f"--out is {out}: figures are PNG, end the name in .png")
    if out.exists() and photo.exists() and out.samefile(photo):
        raise CallError(f"--out is {out}, the photo itself: choose another name")
    return out


def checked_name(path: Path | str, what: str) -> None:
    """Refuse what no file can be called.

    Raises:
        CallError: the name is too long for the file system, or holds the character NUL.
    """
    try:
        os.lstat(path)
    except ValueError:
        raise CallError(f"{what} is {_quoted(path)}: a name without the character NUL is expected") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            longest = max(len(os.fsencode(part)) for part in Path(path).parts)
            raise CallError(
                f"{what} is {_quoted(path)}, a name of {longest} bytes: at most {LONGEST_NAME} are possible here"
            ) from None


def _quoted(path: Path | str) -> str:
    """A path in a message, cut if it is long."""
    text = str(path)
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}")


def shortened(stem: str) -> str:
    """The stem, cut so that a suffix of our own still makes a possible name."""
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    return stem


def fresh(name: str, suffix: str = ".png") -> Path:
    """A name in this folder that is not taken."""
    path, number = Path(f"{name}{suffix}"), 1
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}{suffix}")
    return path


def each(
    items: Sequence[Any], targets: Sequence[Path], overwrite: bool, *, bar: bool = True
) -> Iterator[tuple[Any, Path]]:
    """Each item with its target, behind a progress bar where there is more than one and they have none themselves."""
    taken = [target for target in targets if target.exists() and not overwrite]
    if taken:
        raise OutputExistsError(f"{taken[0]} exists already: pass --overwrite or another --out")
    if len(set(targets)) < len(targets):
        raise CallError("two photos have the same name, so their figures would too: explain them one by one")
    if len(items) == 1 or not bar:
        yield from zip(items, targets, strict=True)
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    pairs = list(zip(items, targets, strict=True))
    yield from track(pairs, description="photos", console=console, transient=True, disable=not console.is_terminal)


def fill_of(text: str) -> str | list[float]:
    """A colour as 128 or 0,64,255, or a way to fill by name."""
    try:
        parts = [float(part) for part in numbers(text, "a colour")]
    except CallError:
        return text
    return parts * 3 if len(parts) == 1 else parts


def numbers(text: str, what: str) -> list[int | float]:
    """Numbers with commas between them; whole ones stay whole."""
    try:
        return [int(part) if part.strip().lstrip("-").isdecimal() else float(part) for part in text.split(",")]
    except ValueError:
        raise CallError(f"{what} is {text!r}: numbers with commas between them are expected") from None


def split_list(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def save(scene: "Scene", path: Path, overwrite: bool) -> None:
    from vitscope.views.figure import save_figure

    save_figure(scene, path, overwrite=overwrite)


@contextmanager
def reporting(json_: bool) -> Iterator[list[dict[str, Any]]]:
    """A list of what was made, printed in the end; also when a later photo fails."""
    report: list[dict[str, Any]] = []
    try:
        yield report
    finally:
        if json_ and report:
            print_json(report)
        for entry in () if json_ else report:
            for written in entry.get("files") or [entry["figure"]]:
                say(f"wrote {written}")


def print_json(value: Any) -> None:
    """Print what JSON has; it escapes control characters itself."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_classes(name: str, model: "VisionModel", predictions: Sequence["Prediction"], reason: str = "") -> None:
    """Print the classes of a photo with their probabilities, or values if the model predicts these.

    Args:
        name: what the photo is called.
        predictions: the likeliest classes; empty if there are none, because of ``reason``.
    """
    say(f"{name}, as {model.name} sees it:")
    if not predictions:
        say(f"  {reason or 'this model has no classifier, so it names no class'}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    values = predictions[0].probability is None
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2))
    table.add_column("output" if values else "class")
    table.add_column("value" if values else "probability", justify="right")
    if not values:
        table.add_column("")
    for prediction in predictions:
        label = Text(visible(prediction.label))
        if prediction.probability is None:
            table.add_row(label, f"{prediction.value:.4g}")
        else:
            bar = "█" * round(prediction.probability * 30)
            table.add_row(label, f"{prediction.probability:.1%}", Text(bar, "cyan"))
    Console().print(table)


def print_segments(result: "SegmentAttribution", count: int) -> None:
    """The weightiest segments for and against the target, named as in the figure, and where they are."""
    from vitscope.views.segments import named_places

    places = named_places(result, count)
    segments = result.as_json()["images"][0]["segments"]
    rows = []
    for name, place in places.items():
        row, column = segments[place]["centre"]
        interval = "" if result.intervals is None else "{:+.3f} to {:+.3f}".format(*result.intervals[place].tolist())
        where = f"row {row:.0f}, column {column:.0f}"
        rows.append((name, str(segments[place]["label"]), f"{result.weights[place]:+.4f}", interval, where))
    print_table(("", "segment", "weight", "interval", "centre, in pixels"), rows, right=(1, 2))


def print_agreement(alike: "Agreement") -> None:
    """Each pair's rank correlation, and the overlap of its top regions beside what chance would give."""
    rows = [
        (
            f"{first} and {second}",
            f"{alike.rank_correlation[i, j]:+.2f}",
            f"{alike.overlap[i, j]:.0%}",
            f"{alike.chance[i, j]:.0%}",
        )
        for i, first in enumerate(alike.names)
        for j, second in enumerate(alike.names)
        if i < j
    ]
    overlap = f"top {alike.top:.0%} overlap"
    print_table(("agreement", "rank correlation", overlap, "by chance"), rows, right=(1, 2, 3))


def print_composites(result: "Composition", top_k: int) -> None:
    """The classes of every image of the plate and of the controls, changes against the original beside them."""
    from vitscope.views.compositing import answer, change, on_controls, on_plate

    rows: list[list[str]] = []
    printed, test = set(), "original"
    neutral = [at for at in result.select("controls", neutral=True, placed=False) if at in result.evaluated]
    for at in [*on_plate(result), *(n for name in result.objects for n in on_controls(result, name)), *neutral]:
        one = result.edited_images[at]
        shown = (one.show, one.background, one.neutral)
        if shown in printed:
            continue  # "no dog" is "dog left out"
        printed.add(shown)
        if one.test != test:
            rows.append([])
            test = one.test
        rows.append([one.name])
        for ranked in result.ranking(at, top_k).classes:
            named = "" if result.output == "similarity" else f"{ranked.label.split(',')[0]} "
            cell = f"{named}{answer(ranked.value, result.output, unit=False)}"
            rows[-1].append(f"{cell} {change(ranked, result.output)}" if at else cell)
    count = max(map(len, rows))
    ranks = ["1st", "2nd", "3rd", *(f"{rank}th" for rank in range(4, count))][: count - 1]
    ranks = ["similarity"] if result.output == "similarity" else ranks
    unit = ", %" if result.output == "probability" else ""
    print_table(["image", *(f"{rank}{unit}" for rank in ranks)], rows, right=())
    for name in result.tested("location"):
        if set(result.select("location", name)) <= set(result.evaluated):
            places = result.location_map(name)
            low, high = (answer(float(end), result.output) for end in (places.values.min(), places.values.max()))
            say(f"  {places.target} by the place of {name}: {low} to {high}")


def print_effects(found: Sequence["Effect"], model: str, output: str) -> None:
    """Each effect in points of probability, or in the unit of the answers, with its interval."""
    from rich.console import Console

    unit = 100 if output == "probability" else 1
    rows = [
        [
            one.name,
            f"{unit * one.mean:+.2f}",
            "" if one.interval is None else f"{unit * one.interval[0]:+.2f} to {unit * one.interval[1]:+.2f}",
            "" if one.standardized is None else f"{one.standardized:+.2f}",
            one.about,
        ]
        for one in found
    ]
    header = ["effect", "mean", "95 % interval", "d", "what less what"]
    if Console().width < WIDE:  # what less what would be broken into many lines
        header, rows = header[:-1], [row[:-1] for row in rows]
    count = len(found[0].values)
    what = "percentage points" if output == "probability" else output
    say(f"effects on {model}, {count} image{'s' if count > 1 else ''}, in {what}:")
    print_table(header, rows, right=(1, 2, 3))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> None:
    """Columns under their names; those of ``right`` end in line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2))
    for at, name in enumerate(header):
        table.add_column(Text(visible(name)), justify="right" if at in right else "left")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console().print(table)
