"""vitscope data"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscope.cli.app import app
from vitscope.cli.options import Json, Overwrite
from vitscope.cli.output import fresh, save
from vitscope.cli.tables import print_table
from vitscope.cli.training import READING, DataName, PerClass, SplitSeed, TestShare, data_name
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.tune.leakage import DataCheck


@app.command()
def data(
    data: DataName,
    test_share: TestShare = 0.2,
    split_seed: SplitSeed = 0,
    per_class: PerClass = None,
    threshold: Annotated[float, typer.Option(help="Correlation from which two images are near duplicates.")] = 0.99,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The PNG to write.", show_default="a new name")
    ] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Check a data set: counts, leaks, unreadable images."""
    from vitscope.methods._perturbation import progress_bar
    from vitscope.tune.data import load_data
    from vitscope.tune.leakage import inspect
    from vitscope.views.tuning import data_scene

    path = out or fresh(f"{data_name(data)}-data")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already: pass --overwrite or another --out")
    if path.suffix.lower() != ".png":
        raise CallError(f"--out is {path}: figures are PNG, end the name in .png")
    loaded = load_data(data, test_share=test_share, seed=split_seed, per_class=per_class)
    with progress_bar(not json_, READING) as tell:
        found = inspect(loaded, threshold=threshold, progress=tell)
    save(data_scene(found), path, overwrite)
    if json_:
        typer.echo(json.dumps({**found.as_json(), "figure": str(path)}, indent=2))
        return
    _print_data(found)
    typer.echo(f"wrote {path}")


def _print_data(found: "DataCheck") -> None:
    from vitscope.tune.leakage import counted

    rows = [(label, f"{train:,}", f"{test:,}") for label, (train, test) in found.data.counts().items()]
    print_table(("class", "train", "test"), rows, right=(1, 2))
    labels = f", {found.contradictions} of them with different labels" if found.leaking else ""
    repeated = f"{counted(found.repeated, 'training image')} {'is' if found.repeated == 1 else 'are'} repeated"
    typer.echo(f"{found.leaks_told()}{labels}; {repeated}")
    typer.echo(
        f"the class of the most similar training image is right for {found.nearest:.1%} of the test images, "
        f"{found.nearest_without:.1%} without duplicates"
    )
    if found.unreadable:
        typer.echo(f"{counted(len(found.unreadable), 'file')} counted above cannot be read as an image")
    for _, _, reason in found.unreadable[:10]:
        typer.echo(f"unreadable: {reason}")
    if len(found.unreadable) > 10:
        typer.echo(f"and {len(found.unreadable) - 10} more that cannot be read")
