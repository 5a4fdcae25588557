"""Options and progress of the commands that train: data, finetune and compare."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from vitscope.cli.app import register
from vitscope.cli.options import OPTIONS, option
from vitscope.docstrings import attribute_entries
from vitscope.errors import WorkError
from vitscope.progress import Progress, ProgressCallback
from vitscope.tune.data_options import DataOptions
from vitscope.tune.libraries import check_training_libraries
from vitscope.tune.recipe import Recipe, RecipeChanges

VALIDATION_SHARE = 0.1  # of the training images, held out by --early-stop


@dataclass(frozen=True)
class OptionGroup:
    """Mark a parameter of a command whose value comes from options, one for each field of a dataclass.

    Names, types, defaults and help of the options are those of the dataclass and its docstring.

    Attributes:
        owner: the dataclass.
        names: the fields that get an option; empty for all of them.
        as_changes: pass a mapping of the options that were set, instead of an instance of the dataclass.
        notes: text to append to the help of an option.
    """

    owner: type
    names: tuple[str, ...] = ()
    as_changes: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options, as parameters."""
        return self.names or tuple(entry.name for entry in fields(self.owner))

    def parameters(self) -> list[inspect.Parameter]:
        """Return one parameter of the command per option."""
        hints, texts = get_type_hints(self.owner), attribute_help(self.owner)
        defaults = {entry.name: entry.default for entry in fields(self.owner)}
        parameters = []
        for name in self.options:
            long_name = f"--{name.replace('_', '-')}"
            default, note = "the recipe's" if self.as_changes else True, self.notes.get(name, "")
            if long_name in OPTIONS:
                declaration = option(long_name, note, default=default)
            else:
                text = " ".join(filter(None, (texts.get(name), note)))
                declaration = typer.Option(long_name, help=text, show_default=default)
            kind = _option_type(hints[name], optional=self.as_changes)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None if self.as_changes else defaults[name],
                    annotation=Annotated[kind, declaration],
                )
            )
        return parameters

    def value(self, values: Mapping[str, Any]) -> Any:
        """Return the value of the marked parameter."""
        if self.as_changes:
            return {name: value for name, value in values.items() if value is not None}
        return self.owner(**values)


def attribute_help(owner: type) -> dict[str, str]:
    """Return the first sentence about each attribute in the docstring of a class."""
    sentences = ((name, re.split(r"(?<=\.)\s", text)[0]) for name, text in attribute_entries(owner).items())
    return {name: sentence.replace("``", "").replace('"', "") for name, sentence in sentences}


def _option_type(hint: Any, *, optional: bool) -> Any:
    """Return the type of an option: typer knows no unions except with None."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = float if float in kinds else next(entry for entry in kinds if entry is not NoneType)
    return kind | None if optional or NoneType in kinds else kind


def training_command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command whose parameters marked with an :class:`OptionGroup` are filled by the options of the group."""
    signature = inspect.signature(function)
    groups: dict[str, OptionGroup] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        marks = getattr(parameter.annotation, "__metadata__", ())
        group = next((mark for mark in marks if isinstance(mark, OptionGroup)), None)
        if group is None:
            parameters.append(parameter)
        else:
            groups[name] = group
            parameters += group.parameters()

    @wraps(function)
    def command(**arguments: Any) -> None:
        check_training_libraries()
        for name, group in groups.items():
            arguments[name] = group.value({option: arguments.pop(option) for option in group.options})
        function(**arguments)

    register(command, parameters)
    return function


DataName = Annotated[
    str,
    typer.Argument(
        help="Folder with one subfolder of images per class, cifar10, fashion-mnist, eurosat, brain-mri, birds-525, or "
        "a data set of the Hugging Face hub as owner/name.",
        metavar="DATA",
        show_default=False,
    ),
]
SplitSettings = Annotated[DataOptions, OptionGroup(DataOptions, ("test_share", "split_seed", "per_class"))]
DataSettings = Annotated[DataOptions, OptionGroup(DataOptions)]
SHARED_SETTINGS = ("epochs", "learning_rate", "batch_size", "precision", "early_stop")
NOTES = {
    "early_stop": "Holds out a tenth of the training images.",
    "seed": "Of the new classifier, the order of the images, the augmentations and dropout.",
}
RecipeSettings = Annotated[RecipeChanges, OptionGroup(Recipe, SHARED_SETTINGS, as_changes=True, notes=NOTES)]
RunSettings = Annotated[
    RecipeChanges, OptionGroup(Recipe, (*SHARED_SETTINGS, "accumulate", "seed"), as_changes=True, notes=NOTES)
]
RecipeName = Annotated[str, option("--recipe")]
Rank = Annotated[int | None, option("--rank", default="64 for adapters, 8 for LoRA")]
Folder = Annotated[Path | None, option("--out", "The folder of the run.", default="named after data and model")]


def data_name(data: str) -> str:
    """Return the last level of a data set's name; "." and ".." are resolved first."""
    path = Path(data)
    return path.resolve().name if path.name in ("", "..") else path.name


def is_first_process() -> bool:
    """Return whether this is the first of the processes that train together, which writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def hold_out(changes: RecipeChanges) -> RecipeChanges:
    """Return the changes; with early stopping, they hold out a share of the training images."""
    if "early_stop" in changes:
        changes = {**changes, "validation": VALIDATION_SHARE}
    return changes


@contextmanager
def training_progress(visible: bool) -> Iterator[ProgressCallback]:
    """Yield a callback that shows progress on stderr: a bar on a terminal, otherwise one line per epoch.

    Raises:
        WorkError: training was interrupted by Ctrl-C.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not (visible and console.is_terminal)) as bar:
        task = bar.add_task("training", total=None, accuracy="")
        accuracies: dict[str, str] = {}

        def show(step: Progress) -> None:
            if "accuracy" in step.metrics:
                accuracies[step.description] = f"accuracy {step.metrics['accuracy']:.1%}"
                if visible and not console.is_terminal:
                    line = f"{step.description}: step {step.completed} of {step.total}"
                    typer.echo(f"{line}, {accuracies[step.description]}", err=True)
            bar.update(
                task,
                description=step.description,
                completed=step.completed,
                total=step.total,
                accuracy=accuracies.get(step.description, ""),
            )

        try:
            yield show
        except KeyboardInterrupt:
            raise WorkError("interrupted: run the same command again to resume") from None
