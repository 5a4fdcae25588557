"""The command line app: commands in groups, and every error as one line with an exit code."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from vitscope.cli.command import Command
from vitscope.cli.terminal import safe_stderr, safe_stdout, say
from vitscope.errors import VitscopeError, VitscopeWarning, quoted_error

DEBUG_VARIABLE = "VITSCOPE_DEBUG"
LONGEST_SUMMARY = 1000  # characters; no summary is cut off
INTERRUPTED = 130  # the exit code that the parser returns after Ctrl-C

# In the order in which a newcomer needs them.
COMMANDS = {
    "Start here": ("demo", "explain"),
    "Attention": ("attention", "rollout", "heads", "registers"),
    "Change the image": ("lime", "compose"),
    "Training": ("data", "finetune", "compare"),
    "Lists": ("models", "methods"),
}


class CommandGroup(TyperGroup):
    """All commands, listed in groups."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002, click's signature
        """Return the names of the commands, in the order of the groups."""
        return [name for names in COMMANDS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write one section per group, with the full summary of each command."""
        for title, names in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(LONGEST_SUMMARY)) for name in names])


app = typer.Typer(
    help="See what a vision transformer looks at.",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(version: bool) -> bool:
    """Print the version and end the program if ``--version`` was passed."""
    if version:
        from importlib.metadata import version as installed_version

        say(f"vitscope {installed_version('vitscope')}")
        raise typer.Exit
    return version


@app.callback()
def vitscope(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """See what a vision transformer looks at."""


def register(command: Callable[..., None], parameters: Sequence[Parameter] | None = None) -> None:
    """Add a command whose arguments and options are ``parameters``; None for those of its signature."""
    if parameters is None:
        parameters = list(signature(command).parameters.values())
    keywords = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = signature(command).replace(parameters=keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    app.command(cls=Command)(command)


def run() -> NoReturn:
    """Run the command in ``sys.argv`` and exit.

    An error is one line on stderr. The exit code is 2 if the call was wrong and 1 if the work failed.
    """
    with safe_stderr():
        try:
            with safe_stdout(), warnings.catch_warnings():
                warnings.simplefilter("always", VitscopeWarning)
                warnings.showwarning = _show_warning
                code = app(standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            sys.exit(code if isinstance(code, int) else 0)
        except VitscopeError as error:
            # Messages are written for Python; this option is the only one that they name.
            _fail(str(error).replace("output='probability'", "--output probability"), error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            _fail("interrupted; finished results are kept", 1)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            _fail(*_message_and_code(error))


def _message_and_code(error: Exception) -> tuple[str, int]:
    """Return the line and the exit code for an error that vitscope did not raise itself."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(error), err=True)
        sys.exit(2)
    if hasattr(error, "format_message"):  # raised by the command line parser
        return error.format_message().replace("\n\t", " "), 2
    return f"{quoted_error(error)} (set {DEBUG_VARIABLE}=1 to see the traceback)", 1


def _fail(message: str, code: int) -> NoReturn:
    say(f"vitscope: {message}", err=True)
    sys.exit(code)


_show_as_python_does = warnings.showwarning


def _show_warning(message: Any, category: Any, *location: Any, **options: Any) -> None:
    """Print vitscope's own warnings as one line, and others as Python does."""
    if issubclass(category, VitscopeWarning):
        say(f"vitscope: {message}", err=True)
    else:
        _show_as_python_does(message, category, *location, **options)
