"""The command line. Heavy libraries are imported by the commands, so that ``--help`` is fast."""

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit. Ctrl-C prints one line, even during the imports."""
    try:
        from vitscope.cli.commands import run
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("vitscope: interrupted; finished results are kept\n")
        sys.exit(1)
    run()
