"""The command line: parse, call, print. Heavy libraries are loaded by the commands, not by ``--help``."""

from vitscope.cli import asking, composing, explaining, reading, tuning  # noqa: F401 (the commands)
from vitscope.cli.app import main as main
