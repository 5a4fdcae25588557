"""Completion in the shell: methods, models, tuning methods and labels, without importing torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitscope
from tests.helpers.command_line import needs_bundled
from vitscope.cli.completion import methods_for, models_for, tunings_for
from vitscope.methods.registry import METHODS
from vitscope.models import BUNDLED
from vitscope.tune.methods import TUNING_METHODS


def test_methods_and_tunings_are_those_of_the_registries():
    assert methods_for("") == [(name, method.summary) for name, method in METHODS.items()]
    assert tunings_for("") == [(name, method.description) for name, method in TUNING_METHODS.items()]


def test_the_last_item_of_a_list_is_completed():
    assert [value for value, _ in methods_for("libra,attn")] == ["libra,attn_lrp"]
    assert [value for value, _ in tunings_for("head,lora,h")] == [], "head was passed"


@needs_bundled
def test_models_are_bundled_downloaded_or_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub/models--facebook--dinov2-small").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").touch()
    values = [value for value, _ in models_for("")]
    assert set(values) == {*BUNDLED, "timm:", "torchvision:", "facebook/dinov2-small", "run"}
    assert [value for value, _ in models_for("run,vit")] == ["run,vit-nano"]


@pytest.mark.slow
@needs_bundled
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vitscope explain photo.png --method grad", ["grad_cam", "gradient_rollout"]),
        ("vitscope compare data --tuning lo", ["lora"]),
        ("vitscope explain photo.png --model swin", ["swin-nano"]),
        ("vitscope heads photo.png --model vit-nano --target d", ["deer", "dog"]),
        ("vitscope rollout photo.png --no-f", ["--no-figure"]),
    ],
)
def test_the_shell_completes_values(tmp_path, words, expected):
    script = tmp_path / "vitscope"
    script.write_text(
        "import sys\nfrom vitscope.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    completing = {"_VITSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {**os.environ, "PYTHONPATH": str(Path(vitscope.__file__).parents[1]), **completing}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (sorted(result.stdout.split()), result.stderr) == (expected, "")
