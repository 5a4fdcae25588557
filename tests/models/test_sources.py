"""Sources of models: timm's hub and folders, a Trainer's output, files, and invalid names."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.tiny import photo, refusal, tiny_vit
from vitscope.errors import ModelUnavailableError, UnknownModelError
from vitscope.models.backends.libraries import backend
from vitscope.models.backends.transformers import backend as library
from vitscope.models.checkpoints import hub

timm = pytest.importorskip("timm")

PIXELS = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1), device="cpu")
OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8, "interpolation": "bilinear"}
ARCHITECTURES = (
    "test_vit",
    "test_vit2",
    "test_vit3",
    "beit_base_patch16_224",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
SMALL: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"img_size": 160, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "beit_base_patch16_224": {"img_size": 160, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "swin_tiny_patch4_window7_224": {"img_size": 160, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
}


def trained(name: str = "test_vit", **options: Any) -> Any:
    torch.manual_seed(0)
    module = timm.create_model(name, **({"num_classes": 3} | SMALL.get(name, {}) | options)).eval()
    module.pretrained_cfg.update(OWN)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def timm_folder(folder: Path, module: Any, **config: Any) -> Path:
    """Save a model as timm does for the hub."""
    timm.models.save_for_hf(module, folder, model_config=config or None, safe_serialization=True)
    return folder


def logits(module: Any, pixels: Tensor = PIXELS) -> Tensor:
    """Return the logits that a module computes."""
    with torch.no_grad():
        output = module(pixels)
    return getattr(output, "logits", output)


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def assert_own_preprocessing(model: vs.VisionModel, size: tuple[int, int] = (160, 160)) -> None:
    preprocessing = model.preprocessing
    assert preprocessing is not None
    assert (preprocessing.mean, preprocessing.std, preprocessing.size) == (OWN["mean"], OWN["std"], size)
    assert preprocessing.resize_to == (200, 200)
    assert preprocessing.resample.name == "BILINEAR"


# timm's folders


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm:local-dir:", "timm:LOCAL-DIR:", "timm:local_dir:", ""])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_timm_folder_gives_its_model_and_preprocessing(name: str, form: str, tmp_path: Path) -> None:
    module = trained(name)
    timm_folder(tmp_path, module, label_names=["cat", "dog", "owl"])
    model = vs.load(f"{form}{tmp_path}")
    assert torch.equal(logits(model.module), logits(module))
    assert model.labels == ("cat", "dog", "owl")
    assert model.name == f"{form}{tmp_path}"
    assert_own_preprocessing(model)


@pytest.mark.parametrize("form", ["timm:local-dir:", ""])
def test_other_weights_replace_those_of_a_folder(form: str, tmp_path: Path) -> None:
    folder, halved = timm_folder(tmp_path / "folder", trained()), trained()
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    save_file(halved.state_dict(), tmp_path / "other.safetensors")
    model = vs.load(f"{form}{folder}", weights=tmp_path / "other.safetensors")
    assert torch.equal(logits(model.module), logits(halved))


def test_label_descriptions_are_preferred_as_labels(tmp_path: Path) -> None:
    descriptions = {"n01": "a cat, with whiskers", "n02": "a dog"}
    timm_folder(tmp_path, trained(), label_names=["n01", "n02", "n03"], label_descriptions=descriptions)
    assert vs.load(tmp_path).labels == ("a cat, with whiskers", "a dog", "n03")


@pytest.mark.slow
@pytest.mark.parametrize("head", [True, False], ids=["classifier", "bare"])
def test_timm_models_wrapped_by_transformers_are_loaded_by_timm(head: bool, tmp_path: Path) -> None:
    import transformers

    timm_folder(tmp_path / "timm", trained(), label_names=["cat", "dog", "owl"])
    configure(tmp_path / "timm", model_args={"img_size": [160, 160]})  # the wrapper adds num_classes
    cls = transformers.TimmWrapperForImageClassification if head else transformers.TimmWrapperModel
    wrapper = cls.from_pretrained(tmp_path / "timm").eval()
    wrapper.save_pretrained(tmp_path / "wrapped")
    for folder in (tmp_path / "timm", tmp_path / "wrapped"):
        model = vs.load(folder)
        assert model.library == "timm"
        assert_own_preprocessing(model)
    module = model.module
    assert torch.equal(logits(module), logits(wrapper) if head else wrapper(PIXELS).pooler_output)
    assert model.labels == (("cat", "dog", "owl") if head else None)
    by_transformers = library.load(str(tmp_path / "wrapped"), pretrained=True, image_size=None, dtype=None)
    assert by_transformers.library == "timm"
    assert by_transformers.name == str(tmp_path / "wrapped")


def test_a_folder_of_timm_at_another_size(tmp_path: Path) -> None:
    module = trained()
    timm_folder(tmp_path, module)
    model = vs.load(tmp_path, image_size=192)
    module.set_input_size((192, 192))
    torch.testing.assert_close(model.module.state_dict(), module.state_dict())
    assert model.prepare(photo(200, 200))[0].shape == (1, 3, 192, 192)


def test_a_folder_of_timm_in_torchs_format(tmp_path: Path) -> None:
    module = trained()
    timm_folder(tmp_path, module)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(logits(vs.load(tmp_path).module), logits(module))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "checkpoint.pth")
    assert torch.equal(logits(vs.load(tmp_path).module), logits(module))
    (tmp_path / "other.pth").write_bytes((tmp_path / "checkpoint.pth").read_bytes())
    assert "it holds checkpoint.pth, other.pth: keep one" in refusal(ModelUnavailableError, tmp_path)


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        {"model_args": {"checkpoint_path": "BOMB"}},
        {"model_args": {"pretrained_cfg": {"file": "BOMB"}}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "BOMB"}}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"cache_dir": "BOMB"}},
        {"pretrained_cfg": {"file": "BOMB", "custom_load": True, "source": "local-dir", "hf_hub_id": "a/b"}},
        {"checkpoint_path": "BOMB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_configuration_cannot_lead_to_another_file(place: dict[str, Any], wrapped: bool, tmp_path: Path) -> None:
    timm_folder(tmp_path, trained(), label_names=["cat", "dog", "owl"])
    bomb, trace = tmp_path / "elsewhere.pkl", tmp_path / "ran"
    torch.save(Bomb(trace), bomb)
    text = json.dumps(place).replace("BOMB", str(bomb))
    configure(tmp_path, **json.loads(text), **({"model_type": "timm_wrapper"} if wrapped else {}))
    if "model_args" in place:
        assert "pass arguments of its class only" in refusal(ModelUnavailableError, tmp_path)
    else:
        assert vs.load(tmp_path).labels == ("cat", "dog", "owl")
    torch.save(Bomb(trace), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refusal(ModelUnavailableError, tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["missing", "unexpected", "integer", "classes"])
def test_weights_that_do_not_fill_the_model_are_refused(damage: str, tmp_path: Path) -> None:
    timm_folder(tmp_path, trained())
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if damage == "missing":
        del state["norm.weight"]
    elif damage == "unexpected":
        state["extra"] = torch.ones(3, device="cpu")
    elif damage == "integer":
        state["norm.weight"] = state["norm.weight"].to(torch.int32)
    else:
        configure(tmp_path, num_classes=5, model_args={"num_classes": 5})
    save_file(state, file)
    assert "does not fit VisionTransformer" in refusal(ModelUnavailableError, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"architecture": "no_such_model"}, "timm has no model 'no_such_model'"),
        ({"pretrained_cfg": []}, "pretrained_cfg of config.json is not a JSON object"),
        ({"pretrained_cfg": None}, "pretrained_cfg"),
        ({"model_args": 5}, "model_args of config.json is not a JSON object"),
        ({"label_names": 5}, "label_names of config.json is not a list"),
        ({"label_names": ["a", None, "b"]}, "label_names of config.json is not a list"),
        ({"label_names": ["a"]}, "3 classes and 1 label_names"),
        ({"label_descriptions": [1]}, "label_descriptions of config.json is not a JSON object"),
        ({"num_classes": "many"}, "config.json"),
        ({"num_classes": -3}, ""),
    ],
    ids=str,
)
def test_a_damaged_configuration_of_timm_is_one_line(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    timm_folder(tmp_path, trained(), label_names=["cat", "dog", "owl"], label_descriptions={"cat": "a cat"})
    configure(tmp_path, **settings)
    assert expected in refusal(vs.VitscopeError, tmp_path)


@pytest.mark.parametrize(
    "facts", [{"mean": "x"}, {"std": (0, 1, 1)}, {"input_size": 5}, {"crop_pct": 0}, {"mean": []}], ids=str
)
def test_damaged_preprocessing_facts_raise_an_error_of_vitscope(facts: dict[str, Any], tmp_path: Path) -> None:
    timm_folder(tmp_path, trained())
    config = json.loads((tmp_path / "config.json").read_text())
    configure(tmp_path, pretrained_cfg=config["pretrained_cfg"] | facts)
    with pytest.raises(vs.VitscopeError) as caught:
        vs.load(tmp_path).predict(photo(200, 200))
    assert "\n" not in str(caught.value)


# timm's hub


@pytest.mark.parametrize("name", ["timm:hf-hub:org/name", "timm:hf_hub:org/name", "timm:hf-hub:org/name@main"])
@pytest.mark.parametrize("offline", [True, False], ids=["offline mode", "hub unreachable"])
def test_an_unreachable_hub_is_reported_in_one_line(name: str, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(ModelUnavailableError, name)
    assert message.startswith(f"{name} is not in the local cache and could not be downloaded")


@pytest.mark.parametrize("place", ["", "a/b/c/d", "..", "with space/x"])
def test_an_invalid_repository_name_is_refused(place: str) -> None:
    assert "could not be downloaded" in refusal(ModelUnavailableError, f"timm:hf-hub:{place}")


@pytest.mark.parametrize("form", ["timm:hf-hub:org/cats", "org/cats"])
def test_a_cached_repository_is_loaded(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained()
    snapshot = tmp_path / "models--org--cats" / "snapshots" / ("0" * 40)
    timm_folder(snapshot, module, label_names=["cat", "dog", "owl"])
    (tmp_path / "models--org--cats" / "refs").mkdir()
    (tmp_path / "models--org--cats" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = vs.load(form)
    assert torch.equal(logits(model.module), logits(module))
    assert (model.labels, model.name) == (("cat", "dog", "owl"), form)
    assert_own_preprocessing(model)


def test_a_missing_timm_folder_is_refused() -> None:
    assert "the folder '/no/such' does not exist" in refusal(UnknownModelError, "timm:local-dir:/no/such")


# A Trainer's output


def test_a_checkpoint_of_a_trainer_is_a_folder_of_transformers(tmp_path: Path) -> None:
    module = tiny_vit()
    checkpoint = tmp_path / "checkpoint-10"
    module.save_pretrained(checkpoint)
    for extra in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save(Bomb(tmp_path / "ran"), checkpoint / extra)
    (checkpoint / "trainer_state.json").write_text("{}")
    pixels = PIXELS[..., :32, :32].contiguous()
    assert torch.equal(logits(vs.load(checkpoint).module, pixels), logits(module, pixels))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "checkpoint-9").mkdir()
    message = refusal(UnknownModelError, tmp_path)
    assert message == (
        f"{tmp_path} is the output folder of a Trainer, not a model: pass one of its subfolders checkpoint-9, "
        "checkpoint-10"
    )
    module.save_pretrained(tmp_path)
    assert torch.equal(logits(vs.load(tmp_path).module, pixels), logits(module, pixels))


# Files passed as the model


@pytest.mark.parametrize("name", ["best_model.pth", "model.safetensors", "last.ckpt", "pytorch_model.bin", "m.pt"])
def test_a_file_of_weights_needs_an_architecture(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(tiny_vit().state_dict(), file)
    else:
        torch.save(tiny_vit().state_dict(), file)
    assert refusal(UnknownModelError, file) == (
        f"{file} holds weights only: name the architecture, as in "
        f'vs.load("timm:vit_small_patch16_224", weights="{name}") or '
        f"--model timm:vit_small_patch16_224 --weights {name}"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_compiled_programs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2, device="cpu")), file)
    assert "is a TorchScript program" in refusal(UnknownModelError, file)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    assert "is an ONNX file" in refusal(UnknownModelError, tmp_path / "model.onnx")


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("photo.jpg", "config.json", "adapter_config.json", "notes"):
        (tmp_path / name).write_text("{}")
        assert str(tmp_path / name) in refusal(UnknownModelError, tmp_path / name)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "pipe.pth" in refusal(UnknownModelError, tmp_path / "pipe.pth")


@pytest.mark.parametrize("prefix", ["", "timm:", "torchvision:", "transformers:", "timm:local-dir:", "timm:hf-hub:"])
@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "/" + "y" * 5000, "\ud800"], ids=ascii)
def test_impossible_file_names_are_refused_in_one_line(prefix: str, name: str) -> None:
    refusal(vs.VitscopeError, f"{prefix}{name}")


# Threads


def test_offline_and_quiet_restore_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from transformers.utils import logging as transformers_logging

    from vitscope.models.backends.library_logging import quiet

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    before = [logging.getLogger(name).level for name in ("transformers", "huggingface_hub")]
    bars = transformers_logging.is_progress_bar_enabled()
    first_inside, second_inside = threading.Event(), threading.Event()
    states = []

    def first() -> None:
        with hub.offline(), quiet():
            first_inside.set()
            second_inside.wait(5)
        states.append((hub.constants.HF_HUB_OFFLINE, logging.getLogger("transformers").level))

    def second() -> None:
        first_inside.wait(5)
        with hub.offline(), quiet():
            second_inside.set()
            threads[0].join(5)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert states == [(True, logging.ERROR)]  # the other block still runs
    assert hub.constants.HF_HUB_OFFLINE is False
    assert [logging.getLogger(name).level for name in ("transformers", "huggingface_hub")] == before
    assert transformers_logging.is_progress_bar_enabled() == bars


@pytest.mark.parametrize("context", ["offline", "quiet"])
def test_offline_and_quiet_restore_the_settings_after_an_error(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from vitscope.models.backends.library_logging import quiet

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    level = logging.getLogger("transformers").level
    with pytest.raises(KeyError), hub.offline() if context == "offline" else quiet():
        raise KeyError
    assert (hub.constants.HF_HUB_OFFLINE, logging.getLogger("transformers").level) == (False, level)


# Options of timm's models


@pytest.mark.parametrize("name", ["hf-hub:org/x", "local-dir:/tmp", "no_such_model", None, 5])
@pytest.mark.usefixtures("unchecked")
def test_a_run_folder_must_name_a_timm_model(name: Any) -> None:
    with pytest.raises(UnknownModelError, match="timm has no model"):
        backend("timm").build({"name": name, "options": {}})


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir", "url", "made_up"])
def test_a_run_folder_cannot_have_options_that_fetch_files(option: str) -> None:
    with pytest.raises(ModelUnavailableError, match=f"cannot be built with the option '{option}'"):
        backend("timm").build({"name": "test_vit", "options": {option: "x"}})
