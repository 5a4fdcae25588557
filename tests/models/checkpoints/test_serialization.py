"""A tuned model as a folder: loaded exactly as it was saved, or refused in one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.every_model import LABELS, Case, case, every_case, logits, same, weights
from tests.helpers.families import hf
from tests.helpers.tiny import photo, refusal
from vitscope import files
from vitscope.errors import CallError, ModelUnavailableError, SaveError
from vitscope.files import atomic_folder
from vitscope.models.adapters import add_adapters
from vitscope.models.checkpoints.serialization import check_folder, manifest_folder, save_folder
from vitscope.models.heads import get_classifiers, reset_classifier

ADAPTERS = {"places": ["attention", "parallel"], "rank": 3}
NATIVE = {"config.json", "model.safetensors", "preprocessor_config.json", "vitscope.json"}


def tuned(name: str = "transformers-vit", adapters: dict[str, Any] | None = None) -> vs.VisionModel:
    """Return a model with a new classifier and adapters that change the output."""
    base = case(name).model()
    torch.manual_seed(0)
    model = reset_classifier(base, LABELS)
    if adapters is not None:
        for parameter in add_adapters(model.module, **adapters):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["plain", "adapted"])
def test_a_loaded_model_is_identical_to_the_saved_one(
    case: Case, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = tuned(case.name, adapters)
    assert save_folder(model, tmp_path / "m", adapters=adapters, about={"data": "none"}) == tmp_path / "m"
    again = vs.load(tmp_path / "m")
    assert torch.equal(logits(again, case.pixels), logits(model, case.pixels))
    assert same(weights(again), weights(model))
    assert (again.labels, again.name, again.library) == (LABELS, model.name, case.library)
    assert again.preprocessing == model.preprocessing
    assert not again.module.training
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    native = case.library == "transformers" and adapters is None and case.name != "transformers-dinov3"
    plain = {"model.safetensors" if adapters is None else "adapted.safetensors", "vitscope.json"}
    assert names(tmp_path / "m") == (NATIVE if native else plain)


@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit", "torchvision-swin"])
def test_a_folder_is_loaded_at_another_size_and_in_another_precision(name: str, tmp_path: Path) -> None:
    model = tuned(name)
    save_folder(model, tmp_path / "m", adapters=None, about={})
    half = vs.load(tmp_path / "m", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert same(weights(half), {key: tensor.to(half.dtype) for key, tensor in weights(model).items()})
    if name == "transformers-vit":
        larger = vs.load(tmp_path / "m", image_size=48)
        assert larger.prepare(photo(60, 60))[0].shape == (1, 3, 48, 48)
        assert len(larger.predict(photo(60, 60))[0]) == 3


@pytest.mark.parametrize("name", ["transformers-vit-bare", "transformers-swin", "transformers-clip-head"])
def test_plain_transformers_loads_a_folder_without_adapters(name: str, tmp_path: Path) -> None:
    import transformers

    model = tuned(name)
    folder = save_folder(model, tmp_path / "m", adapters=None, about={})
    module, report = transformers.AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    square = case(name).pixels[..., :32]
    with torch.no_grad():
        assert torch.equal(module.eval()(pixel_values=square).logits, logits(model, square))
    assert module.config.id2label == dict(enumerate(LABELS))
    assert module.config.label2id == {label: i for i, label in enumerate(LABELS)}


@pytest.mark.parametrize("name", ["transformers-vit", "transformers-clip", "transformers-dinov2"])
def test_plain_transformers_preprocesses_an_image_identically(name: str, tmp_path: Path) -> None:
    import transformers

    model = tuned(name)
    save_folder(model, tmp_path / "m", adapters=None, about={})
    image = photo(40, 50)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m", local_files_only=True, backend="pil")
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(theirs, model.prepare(image)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "adapters"), [("transformers-vit", ADAPTERS), ("transformers-dinov3", None)])
def test_plain_transformers_refuses_models_that_it_would_build_wrongly(
    name: str, adapters: Any, tmp_path: Path
) -> None:
    import transformers

    save_folder(tuned(name, adapters), tmp_path / "m", adapters=adapters, about={})
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m", local_files_only=True)


FOLDERS = [("transformers-vit", None), ("transformers-vit", ADAPTERS), ("timm-swin", None), ("torchvision-vit", None)]
each_folder = pytest.mark.parametrize(("name", "adapters"), FOLDERS, ids=["native", "adapted", "timm", "torchvision"])


@each_folder
def test_damaged_or_missing_weights_are_refused_in_one_line(name: str, adapters: Any, tmp_path: Path) -> None:
    folder = save_folder(tuned(name, adapters), tmp_path / "m", adapters=adapters, about={})
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (content[:-10], content[:100], b"", b"\xff" * 200, None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        assert refusal(ModelUnavailableError, folder).startswith(f"{folder} is not a complete fine-tuned model: ")
    file.write_bytes(content)
    vs.load(folder)


@pytest.mark.slow
@each_folder
@pytest.mark.parametrize("manifest", ["{ no", "", "[]", "{}", "null", '"text"', '{"format": 1}'])
def test_an_invalid_manifest_is_refused_in_one_line(name: str, adapters: Any, manifest: str, tmp_path: Path) -> None:
    folder = save_folder(tuned(name, adapters), tmp_path / "m", adapters=adapters, about={})
    (folder / "vitscope.json").write_text(manifest)
    assert str(folder) in refusal(ModelUnavailableError, folder)


@pytest.mark.parametrize(("name", "adapters"), FOLDERS[1:], ids=["adapted", "timm", "torchvision"])
def test_weights_of_another_model_are_refused(name: str, adapters: Any, tmp_path: Path) -> None:
    folder = save_folder(tuned(name, adapters), tmp_path / "m", adapters=adapters, about={})
    source = save_folder(tuned("timm-beit"), tmp_path / "other", adapters=None, about={})
    shutil.copy(source / "model.safetensors", next(folder.glob("*.safetensors")))
    assert "is not a complete fine-tuned model" in refusal(ModelUnavailableError, folder)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_transformers_folder_with_weights_of_another_depth_is_refused(layers: int, tmp_path: Path) -> None:
    folder = save_folder(tuned(), tmp_path / "m", adapters=None, about={})
    deep = reset_classifier(vs.load(hf("ViTForImageClassification", "ViTConfig", num_hidden_layers=layers)()), LABELS)
    source = save_folder(deep, tmp_path / "other", adapters=None, about={})
    shutil.copy(source / "model.safetensors", folder / "model.safetensors")
    assert "is not a complete fine-tuned model" in refusal(ModelUnavailableError, folder)


def test_pretrained_false_is_refused_and_a_run_folder_leads_to_its_model(tmp_path: Path) -> None:
    save_folder(tuned(), tmp_path / "run" / "model", adapters=None, about={})
    assert manifest_folder(tmp_path / "run") == tmp_path / "run" / "model"
    assert manifest_folder(tmp_path) is None
    assert vs.load(tmp_path / "run").labels == LABELS
    assert "is a fine-tuned model with weights: omit pretrained=False" in refusal(
        CallError, tmp_path / "run", pretrained=False
    )


def test_the_manifest_records_the_origin_of_the_model(tmp_path: Path) -> None:
    save_folder(tuned("timm-vit", ADAPTERS), tmp_path / "m", adapters=ADAPTERS, about={"from": "a test"})
    written = json.loads((tmp_path / "m" / "vitscope.json").read_text())
    assert written["about"] == {"from": "a test"}
    assert (written["library"], written["labels"], written["adapters"]) == ("timm", list(LABELS), ADAPTERS)


def test_tied_blocks_are_restored(tmp_path: Path) -> None:
    model = tuned("timm-vit")
    model.module.blocks[1].attn = model.module.blocks[0].attn
    check_folder(model)
    save_folder(model, tmp_path / "m", adapters=None, about={})
    again = vs.load(tmp_path / "m").module.blocks
    assert torch.equal(again[1].attn.qkv.weight, model.module.blocks[0].attn.qkv.weight)
    assert torch.equal(again[1].attn.qkv.weight, again[0].attn.qkv.weight)


def test_saving_again_replaces_the_folder_and_a_failure_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tuned("timm-vit"), tuned("timm-vit")
    torch.nn.init.ones_(get_classifiers(second)[0].weight)
    pixels, folder = case("timm-vit").pixels, tmp_path / "m"
    save_folder(first, folder, adapters=None, about={})
    save_folder(second, folder, adapters=None, about={})
    assert torch.equal(logits(vs.load(folder), pixels), logits(second, pixels))

    def full(_tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("vitscope.models.checkpoints.serialization.save_file", full)
    with pytest.raises(SaveError, match=r"cannot write .*m: No space left on device$"):
        save_folder(first, folder, adapters=None, about={})
    assert names(tmp_path) == {"m"}
    assert torch.equal(logits(vs.load(folder), pixels), logits(second, pixels))


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("raised", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_folder_is_written_atomically(older: bool, raised: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    if older:
        target.mkdir(parents=True)
        (target / "old").write_text("old")

    def fail() -> None:
        with atomic_folder(target) as temporary:
            assert temporary.parent == target.parent
            (temporary / "new").write_text("half of the ne")
            raise raised

    with pytest.raises(SaveError if isinstance(raised, OSError) else type(raised)):
        fail()
    assert names(target.parent) == ({"result"} if older else set())
    with atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
        assert not older or names(target) == {"old"}
    assert names(target) == {"new"}
    assert names(target.parent) == {"result"}


def test_the_older_folder_is_restored_if_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, destination: Path) -> Path:
        if destination == target and (self / "new").exists():
            raise PermissionError(13, "Permission denied")
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as on a system that cannot exchange two names
    with pytest.raises(SaveError, match="Permission denied"), atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == {"result"}
    assert names(target) == {"old"}
