"""Options that describe a model: every command that takes one model passes them to vitscope.load, if they are set."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
import vitscope.models
from tests.helpers.command_line import call, needs_bundled, printed_results
from vitscope.cli.inputs import load_model

pytestmark = needs_bundled

COMMANDS = {
    "explain": ["explain", "cat.png"],
    "attention": ["attention", "cat.png"],
    "rollout": ["rollout", "cat.png"],
    "heads": ["heads", "cat.png", "--method", "gradient"],
    "lime": ["lime", "cat.png", "-n", "30", "--segments", "patches"],
    "compose": ["compose", "cat.png", "--object", "5,5,20,20", "--test", "none", "--no-attention"],
}
OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "random weights": (["--no-pretrained"], {"pretrained": False}),
    "weights": (["--weights", "w.pth"], {"weights": Path("w.pth")}),
    "adapter": (["--adapter", "lora"], {"adapter": Path("lora")}),
    "backbone": (["--backbone", "model.encoder"], {"backbone": "model.encoder"}),
    "output": (["--model-output", "sigmoid"], {"output": "sigmoid"}),
    "labels": (["--labels", "names.txt"], {"labels": Path("names.txt")}),
    "select": (["--select", "logits"], {"select": "logits"}),
    "mean and std": (["--mean", "0.5,0.25,1", "--std", "0.5"], {"mean": (0.5, 0.25, 1.0), "std": (0.5,)}),
    "processor": (["--processor", "folder"], {"processor": Path("folder")}),
    "tokenizer": (["--tokenizer", "folder"], {"tokenizer": Path("folder")}),
    "none": ([], {}),
}


@pytest.fixture(name="photo", autouse=True)
def small_photo_in_an_empty_folder(tmp_path: Path, chelsea: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).resize((64, 48)).save("cat.png")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return a list of the arguments of every call of load, without device and image_size."""
    calls: list[tuple[str, dict[str, Any]]] = []
    model = vs.load("vit-nano")

    def load(name: str, **arguments: Any) -> vs.VisionModel:
        calls.append((name, {key: value for key, value in arguments.items() if key not in ("device", "image_size")}))
        return dataclasses.replace(model, name=f"{name} {len(calls)}")

    monkeypatch.setattr(vitscope.models, "load", load)
    return calls


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_options_reach_load(
    loaded: list[Any],
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    options: list[str],
    expected: Any,
) -> None:
    code, _, err = call(capsys, monkeypatch, *command, *options)
    assert code == 0, err
    assert loaded == [("vit-nano", expected)]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["explain", "attention", "rollout"])
def test_the_output_of_the_model_has_its_own_option(
    loaded: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert call(capsys, monkeypatch, *COMMANDS[command], "--model-output", "sigmoid")[0] == 0
    assert loaded == [("vit-nano", {"output": "sigmoid"})]
    code, _, err = call(capsys, monkeypatch, *COMMANDS[command], "--output", "sigmoid")
    assert (code, err.count("\n")) == (2, 1)
    assert "--model-output" in err or "probability" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["lime", "compose"])
