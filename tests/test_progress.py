"""The parameter progress: a bool, or a function that receives each event."""

import io
from typing import Any

import pytest
from rich import console as rich_console

import vitscope as vs
from vitscope import progress as progress_module
from vitscope.progress import Progress, progress_callback


def test_a_function_receives_every_event() -> None:
    steps: list[Progress] = []
    with progress_callback(steps.append) as report:
        report(Progress("evaluating", 1, 3))
        report(Progress("evaluating", 3, 3, {"accuracy": 0.5}))
    assert [(step.completed, step.total, dict(step.metrics)) for step in steps] == [
        (1, 3, {}),
        (3, 3, {"accuracy": 0.5}),
    ]


@pytest.mark.parametrize("progress", [False, None])
def test_no_progress_prints_nothing(progress: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_callback(progress) as report:
        report(Progress("evaluating", 1, 2))
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """Replace rich's console by one that is a terminal, a notebook or neither; return what is written to it."""
    stream = io.StringIO()

    class Console(rich_console.Console):
        def __init__(self, **_: Any) -> None:
            terminal, notebook = request.param == "terminal", request.param == "notebook"
            super().__init__(file=stream, force_terminal=terminal, force_jupyter=notebook, width=80)

    monkeypatch.setattr(rich_console, "Console", Console)
    return stream


@pytest.mark.parametrize("console", ["terminal"], indirect=True)
def test_true_shows_a_bar_on_a_terminal(console: io.StringIO) -> None:
    with progress_callback(True) as report:
        report(Progress("evaluating masks", 1, 2))
    assert "evaluating masks" in console.getvalue()


@pytest.mark.parametrize("console", ["log"], indirect=True)
def test_true_writes_a_line_now_and_then_to_a_log(
    console: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, 10.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))
    with progress_callback(True) as report:
        for completed in (1, 2, 3):
            report(Progress("evaluating masks", completed * 1000, 5000))
        report(Progress("training", 7, None))
    assert capsys.readouterr() == ("", "evaluating masks: 2,000 of 5,000\ntraining: 7\n")
    assert console.getvalue() == ""


@pytest.mark.parametrize("console", ["notebook"], indirect=True)
def test_true_shows_a_bar_in_a_notebook(console: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_callback(True) as report:
        report(Progress("reading", 1, None))
        report(Progress("evaluating masks", 1, 2))
        report(Progress("evaluating masks", 2, 2))
        report(Progress("again", 1, 2))
    error = capsys.readouterr().err
    assert "%|" in error
    assert "evaluating masks:" in error
    assert "again:" in error
    assert console.getvalue() == ""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("progress", [1, "yes", 0.5, []])
def test_other_values_are_refused(progress: Any) -> None:
    with (
        pytest.raises(vs.CallError, match=r"^progress is .*: pass True, False, or a function"),
        progress_callback(progress),
    ):
        pass
