"""The command line: parse, call, print. Heavy libraries are loaded by the commands, not by ``--help``."""

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C ends in one line, also during the imports."""
    try:
        from vitscope.cli.commands import run
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("vitscope: interrupted; finished results are kept\n")
        sys.exit(1)
    run()
