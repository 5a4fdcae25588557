"""The command line's frame: options that commands share, and errors as one line with an exit code."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from vitscope.cli.terminal import safe_stderr, safe_stdout, say
from vitscope.errors import VitscopeError, VitscopeWarning

DEBUG_VARIABLE = "VITSCOPE_DEBUG"
WHOLE = 1000  # characters of a summary: none is cut off
INTERRUPTED = 130  # what the command line parser makes of Ctrl-C

# In the order in which a newcomer needs them.
COMMANDS = {
    "Start here": ("demo", "explain"),
    "Attention": ("attention", "rollout"),
    "Hiding and moving": ("lime", "compose"),
    "Training": ("data", "finetune", "compare"),
    "Lists": ("models", "methods"),
}


class CommandGroup(TyperGroup):
    """The commands, in groups."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002, as click calls it
        """Return the names of the commands, in the order of the groups."""
        return [name for names in COMMANDS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write one section per group, each command with its whole summary."""
        for title, names in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(WHOLE)) for name in names])


app = typer.Typer(
    help="See what a vision transformer looks at.",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Photos = Annotated[list[Path], typer.Argument(help="One or more photos.", metavar="PHOTO...", show_default=False)]
ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="vit-nano, swin-nano, a hub id, a folder or tuned run, timm:<name>, torchvision:<name>."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The PNG to write; for several photos a folder.", show_default="a new name"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Allow --out to replace a file.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, …", show_default="cuda if there is one")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="How many classes to list.")]
QueryText = Annotated[str, typer.Option("--query", help="readout, cls, register_1, …, or a patch as row,column.")]

Examples = Annotated[
    Path | None,
    typer.Option(help="Classes by example, for a model without a classifier: a folder with a folder for each class."),
]
Compared = Annotated[
    list[str] | None, typer.Option("--compare", help="Another model to set beside the first; may be repeated.")
]
Target = Annotated[
    str | None,
    typer.Option("--target", "-t", help="The class, by label or index.", show_default="the likeliest"),
]


def run() -> NoReturn:
    """Run a command; every error is one line on stderr, with exit code 1 (work) or 2 (call)."""
    with safe_stderr():
        try:
            with safe_stdout(), warnings.catch_warnings():
                warnings.simplefilter("always", VitscopeWarning)
                warnings.showwarning = _one_line
                code = app(standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            sys.exit(code if isinstance(code, int) else 0)
        except VitscopeError as error:
            _fail(str(error), error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            _fail("interrupted; finished results are kept", 1)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            _fail(*_unforeseen(error))


def _unforeseen(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error that is not vitscope's own."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(error), err=True)
        sys.exit(2)
    if hasattr(error, "format_message"):  # what the parser of the command line raises
        return error.format_message().replace("\n\t", " "), 2
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first} (set {DEBUG_VARIABLE}=1 for the whole story)", 1


def _fail(message: str, code: int) -> NoReturn:
    say(f"vitscope: {message}", err=True)
    sys.exit(code)


_shown_by_python = warnings.showwarning


def _one_line(message: Any, category: Any, *where: Any, **options: Any) -> None:
    """vitscope's own warnings as one line; others as Python shows them."""
    if issubclass(category, VitscopeWarning):
        say(f"vitscope: {message}", err=True)
    else:
        _shown_by_python(message, category, *where, **options)
