"""The command ``vitscope data``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscope.cli.json_output import print_results
from vitscope.cli.options import Json, Overwrite, option
from vitscope.cli.output import check_format, save, unused_path
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_table
from vitscope.cli.training import DataName, SplitSettings, data_name, training_command
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.tune.leakage import DataCheck
    from vitscope.views.style import FigureStyle

MOST_LISTED = 10  # unreadable files


@training_command
@drawing
def data(
    data: DataName,
    options: SplitSettings,
    threshold: Annotated[float, typer.Option(help="Correlation at which two images count as near duplicates.")] = 0.99,
    out: Annotated[Path | None, option("--out", "PNG, PDF or SVG.", default="a new name")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    *,
    style: "FigureStyle | None",
) -> None:
    """Check a data set: counts, leaks, unreadable images."""
    from vitscope.tune.data import load_data
    from vitscope.tune.leakage import check_data
    from vitscope.views.tuning import data_scene

    if style is None and out is not None:
        raise CallError("--no-figure and --out contradict each other: pass one of them")
    path = out or unused_path(f"{data_name(data)}-data")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already: pass --overwrite or another --out")
    check_format(path)
    check = check_data(load_data(data, options), threshold=threshold, progress=not json_)
    save(data_scene(check), path, overwrite, style)
    if json_:
        print_results("data", [{**check.as_json(), "figure": None if style is None else str(path)}])
        return
    _print_check(check)
    if style is not None:
        typer.echo(f"wrote {path}")


def _print_check(check: "DataCheck") -> None:
    """Print the number of images per class, the leaks and the unreadable files."""
    from vitscope.display import counted

    rows = [(label, f"{train:,}", f"{test:,}") for label, (train, test) in check.data.counts().items()]
    print_table(("class", "train", "test"), rows, right=(1, 2))
    labels = f", {check.contradictions} of them with different labels" if check.leaking else ""
    repeated = f"{counted(check.repeated, 'training image')} {'is' if check.repeated == 1 else 'are'} repeated"
    typer.echo(f"{check.describe_leaks()}{labels}; {repeated}")
    typer.echo(
        f"the most similar training image has the class of {check.nearest:.1%} of the test images, "
        f"{check.nearest_without:.1%} without duplicates"
    )
    if check.unreadable:
        typer.echo(f"{counted(len(check.unreadable), 'file')} counted above cannot be read as an image")
    for _, _, reason in check.unreadable[:MOST_LISTED]:
        typer.echo(f"unreadable: {reason}")
    if len(check.unreadable) > MOST_LISTED:
        typer.echo(f"and {len(check.unreadable) - MOST_LISTED} more that cannot be read")
