"""The commands that train, called wrongly or interrupted: one line, an exit code, and nothing is lost."""

from typing import Any

import pytest

from tests.cli.test_app import needs_bundled, run
from tests.cli.test_finetune import (
    QUICK,
    empty_folder,  # noqa: F401, a fixture
    epochs,
    files,
    folder_of_images,
    forbid_training,
    skip_drawing,
)
from tests.helpers.coloured import coloured_folder

pytestmark = [needs_bundled, pytest.mark.usefixtures("quick_comparisons", "coarse_figures")]
birds = folder_of_images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected_code", "expected"),
    [
        (["data", "nowhere"], 2, "nowhere is not a folder of images"),
        (["data", "empty"], 2, "empty/blue holds no images"),
        (["data", "one"], 2, "one has only one class, 'red'"),
        (["data", "flat"], 2, "flat holds no folders"),
        (["data", "birds", "--out", "taken"], 2, "taken exists already"),
        (["data", "birds", "--test-share", "2"], 2, "test_share is 2"),
        (["data", "birds", "--threshold", "-1"], 2, "threshold is -1"),
        (["data", "birds", "--per-class", "0"], 2, "per_class is 0"),
        (["finetune", "nowhere"], 2, "nowhere is not a folder of images"),
        (["finetune", "one"], 2, "only one class"),
        (["finetune", "empty"], 2, "holds no images"),
        (["finetune", "nowhere", "--model", "no/where", "--tuning", "hed"], 2, "unknown tuning"),
        (["finetune", "birds", "--tuning", "hed"], 2, "unknown tuning 'hed': did you mean head?"),
        (["finetune", "birds", "--recipe", "olden"], 2, "unknown recipe 'olden': choose report, modern"),
        (["finetune", "birds", "--recipe", "none.toml"], 2, "none.toml does not exist"),
        (["finetune", "birds", "--out", "taken"], 2, "taken holds something other than a run"),
        (["finetune", "birds", "--epochs", "0"], 2, "epochs is 0"),
        (["finetune", "birds", "--rank", "4"], 2, "head has no rank"),
        (["finetune", "birds", "--early-stop", "0"], 2, "early_stop is 0"),
        (["finetune", "birds", "--save-steps", "0"], 2, "save_steps is 0"),
        (["finetune", "birds", "--model", "vit-nanoo"], 2, "did you mean 'vit-nano'"),
        (["finetune", "birds", "--unreadable", "eat"], 2, "eat"),
        (["finetune", "birds", "--precision", "int4"], 2, "int4"),
        (["finetune"], 2, "DATA"),
        (["compare", "nowhere"], 2, "nowhere is not a folder of images"),
        (["compare", "one"], 2, "only one class"),
        (["compare", "birds", "--out", "taken"], 2, "taken holds something other than a comparison"),
        (["compare", "birds", "--tunings", "head,lore"], 2, "unknown tuning 'lore': did you mean lora?"),
        (["compare", "birds", "--models", "vit-nano,vit-nano"], 2, "two models have the same name, vit-nano"),
        (["compare", "birds", "--models", ","], 2, "is no list: pass a name"),
        (["compare", "birds", "--seeds", "0"], 2, "seeds is 0"),
        (["compare", "birds", "--recipe", "olden"], 2, "unknown recipe 'olden'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("birds")
def test_a_mistake_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, expected_code, expected):
    coloured_folder(tmp_path / "one", {"red": 3})
    coloured_folder(tmp_path / "empty", {"red": 3, "blue": 0})
    (tmp_path / "flat").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("precious")
    before = files(tmp_path)
    forbid_training(monkeypatch)
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (expected_code, "")
    assert err.startswith("vitscope: ")
    assert err.count("\n") == 1
    assert expected in err
    assert files(tmp_path) == before


@pytest.mark.slow
@pytest.mark.usefixtures("birds")
def test_ctrl_c_is_one_line_and_the_same_call_resumes(tmp_path, capsys, monkeypatch):
    from vitscope.tune import trainer

    call = ("compare", "birds", *QUICK, "--models", "vit-nano", "--tunings", "head,layernorm", "--seeds", "1")
    save = trainer.Trainer._save_checkpoint

    def save_or_interrupt(self: Any, *arguments: Any) -> None:
        if (tmp_path / "birds-comparison/cells/vit-nano-layernorm-0").exists():
            raise KeyboardInterrupt
        save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_save_checkpoint", save_or_interrupt)
        code, out, err = run(capsys, patched, *call)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "vitscope: interrupted: run the same command again to resume"
    assert all(line.startswith("vit-nano, ") for line in err.splitlines()[:-1])
    finished = tmp_path / "birds-comparison/cells/vit-nano-head-0/cell.json"
    before = finished.stat().st_mtime_ns
    monkeypatch.setenv("COLUMNS", "80")
    skip_drawing(monkeypatch)
    code, out, err = run(capsys, monkeypatch, *call)
    assert (code, epochs(err)) == (0, ["vit-nano, layernorm, seed 0: step 2 of 2"])
    (header,) = (line for line in out.splitlines() if "accuracy" in line)
    assert header.split() == ["model", "tuning", "accuracy", "95", "%", "interval", "macro", "F1"]
    assert all(len(line) <= 80 for line in out.splitlines()), "a row fits one line in a narrow terminal"
    assert finished.stat().st_mtime_ns == before
    assert (tmp_path / "birds-comparison/report.html").is_file()


@pytest.mark.parametrize("command", ["data", "finetune", "compare"])
def test_help_lists_arguments_and_options(capsys, monkeypatch, command):
    code, out, err = run(capsys, monkeypatch, command, "--help")
    assert (code, err) == (0, "")
    for words in ("DATA", "--out", "--json", "--per-class"):
        assert words in out
