"""The decorator that adds to a command the options for the style of its figures."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

from vitscope.cli.options import option

STYLE_OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "no_figure": (Annotated[bool, option("--no-figure")], False),
    "dpi": (Annotated[float | None, option("--dpi", default="160")], None),
    "width": (Annotated[float | None, option("--width", default="natural")], None),
    "cmap": (Annotated[list[str] | None, option("--cmap", default="inferno and RdBu_r", several=True)], None),
    "no_title": (Annotated[bool, option("--no-title")], False),
}


def drawing(function: Callable[..., None]) -> Callable[..., None]:
    """Fill the parameter ``style`` of a command from the options --dpi, --width, --cmap and --no-title.

    With --no-figure it is None: the command draws no figure.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def command(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in STYLE_OPTIONS}
        from vitscope.views.style import style_of

        style = style_of(values["dpi"], values["width"], values["cmap"], title=not values["no_title"])
        function(**arguments, style=None if values["no_figure"] else style)

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
