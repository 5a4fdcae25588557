"""The frame of the command line: help, exit codes, and one line for every error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import vitscope.cli.commands
from tests.helpers.command_line import call as run
from tests.helpers.command_line import needs_bundled, photo_in_an_empty_folder, process
from vitscope.cli.app import COMMANDS

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
NAMES = [name for names in COMMANDS.values() for name in names]
REGISTERED = typer.main.get_command(vitscope.cli.app.app).commands


def test_every_command_is_listed_in_one_group():
    assert sorted(NAMES) == sorted(REGISTERED)


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_is_one_short_sentence(name):
    summary = REGISTERED[name].get_short_help_str(1000)
    assert summary.endswith(".")
    assert summary[0].isupper()
    assert len(summary) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_described_by_a_sentence(name):
    for parameter in REGISTERED[name].params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *NAMES])
def test_the_help_fits_80_columns(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, monkeypatch, *name.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80


def test_the_help_lists_every_command():
    result = process("--help", text=True)
    assert result.returncode == 0
    for name in NAMES:
        assert f"\n  {name} " in result.stdout


def test_the_help_is_shown_if_there_is_no_command(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch)
    assert code == 2
    assert "Start here:" in out + err


def test_the_shell_completes_commands(tmp_path):
    script = tmp_path / "vitscope"
    script.write_text("from vitscope.cli import main\nmain()\n")
    completing = {"_VITSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "vitscope rol", "COMP_CWORD": "1"}
    source = str(Path(vitscope.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, **completing}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("rollout", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected_code", "words"),
    [
        (["explain", "nowhere.jpg"], 2, "nowhere.jpg does not exist"),
        (["explain", "."], 2, "the folder of the photos"),
        (["explain", "cat.png", "--model", "vit-nanoo"], 2, "did you mean 'vit-nano'"),
        (["explain", "cat.png", "--model", "some/model"], 1, "vit-nano"),
        (["explain", "cat.png", "--out", "figure.jpg"], 2, "end the name in .png"),
        (["explain", "cat.png", "--out", "cat.png/below.png"], 1, "cannot write"),
        (["explain", "cat.png", "cat.png", "--out", "one.png"], 2, "pass a folder"),
        (["explain", "cat.png", "--device", "abacus"], 1, "abacus"),
        (["explain", "cat.png", "--method", "gradcam"], 2, "rollout, attention_flow, lime"),
        (["explain", "cat.png", "--target", "tabby"], 2, "the nearest labels are"),
        (["explain"], 2, "PHOTO"),
        (["attention", "cat.png", "--layer", "6"], 2, "layers 0 to 5"),
        (["attention", "cat.png", "--query", "8,0"], 2, "outside the grid"),
        (["attention", "cat.png", "--query", "register_1"], 2, "unknown query"),
        (["attention", "cat.png", "--query", "a,b"], 2, "unknown query"),
        (["rollout", "cat.png", "--head-fusion", "median"], 2, "median"),
        (["rollout", "cat.png", "--discard-ratio", "1.5"], 2, "between 0 and 1"),
        (["rollout", "cat.png", "--start-layer", "6"], 2, "layers 0 to 5"),
        (["heads", "cat.png", "--target", "tabby"], 2, "the nearest labels are"),
        (["heads", "cat.png", "--method", "taylor"], 2, "taylor"),
        (["heads", "cat.png", "--batch-size", "0"], 2, "at least 1"),
        (["lime", "cat.png", "--target", "tabby"], 2, "the nearest labels are"),
        (["lime", "cat.png", "--num-samples", "many"], 2, "'auto'"),
        (["lime", "cat.png", "--num-samples", "1"], 2, "at least 2"),
        (["lime", "cat.png", "--segments", "squares"], 2, "quickshift, slic, patches"),
        (["lime", "cat.png", "--segments", "none.npy"], 2, "none.npy does not exist"),
        (["lime", "cat.png", "--segments", "cat.png"], 2, "300×451"),
        (["lime", "cat.png", "--hide", "nowhere.png"], 2, "choose mean"),
        (["lime", "cat.png", "--batch-size", "0"], 2, "at least 1"),
        (["lime", "cat.png", "--arrays", "x.csv"], 2, ".safetensors"),
        (["lime", "cat.png", "--compare", "vit-nanoo"], 2, "did you mean"),
        (["frobnicate"], 2, "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("photo")
def test_a_mistake_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, expected_code, words):
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (expected_code, "")
    assert err.startswith("vitscope: ")
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


@pytest.mark.slow
def test_a_model_without_attention_is_one_line(photo, capsys, monkeypatch):
    import vitscope.models

    torchvision = pytest.importorskip("torchvision")
    resnet = vitscope.models.load(torchvision.models.resnet18())
    monkeypatch.setattr(vitscope.models, "load", lambda *_, **__: resnet)
    code, _, err = run(capsys, monkeypatch, "explain", photo)
    assert (code, err.count("\n")) == (2, 1)
    assert "no attention" in err


def test_ctrl_c_is_one_line(photo, capsys, monkeypatch):
    import vitscope.explanation.explain

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vitscope.explanation.explain, "run_and_capture", interrupt)
    code, _, err = run(capsys, monkeypatch, "explain", photo)
    assert (code, err.count("\n")) == (1, 1)
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("message", "line"),
    [("first line\nsecond line", "ZeroDivisionError: first line"), ("", "ZeroDivisionError")],
    ids=["message", "no message"],
)
def test_an_unforeseen_error_is_one_line(photo, capsys, monkeypatch, message, line):
    import vitscope.explanation.explain

    def fail(*_, **__):
        raise ZeroDivisionError(message)

    monkeypatch.setattr(vitscope.explanation.explain, "run_and_capture", fail)
    code, _, err = run(capsys, monkeypatch, "explain", photo)
    assert (code, err) == (1, f"vitscope: {line} (set VITSCOPE_DEBUG=1 to see the traceback)\n")
    monkeypatch.setenv("VITSCOPE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        vitscope.cli.main()


@pytest.mark.slow
def test_a_name_that_looks_like_markup_is_printed_as_it_is(photo, capsys, monkeypatch):
    Path(photo).rename("[old] $x^$ :cat:.png")
    code, out, err = run(capsys, monkeypatch, "explain", "[old] $x^$ :cat:.png")
    assert (code, err) == (0, "")
    assert "[old] $x^$ :cat:.png, as vit-nano" in out
