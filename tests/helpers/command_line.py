"""Calls of the command line, in this process and in a new one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vitscope
from vitscope import cli


def call(capsys: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["vitscope", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def process(*arguments: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess:
    """Run a call in a new process; its output is bytes."""
    source = str(Path(vitscope.__file__).parents[1])
    settings = {**os.environ, "PYTHONPATH": source, **(environment or {})}
    command = [sys.executable, "-m", "vitscope.cli", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=settings, check=False, timeout=300, **streams)
