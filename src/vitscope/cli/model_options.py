"""The decorator that adds to a command the options that describe its model and the pixels of its photos."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from vitscope.cli import options
from vitscope.cli.app import register
from vitscope.cli.inputs import check_file_name, parse_numbers
from vitscope.cli.options import option

Description = Mapping[str, Any]  # keyword arguments of vitscope.load, and the examples

# Argument of vitscope.load: its option. --examples makes a classifier of the loaded model.
OPTIONS: Mapping[str, Any] = {
    "image_size": options.ImageSize,
    "examples": Annotated[Path | None, option("--examples")],
    "pretrained": Annotated[bool | None, option("--pretrained", default="pretrained")],
    "weights": Annotated[Path | None, option("--weights")],
    "adapter": Annotated[Path | None, option("--adapter")],
    "backbone": Annotated[str | None, option("--backbone")],
    "output": Annotated[str | None, option("--model-output")],
    "labels": Annotated[Path | None, option("--labels")],
    "select": Annotated[str | None, option("--select")],
    "mean": Annotated[str | None, option("--mean")],
    "std": Annotated[str | None, option("--std")],
    "processor": Annotated[Path | None, option("--processor")],
    "tokenizer": Annotated[Path | None, option("--tokenizer")],
}
# Options of commands with photos.
PIXEL_OPTIONS: Mapping[str, Any] = {"window": options.Window, "slice": options.Slice}


def model_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command, and fill its parameter ``description`` from the options that describe a model.

    If it has a parameter ``photos``, these are files, folders and globs, to which the options --window and --slice
    apply.
    """
    signature = inspect.signature(function)
    names = {f"model_{name}" if name == "output" else name: name for name in OPTIONS}
    names = {name: argument for name, argument in names.items() if name not in signature.parameters}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=OPTIONS[argument])
        for name, argument in names.items()
    ]
    pixel_options = PIXEL_OPTIONS if "photos" in signature.parameters else {}
    added += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in pixel_options.items()
    ]

    @wraps(function)
    def command(**arguments: Any) -> None:
        values = {argument: arguments.pop(name) for name, argument in names.items()}
        if pixel_options:
            from vitscope.cli.photos import photo_files  # imports numpy, which the help does not need

            arguments["photos"] = photo_files(arguments["photos"], arguments.pop("window"), arguments.pop("slice"))
        function(**arguments, description=description_of(values))

    declared = [parameter for name, parameter in signature.parameters.items() if name != "description"]
    register(command, [*declared, *added])
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
