"""The decorator that adds to a command the options that describe its model and the pixels of its photos."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from vitscope.cli import options
from vitscope.cli.app import register
from vitscope.cli.inputs import check_file_name, parse_numbers

Description = Mapping[str, Any]  # keyword arguments of vitscope.load

# Argument of vitscope.load: its option.
OPTIONS: Mapping[str, Any] = {
    "pretrained": options.Pretrained,
    "weights": options.Weights,
    "adapter": options.Adapter,
    "backbone": options.Backbone,
    "output": options.Output,
    "labels": options.Labels,
    "select": options.Select,
    "mean": options.Mean,
    "std": options.Std,
    "processor": options.Processor,
    "tokenizer": options.Tokenizer,
}
# Options of commands with photos.
PIXEL_OPTIONS: Mapping[str, Any] = {"window": options.Window, "slice": options.Slice}


class GroupedCommand(TyperCommand):
    """A command whose help lists the options that describe the model in their own section."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the command's options, then the section of the model."""
        all_parameters = self.params
        described = [p for p in all_parameters if getattr(p, "rich_help_panel", None) == options.MODEL_PANEL]
        self.params = [parameter for parameter in all_parameters if parameter not in described]
        try:
            super().format_options(ctx, formatter)
        finally:
            self.params = all_parameters
        records = [record for parameter in described if (record := parameter.get_help_record(ctx)) is not None]
        with formatter.section(options.MODEL_PANEL):
            formatter.write_dl(records)


def model_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command, and fill its parameter ``description`` from the options that describe a model.

    If it has a parameter ``photos``, these are files, folders and globs, to which the options --window and --slice
    apply. If the command has an
    option ``--output`` itself, the model's is ``--model-output`` only.
    """
    signature = inspect.signature(function)
    names = {f"model_{name}" if name in signature.parameters else name: name for name in OPTIONS}
    added = [
        inspect.Parameter(
            option,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=options.ModelOutput if option == "model_output" else OPTIONS[argument],
        )
        for option, argument in names.items()
    ]
    pixel_options = PIXEL_OPTIONS if "photos" in signature.parameters else {}
    added += [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for option, annotation in pixel_options.items()
    ]

    @wraps(function)
    def command(**arguments: Any) -> None:
        values = {argument: arguments.pop(option) for option, argument in names.items()}
        if pixel_options:
            from vitscope.cli.photos import photo_files  # imports numpy, which the help does not need

            arguments["photos"] = photo_files(arguments["photos"], arguments.pop("window"), arguments.pop("slice"))
        function(**arguments, description=description_of(values))

    declared = [parameter for name, parameter in signature.parameters.items() if name != "description"]
    register(command, [*declared, *added], GroupedCommand)
    return function


def description_of(values: Mapping[str, Any]) -> Description:
    """Return the keyword arguments of :func:`vitscope.load` for the options that were passed.

    Raises:
        CallError: ``mean`` or ``std`` are not numbers, or a path is not a possible file name.
    """
    description: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, Path):
            check_file_name(value, f"--{name}")
        description[name] = tuple(map(float, parse_numbers(value, f"--{name}"))) if name in ("mean", "std") else value
    return description
