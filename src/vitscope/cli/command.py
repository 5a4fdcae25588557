"""The class of all commands: sections and examples in the help, and options that are passed twice."""

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from vitscope.cli.examples import EXAMPLES
from vitscope.cli.options import FIGURE_PANEL, MODEL_PANEL
from vitscope.errors import CallError

PANELS = (FIGURE_PANEL, MODEL_PANEL)
# Spellings from before the table of options, by command. They are still understood, but no help lists them.
EARLIER: Mapping[str, Mapping[str, str]] = {
    "heads": {"--method": "--by"},
    "compose": {"--recipe": "--annotations"},
    "compare": {"--models": "--model", "--tunings": "--tuning"},
}
# Spellings that mean something else today.
REPLACED: Mapping[str, Mapping[str, str]] = {
    "attention": {"--output": "--model-output"},
    "rollout": {"--output": "--model-output"},
    "registers": {"--output": "--model-output"},
    "finetune": {"-t": "--tuning"},
    "compare": {"-t": "--tuning"},
}


class Command(TyperCommand):
    """A command whose help ends with the sections of the figure and of the model, and with examples."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; refuse an option that was passed twice but takes one value."""
        if not ctx.resilient_parsing:
            args = _in_todays_words(str(self.name), args)
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in order:
                is_single = not (getattr(parameter, "multiple", True) or getattr(parameter, "is_flag", False))
                if is_single and order.count(parameter) > 1:
                    raise CallError(
                        f"{parameter.opts[0]} was passed {order.count(parameter)} times: {self.name} takes one"
                    )
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, with a section for each panel at the end."""
        parameters = self.params
        by_panel = {panel: [p for p in parameters if getattr(p, "rich_help_panel", None) == panel] for panel in PANELS}
        self.params = [p for p in parameters if getattr(p, "rich_help_panel", None) not in PANELS]
        try:
            super().format_options(ctx, formatter)
        finally:
            self.params = parameters
        for panel, members in by_panel.items():
            records = [record for member in members if (record := member.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002, click's signature
        """Write the examples, which are never broken into lines."""
        with formatter.section("Examples"):
            for example in EXAMPLES[str(self.name)]:
                formatter.write(f"{'':>{formatter.current_indent}}vitscope {self.name} {example}".rstrip() + "\n")


def _in_todays_words(command: str, args: Sequence[str]) -> list[str]:
    """Return the arguments with today's names of options.

    Raises:
        CallError: an option has another meaning today.
    """
    end = args.index("--") if "--" in args else len(args)
    words = []
    for word in args[:end]:
        name, equals, value = word.partition("=")
        if name in REPLACED.get(command, {}):
            raise CallError(f"{command} has no {name}: pass {REPLACED[command][name]}")
        words.append(EARLIER.get(command, {}).get(name, name) + equals + value)
    return [*words, *args[end:]]