def test_only_the_first_of_several_models_is_described(
    loaded: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    options = ["--output", "logit", "--model-output", "softmax", "--compare", "swin-nano"]
    code, _, err = call(capsys, monkeypatch, *COMMANDS[command], *options)
    assert code == 0, err
    assert loaded == [("vit-nano", {"output": "softmax"}), ("swin-nano", {})]


@pytest.mark.parametrize("text", ["grey", "0.5;0.5", "", "0.5,,0.5"])
def test_channels_that_are_not_numbers_are_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    code, out, err = call(capsys, monkeypatch, "explain", "cat.png", "--mean", text)
    assert (code, out) == (2, "")
    assert err == f"vitscope: --mean is {text!r}: pass numbers separated by commas\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_lists_them_in_their_own_section(capsys: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    code, out, _ = call(capsys, monkeypatch, command, "--help")
    general, section = out.split("Describe the model:\n")
    assert code == 0
    for name in ("weights", "adapter", "backbone", "labels", "select", "mean", "std", "processor", "tokenizer"):
        assert f"--{name} " in section
        assert f"--{name} " not in general
    assert "--model-output" in section
    assert "--device" in general


@pytest.mark.slow
def test_a_model_that_predicts_values_has_no_bars(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    regression = dataclasses.replace(vs.load("vit-nano"), output="value")
    monkeypatch.setattr(vitscope.models, "load", lambda *_, **__: regression)
    value = regression.predict("cat.png")[0][0].value
    code, out, err = call(capsys, monkeypatch, "explain", "cat.png", "--top-k", "1")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == ["output", "value"]
    assert out.splitlines()[2].split() == ["cat", f"{value:.4g}"]
    assert "%" not in out
    _, out, _ = call(capsys, monkeypatch, "explain", "cat.png", "--json")
    first = printed_results(out)[0]["predictions"][0]
    assert (first["probability"], first["value"]) == (None, pytest.approx(value))


@pytest.mark.slow
@pytest.mark.parametrize("methods", [[], ["--method", "rollout", "--method", "attention"]], ids=["all", "methods"])
def test_a_model_whose_classes_are_unclear_is_still_explained(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, methods: list[str]
) -> None:
    from vitscope.errors import UnclearOutputError
    from vitscope.explanation import explain

    def refuse(*_: Any, **__: Any) -> Any:
        raise UnclearOutputError("M returns several outputs: pass select= to vitscope.load")

    def run_without_logits(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(run_and_capture(*arguments, **options), logits=None)

    run_and_capture = explain.run_and_capture
    monkeypatch.setattr(explain, "run_and_capture", run_without_logits)
    monkeypatch.setattr(vs.VisionModel, "predict", refuse)
    code, out, err = call(capsys, monkeypatch, "explain", "cat.png", *methods)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "  M returns several outputs: pass select= to vitscope.load"
    assert Path("cat-explain.png").exists()
    _, out, _ = call(capsys, monkeypatch, "explain", "cat.png", "--json", *methods)
    assert printed_results(out)[0]["no_classes"] == "M returns several outputs: pass select= to vitscope.load"


def test_random_weights_are_the_same_in_every_run_and_leave_the_generator_alone() -> None:
    pytest.importorskip("timm")
    weights = []
    with torch.random.fork_rng(devices=()):
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            model = load_model("timm:test_vit", None, description={"pretrained": False})
            weights.append(dict(model.module.named_parameters())["head.weight"])
            assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*weights)


# The pixels of the photos

WINDOWED = [COMMANDS["attention"], COMMANDS["compose"]]


@pytest.mark.slow
@pytest.mark.parametrize("command", WINDOWED, ids=lambda command: command[0])
def test_a_window_reaches_the_photos_of_a_command(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    pixels = np.asarray(Image.open("cat.png").convert("L"))
    Path("figures").mkdir()
    options = [*command, "--json", "--overwrite", "--out", "figures"]
    Image.fromarray(pixels).save("cat.png")
    _, expected, _ = call(capsys, monkeypatch, *options)
    Image.fromarray(pixels.astype(np.uint16) * 16).save("cat.png")
    code, out, err = call(capsys, monkeypatch, *options, "--window", "0,4080")
    assert (code, err) == (0, "")
    assert out.replace(" (window 0 to 4080)", "") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["explain", "cat.png", "--window", "0"], "window is [0]: two numbers are expected"),
        (["explain", "cat.png", "--window", "a,b"], "--window is 'a,b': pass numbers separated by commas"),
        (["explain", "cat.png", "--window", "-160,240"], "window is for grey pixels, and cat.png is of mode RGB"),
        (["rollout", "cat.png", "--slice", "3"], "slice is 3, but cat.png is a single image: leave it out"),
        (
            ["compose", "--annotations", "r.toml", "--slice", "3"],
            "--window and --slice apply to the photos of the command",
        ),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_an_impossible_window_or_slice_is_one_line(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    code, out, err = call(capsys, monkeypatch, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
