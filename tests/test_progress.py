"""The parameter progress: a bool, or a function that receives each event."""

import io
from typing import Any

import pytest
from rich import console as rich_console

import vitscope as vs
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


@pytest.mark.parametrize("terminal", [True, False])
def test_true_shows_a_bar_only_on_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()

    class Console(rich_console.Console):
        def __init__(self, **_: Any) -> None:
            super().__init__(file=stream, force_terminal=terminal, width=80)

    monkeypatch.setattr(rich_console, "Console", Console)
    with progress_callback(True) as report:
        report(Progress("evaluating masks", 1, 2))
    assert ("evaluating masks" in stream.getvalue()) is terminal


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("progress", [1, "yes", 0.5, []])
def test_other_values_are_refused(progress: Any) -> None:
    with (
        pytest.raises(vs.CallError, match=r"^progress is .*: pass True, False, or a function"),
        progress_callback(progress),
    ):
        pass
