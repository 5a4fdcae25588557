"""Calls of the command line, in this process and in a new one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope
from vitscope import cli
from vitscope.models import bundled_path

needs_bundled = pytest.mark.skipif(not (bundled_path("vit-nano") / "config.json").exists(), reason="no bundled model")


@pytest.fixture(name="photo")
def photo_in_an_empty_folder(tmp_path: Path, chelsea: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> str:
    """Change to an empty folder that holds a photo, and return its name."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).save("cat.png")
    return "cat.png"


def call(capsys: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["vitscope", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def printed_results(out: str) -> Any:
    """Return the results that ``--json`` printed, and check the shape that all commands share."""
    document = json.loads(out, parse_constant=pytest.fail, parse_float=_number)
    assert list(document) == ["schema", "command", "version", "results"]
    assert (document["schema"], document["version"]) == (1, vitscope.__version__)
    assert isinstance(document["results"], list)
    return document["results"]


def _number(text: str) -> float:
    """Return a number, and check that it has at most nine significant digits."""
    digits = text.lower().partition("e")[0].replace(".", "").lstrip("-0").rstrip("0")
    assert len(digits) <= 9, text
    return float(text)


def process(*arguments: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess:
    """Run a call in a new process; its output is bytes."""
    source = str(Path(vitscope.__file__).parents[1])
    settings = {**os.environ, "PYTHONPATH": source, **(environment or {})}
    command = [sys.executable, "-m", "vitscope.cli", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=settings, check=False, timeout=300, **streams)
