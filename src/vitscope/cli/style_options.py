"""The decorator that adds to a command the options for the style of its figures."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

STYLE_OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "dpi": (
        Annotated[float | None, typer.Option("--dpi", help="Pixels per inch.", show_default="160")],
        None,
    ),
    "width": (
        Annotated[
            float | None,
            typer.Option("--width", help="Width of the figure in inches; letters scale.", show_default="natural"),
        ],
        None,
    ),
    "cmap": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--cmap",
                help="Colour map of matplotlib: sequential, or diverging for signed maps. May be repeated.",
                show_default="inferno and RdBu_r",
            ),
        ],
        None,
    ),
    "no_title": (
        Annotated[bool, typer.Option("--no-title", help="Leave out the title and the lines below it.")],
        False,
    ),
}


def drawing(function: Callable[..., None]) -> Callable[..., None]:
    """Fill the parameter ``style`` of a command from the options --dpi, --width, --cmap and --no-title."""
    signature = inspect.signature(function)

    @wraps(function)
    def command(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in STYLE_OPTIONS}
        from vitscope.views.style import style_of

        style = style_of(values["dpi"], values["width"], values["cmap"], title=not values["no_title"])
        function(**arguments, style=style)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in STYLE_OPTIONS.items()
    ]
    declared = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "style"
    ]
    command.__signature__ = signature.replace(parameters=[*declared, *added])  # type: ignore[attr-defined]
    return command
