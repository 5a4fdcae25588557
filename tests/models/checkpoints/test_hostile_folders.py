"""Folders that are damaged or try to run code: a one-line error, and none of their code runs."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers.every_model import LABELS, case
from tests.helpers.tiny import photo, refusal, tiny_vit
from vitscope.errors import CallError, ModelUnavailableError, WorkError
from vitscope.models.backends.libraries import backend
from vitscope.models.backends.transformers import backend as library
from vitscope.models.checkpoints.serialization import save_folder
from vitscope.models.heads import reset_classifier


def configure(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    tiny_vit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tuned_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_folder(reset_classifier(case("timm-vit").model(), LABELS), tmp_path / "tuned", adapters=None, about={})


# Whole files

CONTENTS = {
    "empty": b"",
    "null": b"null",
    "a number": b"5",
    "NaN": b"NaN",
    "text": b'"text"',
    "a list": b"[]",
    "half": b'{"model_type": "vit", ',
    "not UTF-8": b'{"model_type": "v\xff\xfet"}',
    "UTF-16": '{"model_type": "vit"}'.encode("utf-16"),
    "NUL": b"\0" * 40,
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN inside": b'{"model_type": "vit", "layer_norm_eps": NaN}',
}


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
def test_an_invalid_configuration_is_refused_in_one_line(content: str, pretrained: bool, model_folder: Path) -> None:
    (model_folder / "config.json").write_bytes(CONTENTS[content])
    message = refusal(CallError, model_folder, pretrained=pretrained)
    assert message.startswith(f"{model_folder} is not a transformers folder: config.json ")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", CONTENTS)
def test_unreadable_preprocessing_is_refused_in_one_line(content: str, file: str, model_folder: Path) -> None:
    (model_folder / file).write_bytes(CONTENTS[content])
    message = refusal(ModelUnavailableError, model_folder)
    assert message.startswith(f"{model_folder} cannot be loaded: {file} ")
    assert "repair or remove the file" in message


@pytest.mark.parametrize("content", CONTENTS)
def test_an_invalid_manifest_is_refused_in_one_line(content: str, tuned_folder: Path) -> None:
    (tuned_folder / "vitscope.json").write_bytes(CONTENTS[content])
    assert "is not a complete fine-tuned model: vitscope.json " in refusal(ModelUnavailableError, tuned_folder)


def test_folders_instead_of_files_are_refused_in_one_line(model_folder: Path, tuned_folder: Path) -> None:
    (model_folder / "preprocessor_config.json").mkdir()
    assert "preprocessor_config.json is not a regular file" in refusal(ModelUnavailableError, model_folder)
    (model_folder / "preprocessor_config.json").rmdir()
    (model_folder / "model.safetensors").unlink()
    (model_folder / "model.safetensors").mkdir()
    assert "cannot be loaded" in refusal(ModelUnavailableError, model_folder)
    (tuned_folder / "model.safetensors").unlink()
    (tuned_folder / "model.safetensors").mkdir()
    assert "is not a complete fine-tuned model" in refusal(ModelUnavailableError, tuned_folder)


# Single settings

SETTINGS: list[dict[str, Any]] = [
    {"num_hidden_layers": "x"},
    {"num_hidden_layers": None},
    {"num_hidden_layers": -1},
    {"hidden_size": 0},
    {"hidden_size": -8},
    {"num_attention_heads": 0},
    {"num_attention_heads": 5},
    {"patch_size": 0},
    {"patch_size": [8]},
    {"patch_size": "x"},
    {"image_size": 0},
    {"image_size": -32},
    {"image_size": "x"},
    {"num_channels": 0},
    {"hidden_act": "no such"},
    {"hidden_act": 5},
    {"layer_norm_eps": "x"},
    {"qkv_bias": []},
    {"id2label": ["a", "b", "c", "d", "e", "f", "g"]},
    {"id2label": 5},
    {"id2label": {"x": "a"}},
    {"id2label": {"0": "a", "5": "b"}},
    {"id2label": {str(i): None for i in range(7)}},
    {"id2label": {"0": "a"}},
    {"model_type": None},
    {"model_type": 5},
    {"model_type": "no_such_model"},
    {"model_type": "bert"},
    {"architectures": "ViTForImageClassification"},
    {"architectures": 5},
    {"architectures": [None]},
    {"architectures": ["AutoModelForImageClassification"]},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"quantization_config": 5},
    {"dtype": "no such"},
    {"torch_dtype": 5},
    {"attn_implementation": "no such"},
    {"_attn_implementation": "someone/kernel"},
    {"transformers_weights": "elsewhere.safetensors"},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: json.dumps(settings)[:60])
def test_a_damaged_setting_is_refused_in_one_line_or_has_no_effect(
    settings: dict[str, Any], model_folder: Path
) -> None:
    prepared: dict[str, Any] = {"image_size": 32, "mean": 0.5, "std": 0.5}
    expected = vs.load(model_folder, **prepared).predict(photo(32, 32), top_k=7)[0]
    configure(model_folder / "config.json", **settings)
    try:
        outcome: Any = vs.load(model_folder, **prepared).predict(photo(32, 32), top_k=7)[0]
    except (WorkError, CallError) as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert "\n" not in outcome
        assert len(outcome) < 1200
    else:
        assert [prediction.probability for prediction in outcome] == pytest.approx([p.probability for p in expected])


@pytest.mark.parametrize("settings", [{"hidden_size": 0}, {"patch_size": 0}, {"num_hidden_layers": "x"}], ids=str)
def test_the_message_names_the_failed_action(settings: dict[str, Any], model_folder: Path) -> None:
    configure(model_folder / "config.json", **settings)
    message = refusal(vs.VitscopeError, model_folder, pretrained=False)
    assert "failed (" in message or "cannot be used (" in message
    assert "config.json" in message


MANIFESTS: list[dict[str, Any]] = [
    *({"labels": labels} for labels in (None, 5, [], "abc", [None, "a", "b"], ["cat", "dog"], [*LABELS, "fox"], {})),
    *({"format": number} for number in (99, 0, None, "1", [1], True)),
    *({"library": name} for name in ("os", None, 5, ["timm"])),
    *({"name": name} for name in (None, 5, "", ["x"])),
    *({"native": value} for value in (None, "yes", 1)),
    *({"adapters": value} for value in (5, [], {}, {"places": 5, "rank": 2}, {"places": ["mlp"], "rank": "x"})),
    *({"adapters": {"places": ["mlp"], "rank": 0}}, {"adapters": {"places": ["nowhere"], "rank": 2}}),
    *({"architecture": value} for value in (None, 5, [], {}, {"name": "test_vit"}, {"name": 5, "options": {}})),
    {"architecture": {"name": "test_vit", "options": {"checkpoint_path": "/x"}}},
    {"architecture": {"name": "test_vit", "options": []}},
    {"preprocessing": 5},
    {"preprocessing": {}},
]


@pytest.mark.slow
@pytest.mark.parametrize("change", MANIFESTS, ids=lambda change: json.dumps(change)[:60])
def test_manifest_fields_of_the_wrong_kind_are_refused_in_one_line(change: dict[str, Any], tuned_folder: Path) -> None:
    configure(tuned_folder / "vitscope.json", **change)
    if change == {"format": True}:
        return  # JSON's true is 1 in Python
    refusal(vs.VitscopeError, tuned_folder)


PREPROCESSING: list[dict[str, Any]] = [
    *({"size": size} for size in ([0, 32], [-32, 32], ["32", "32"], [32], 32, None, [32.5, 32])),
    *({"fit": fit} for fit in ("bogus", None, 5)),
    *({"mean": mean} for mean in ("x", None, [], [0.5, None, 0.5], [0.5, 0.5])),
    *({"std": std} for std in ([0, 1, 1], [-1, 1, 1], "x", [1])),
    *({"resample": filter_} for filter_ in (99, -1, "x", None, 2.5)),
    *({"resize_to": size} for size in ([0, 0], "x", [32])),
    {"round_half_even": "x"},
    {"made_up": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("change", PREPROCESSING, ids=lambda change: json.dumps(change)[:60])
def test_preprocessing_fields_of_the_wrong_kind_are_refused_in_one_line(
    change: dict[str, Any], tuned_folder: Path
) -> None:
    file = tuned_folder / "vitscope.json"
    configure(file, preprocessing=json.loads(file.read_text())["preprocessing"] | change)
    assert "is not a complete fine-tuned model" in refusal(ModelUnavailableError, tuned_folder)


def test_a_tuned_model_with_integer_weights_is_refused(tuned_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tuned_folder / "model.safetensors"
    save_file({key: (tensor * 100).to(torch.int32) for key, tensor in load_file(file).items()}, file)
    assert "not floating-point numbers" in refusal(ModelUnavailableError, tuned_folder)


# Code


@pytest.fixture
def trap(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Add a module to the folder that creates a file when imported, and answer yes to every prompt."""
    trace = model_folder / "ran"
    (model_folder / "trap.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor\n"
        "class Config(ViTConfig):\n    model_type = 'trap'\n"
        "class Model(ViTForImageClassification):\n    config_class = Config\n"
        "class Processor(ViTImageProcessor):\n    pass\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 20))
    monkeypatch.syspath_prepend(str(model_folder))
    return trace


AUTO_MAP = {
    "AutoConfig": "trap.Config",
    "AutoModel": "trap.Model",
    "AutoModelForImageClassification": "trap.Model",
    "AutoImageProcessor": "trap.Processor",
}


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("model_type", ["vit", "trap", None])
def test_code_of_a_folder_never_runs(
    model_type: str | None, pretrained: bool, model_folder: Path, trap: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configure(model_folder / "config.json", auto_map=AUTO_MAP, model_type=model_type)
    if model_type == "vit":  # transformers has the class itself
        assert vs.load(model_folder, pretrained=pretrained).labels is not None
    else:
        message = refusal(CallError, model_folder, pretrained=pretrained)
        assert "needs Python code that comes with it, which vitscope never runs" in message
    assert not trap.exists()
    assert "trap" not in sys.modules
    output = capfd.readouterr()
    assert output.out + output.err == ""


def test_code_of_an_image_processor_never_runs(
    model_folder: Path, trap: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "auto_map": {"AutoImageProcessor": "trap.Processor"},
        "image_processor_type": "Processor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.5, 0.5],
    }
    (model_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    model = vs.load(model_folder)
    vs.load(model.module)
    assert not trap.exists()
    output = capfd.readouterr()
    assert output.out + output.err == ""


@pytest.mark.parametrize(
    "name",
    [
        *("AutoModel", "pipeline", "utils", "ViTConfig", "Trainer", "PreTrainedModel", "BertModel", "__name__"),
        *("TimmWrapperForImageClassification", "TimmBackbone", "no such", "", None, 5, ["ViTModel"]),
    ],
    ids=str,
)
def test_a_tuned_folder_must_name_a_vision_class_of_transformers(name: Any, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    for build in (
        lambda: backend("transformers").build({"class": name, "config": config}),
        lambda: backend("transformers").read(model_folder, {"class": name}),
    ):
        with pytest.raises(ModelUnavailableError, match="is not a vision model of transformers"):
            build()


@pytest.mark.parametrize("settings", [{"use_timm_backbone": True}, {"auto_map": {"AutoModel": "trap.Model"}}], ids=str)
def test_a_tuned_folder_cannot_request_foreign_code(settings: dict[str, Any], model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text()) | settings
    with pytest.raises(ModelUnavailableError, match="requests code from outside transformers"):
        backend("transformers").build({"class": "ViTModel", "config": config})


def test_a_model_type_is_accepted_only_without_pretrained_weights() -> None:
    """A name that is both a model type and a hub id is taken as a hub id."""
    with pytest.raises(ModelUnavailableError, match="is not in the local cache"):
        library.load("vit", pretrained=True, image_size=None, dtype=None)
