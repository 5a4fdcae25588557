"""The options that describe a model, for every command that takes --model."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vitscope.cli.app import app

PANEL = "Describe the model"
Description = Mapping[str, Any]  # keyword arguments of vitscope.load

Weights = Annotated[Path | None, typer.Option(help="A file of weights for the architecture that --model names.")]
Adapter = Annotated[Path | None, typer.Option(help="A PEFT adapter folder for --model.")]
Backbone = Annotated[str | None, typer.Option(help="The path of the vision transformer inside the model.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "--model-output",
        help="What the model returns: logits, softmax, sigmoid, probabilities, value or features.",
    ),
]
ModelOutput = Annotated[
    str | None,
    typer.Option(
        "--model-output", help="What the model returns: logits, softmax, sigmoid, probabilities, value or features."
    ),
]
Labels = Annotated[
    Path | None, typer.Option(help="A file of class names: one per line, or JSON (a list, or index to name).")
]
Select = Annotated[str | None, typer.Option(help="The key or position of the output to explain.")]
Mean = Annotated[str | None, typer.Option(help="Mean of each channel, as 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="Standard deviation of each channel, as 0.5,0.5,0.5.")]
Processor = Annotated[Path | None, typer.Option(help="A folder with the preprocessor_config.json to use.")]

OPTIONS: Mapping[str, Any] = {
    "weights": Weights,
    "adapter": Adapter,
    "backbone": Backbone,
    "output": Output,
    "labels": Labels,
    "select": Select,
    "mean": Mean,
    "std": Std,
    "processor": Processor,
}


class GroupedCommand(TyperCommand):
    """A command whose help lists the options that describe the model apart."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the command's own options, then the group."""
        own = [parameter for parameter in self.params if getattr(parameter, "rich_help_panel", None) != PANEL]
        group = [parameter for parameter in self.params if parameter not in own]
        everything, self.params = self.params, own
        try:
            super().format_options(ctx, formatter)
        finally:
            self.params = everything
        records = [record for parameter in group if (record := parameter.get_help_record(ctx)) is not None]
        with formatter.section(PANEL):
            formatter.write_dl(records)


def model_command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command whose parameter ``description`` is filled by the options that describe a model.

    If the command has an option ``--output`` of its own, the model's is ``--model-output`` alone.
    """
    signature = inspect.signature(function)
    taken = set(signature.parameters)
    options = {f"model_{name}" if name in taken else name: name for name in OPTIONS}
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_in_panel(ModelOutput if name == "model_output" else OPTIONS[argument]),
        )
        for name, argument in options.items()
    ]

    @wraps(function)
    def command(**arguments: Any) -> None:
        values = {argument: arguments.pop(name) for name, argument in options.items()}
        function(**arguments, description=description_of(values))

    own = [parameter for name, parameter in signature.parameters.items() if name != "description"]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + added
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(cls=GroupedCommand)(command)
    return function


def description_of(values: Mapping[str, Any]) -> Description:
    """Return the keyword arguments of :func:`vitscope.load` for the options that were passed.

    Raises:
        CallError: ``mean`` or ``std`` are not numbers, or a path cannot be the name of a file.
    """
    from vitscope.cli.output import checked_name, numbers

    description: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Path):
            checked_name(value, f"--{name}")
        description[name] = tuple(map(float, numbers(value, f"--{name}"))) if name in ("mean", "std") else value
    return description


def _in_panel(annotation: Any) -> Any:
    """The annotation of an option, in the group of the help."""
    annotation.__metadata__[0].rich_help_panel = PANEL
    return annotation
