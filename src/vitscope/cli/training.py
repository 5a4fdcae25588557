"""Options and progress that data, finetune and compare share."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vitscope.errors import WorkError

if TYPE_CHECKING:
    from vitscope.tune.data import Data

DataName = Annotated[
    str,
    typer.Argument(
        help="A folder with a folder of images for each class, cifar10, fashion-mnist, eurosat, brain-mri, "
        "birds-525, or owner/name of the hub.",
        metavar="DATA",
        show_default=False,
    ),
]
TestShare = Annotated[float, typer.Option(help="Of each class, where the data set has no split.")]
SplitSeed = Annotated[int, typer.Option(help="Of the split and of --per-class.")]
PerClass = Annotated[int | None, typer.Option(help="At most so many training images of a class.", show_default="all")]
Unreadable = Annotated[Literal["refuse", "skip"], typer.Option(help="Images that cannot be read.")]
DropDuplicates = Annotated[
    bool, typer.Option("--drop-duplicates", help="Leave out training images that are in the test set too.")
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="report, modern, or a TOML file.")]
Epochs = Annotated[int | None, typer.Option(help="In place of the recipe's.", show_default="the recipe's")]
LearningRate = Annotated[float | None, typer.Option(help="In place of the recipe's.", show_default="the recipe's")]
BatchSize = Annotated[int | None, typer.Option(help="In place of the recipe's.", show_default="the recipe's")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the forward.", show_default="the recipe's"),
]
EarlyStop = Annotated[
    int | None, typer.Option(help="Epochs without a better validation accuracy; holds out a tenth of train.")
]
Rank = Annotated[int | None, typer.Option(help="Of adapters and LoRA.", show_default="64 and 8")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side of the input.", show_default="the model's")]
READING = "reading images"
HELD_OUT = 0.1  # of the training images, for early stopping
Folder = Annotated[
    Path | None, typer.Option("--out", "-o", help="The folder of the run.", show_default="named after data and model")
]


def data_name(data: str) -> str:
    """The last part of a data set's name, also of "." and ".."."""
    path = Path(data)
    return path.resolve().name if path.name in ("", "..") else path.name


def is_first_process() -> bool:
    """Of several processes that train together, the first one writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def read_data(
    name: str,
    test_share: float,
    seed: int,
    per_class: int | None,
    unreadable: str,
    drop_duplicates: bool,
    *,
    shown: bool,
) -> "Data":
    from vitscope.methods._perturbation import progress_bar
    from vitscope.tune.data import load_data
    from vitscope.tune.leakage import inspect, usable

    loaded = load_data(name, test_share=test_share, seed=seed, per_class=per_class)
    with progress_bar(shown, READING) as tell:
        found = inspect(loaded, progress=tell)
    return usable(found, unreadable=unreadable, drop_duplicates=drop_duplicates)


@contextmanager
def training_progress(shown: bool) -> Iterator[Callable[[str, Mapping[str, float | int]], None]]:
    """On stderr what is trained, steps, the accuracy of the last epoch: a bar, or where none can be a line an epoch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    last: list[object] = []
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("training", total=None, accuracy="")

        def tell(what: str, found: Mapping[str, float | int]) -> None:
            accuracy = found["accuracy"]
            known = "" if accuracy != accuracy else f"accuracy {accuracy:.1%}"
            bar.update(task, description=what, completed=found["step"], total=found["steps"], accuracy=known)
            evaluated = [what, found["step"]] == last  # a step is told of again when its epoch has been evaluated
            if evaluated and shown and not console.is_terminal:
                typer.echo(f"{what}: step {found['step']} of {found['steps']}, {known}", err=True)
            last[:] = [what, found["step"]]

        try:
            yield tell
        except KeyboardInterrupt:
            raise WorkError("interrupted; the same command goes on from where it was") from None
