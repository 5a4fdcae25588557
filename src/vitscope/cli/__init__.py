"""The command line: parse, call, print. Heavy libraries are loaded by the commands, not by ``--help``."""

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; also Ctrl-C while it is still being imported ends in one line."""
    try:
        from vitscope.cli import asking, composing, explaining, reading, tuning  # noqa: F401 (the commands)
        from vitscope.cli.app import run
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("vitscope: interrupted; what was finished before is kept\n")
        sys.exit(1)
    run()
