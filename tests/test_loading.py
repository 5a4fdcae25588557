"""load() and predict(): by name, folder or live module; and one line for everything that is none of these."""

import http.server
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitscope as vs
from tests.families import TINY
from vitscope.errors import (
    ModelUnavailableError,
    NoAttentionError,
    PictureNotFoundError,
    UnknownModelError,
    VitscopeError,
    WorkError,
)
from vitscope.models import bundled_path, hub

LABELS = tuple(f"thing {i}" for i in range(7))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refusal(error: type[VitscopeError], name: Any, **options: Any) -> str:
    """The message of load's refusal, which is one line."""
    with pytest.raises(error) as caught:
        vs.load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny_vit() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**(TINY | {"image_size": 32, "patch_size": 8, "id2label": dict(enumerate(LABELS))}))
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT saved as its library saves one, with a processor."""
    import transformers

    path = tmp_path_factory.mktemp("models") / "tiny-vit"
    tiny_vit().save_pretrained(path)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    processor.save_pretrained(path)
    return path


# Local folders


def test_a_folder_gives_back_the_model_that_was_saved(folder: Path) -> None:
    import transformers

    original, picture = tiny_vit(), photo(50, 40)
    processor = transformers.ViTImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        expected = original(**processor(picture, return_tensors="pt")).logits
    for source in (folder, str(folder)):
        model = vs.load(source)
        pixels, _ = model.prepare(picture)
        with torch.no_grad():
            torch.testing.assert_close(model.forward(pixels), expected)
        assert model.labels == LABELS
        assert (model.name, model.library) == (str(folder), "transformers")
        assert not any(child.training for child in model.module.modules())
    assert repr(model) == f"<VisionModel {folder} (transformers) 32×32 px, patches of 8×8>"


def test_a_folder_without_a_processor_takes_its_familys_at_the_models_size(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    made = vs.load(tmp_path).preprocessing
    assert made is not None
    assert (made.size, made.mean, made.fit) == ((32, 32), (0.5, 0.5, 0.5), "squash")


def test_a_model_saved_without_a_classifier_has_none(tmp_path: Path) -> None:
    tiny_vit().vit.save_pretrained(tmp_path)
    model = vs.load(tmp_path)
    assert model.labels is None
    with pytest.raises(vs.CallError, match="has no classifier: it gives features, not classes"):
        model.predict(photo(40, 40))
    assert vs.rollout(model, photo(40, 40)).values.shape == (1, 4, 4)


def test_random_weights_are_the_callers_to_seed(folder: Path) -> None:
    def weights(seed: int | None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return vs.load(folder, pretrained=seed is None).module.classifier.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1), weights(None))
    assert torch.equal(weights(None), tiny_vit().classifier.weight)


@pytest.mark.parametrize(
    ("model_type", "config_name", "prefix", "has_classifier"),
    [
        ("vit", "ViTConfig", ("cls",), True),
        ("deit", "DeiTConfig", ("cls", "distillation"), True),
        ("dinov2", "Dinov2Config", ("cls",), True),
        ("beit", "BeitConfig", ("cls",), True),
        ("dinov3_vit", "DINOv3ViTConfig", ("cls",), False),
    ],
)
def test_a_model_type_gives_its_default_configuration(
    monkeypatch: pytest.MonkeyPatch, model_type: str, config_name: str, prefix: tuple[str, ...], has_classifier: bool
) -> None:
    from vitscope.models.transformers import transformers

    def default() -> Any:
        return getattr(transformers, config_name)(**(TINY | {"image_size": 32, "patch_size": 8}))

    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {model_type: default})
    model = vs.load(model_type, pretrained=False)
    assert vs.capture(model, photo(40, 50)).prefix_names == prefix
    if has_classifier:
        assert len(model.predict(photo(40, 50), top_k=9)[0]) == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16, "float64"], ids=str)
def test_a_precision_is_kept_and_results_are_float32(folder: Path, dtype: str | torch.dtype) -> None:
    picture = photo(40, 50)
    whole, model = vs.load(folder), vs.load(folder, dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    result = vs.rollout(model, picture)
    assert result.values.dtype == vs.capture(model, picture).map(-1).dtype == torch.float32
    torch.testing.assert_close(result.values, vs.rollout(whole, picture).values, atol=1e-3, rtol=0)
    for one, other in zip(
        sorted(model.predict(picture, 7)[0], key=lambda p: p.index),
        sorted(whole.predict(picture, 7)[0], key=lambda p: p.index),
        strict=True,
    ):
        assert one.probability == pytest.approx(other.probability, abs=5e-3)


def test_a_device_is_where_the_weights_are(folder: Path) -> None:
    assert vs.load(folder, device="cpu").device == vs.load(folder, device=torch.device("cpu")).device
    assert vs.load(folder, device="meta").device == torch.device("meta")


@pytest.mark.parametrize("device", ["gpu", "cuda:977"])
def test_a_device_that_is_not_there_is_one_line(folder: Path, device: str) -> None:
    assert refusal(ModelUnavailableError, folder, device=device).startswith(f"device {device!r} cannot be used")


@pytest.mark.parametrize("dtype", ["int8", "half precision", "nn", torch.int8], ids=str)
def test_a_dtype_that_is_none_is_refused(folder: Path, dtype: str | torch.dtype) -> None:
    assert "pass float32, bfloat16 or float16" in refusal(vs.CallError, folder, dtype=dtype)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"dtype": "float32"}], ids=str)
def test_a_live_module_is_not_moved(options: dict[str, Any]) -> None:
    assert "move it with its own .to() first" in refusal(vs.CallError, tiny_vit(), **options)


@pytest.mark.parametrize("options", [{"patch_size": 8}, {"prefix": ("cls",)}, {"readout": "cls"}], ids=str)
def test_a_layout_is_not_for_a_named_model(folder: Path, options: dict[str, Any]) -> None:
    assert "a named model is known already" in refusal(vs.CallError, folder, **options)


# Names that lead nowhere


def test_a_slip_of_the_pen_is_shown_the_right_name() -> None:
    for name in ("vit-nanno", "vitnano", "vit_nano"):
        assert refusal(UnknownModelError, name) == f"unknown model {name!r}: did you mean 'vit-nano'?"


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_name_the_library_does_not_have(library: str) -> None:
    pytest.importorskip(library)
    assert f"{library} has no model 'foo'" in refusal(UnknownModelError, f"{library}:foo")
    assert f"{library} has no model ''" in refusal(UnknownModelError, f"{library}:")


def test_near_names_of_a_library_are_offered() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    assert "did you mean vit_tiny_patch16_224," in refusal(UnknownModelError, "timm:vit_tiny_patch16_24")
    assert "did you mean resnet18," in refusal(UnknownModelError, "torchvision:resnet_18")


@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_that_timm_does_not_list(pretrained: bool) -> None:
    pytest.importorskip("timm")
    message = refusal(UnknownModelError, "timm:test_vit.nope", pretrained=pretrained)
    assert message == "timm has no weights 'test_vit.nope': it has test_vit.r160_in1k"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./models", "../models", "~/models", "a/b/c", "detectron:vit", "a\nb"]
)
def test_a_path_or_name_that_can_be_nothing_says_what_can(name: str) -> None:
    message = refusal(UnknownModelError, name)
    for known in ("vit-nano", "local transformers folder", "hub id", "timm:<name>", "torchvision:<name>"):
        assert known in message


def test_folders_that_hold_no_model(tmp_path: Path, folder: Path) -> None:
    assert f"{tmp_path} is no transformers folder" in refusal(UnknownModelError, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert f"{tmp_path} cannot be loaded" in refusal(ModelUnavailableError, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    assert f"{tmp_path} cannot be loaded" in refusal(ModelUnavailableError, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path} is no transformers folder" in refusal(UnknownModelError, tmp_path)


def test_a_model_that_does_not_look_at_pictures(tmp_path: Path) -> None:
    import transformers

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    bert = transformers.BertModel(transformers.BertConfig(**sizes))
    bert.save_pretrained(tmp_path)
    for source in (tmp_path, bert):
        assert "BertModel, which does not look at pictures" in refusal(UnknownModelError, source)


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "resnet-something"])
@pytest.mark.parametrize("told", [True, False], ids=["told to be offline", "hub out of reach"])
def test_a_hub_id_without_a_hub_soon_says_what_works(monkeypatch: pytest.MonkeyPatch, name: str, told: bool) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", told)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    message = refusal(ModelUnavailableError, name)
    assert time.monotonic() - start < 5
    assert message.startswith(f"{name} is not on this machine")
    assert "vit-nano" in message
    assert "local folder" in message


def test_timm_without_a_hub_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's hub client repeats itself for most of a minute unless it is told to be offline."""
    timm = pytest.importorskip("timm")
    told = []

    def create(*_: Any, **__: Any) -> None:
        told.append(hub.constants.HF_HUB_OFFLINE)
        raise OSError("nothing came\nand nothing will")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for reach in (False, True):
        monkeypatch.setattr("vitscope.models.timm.hub_in_reach", lambda reach=reach: reach)
        message = refusal(ModelUnavailableError, "timm:test_vit")
        assert "vit-nano" in message
        assert "local folder" in message
    assert told == [True, False]
    assert hub.constants.HF_HUB_OFFLINE is False


def test_torchvision_without_a_network_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")

    def fetch(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    message = refusal(ModelUnavailableError, "torchvision:resnet18")
    assert "vit-nano" in message
    assert "local folder" in message


def test_a_library_that_is_missing_or_broken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(raised: Exception) -> Any:
        def import_module(_: str) -> None:
            raise raised

        return import_module

    module = "vitscope.models.loading.importlib.import_module"
    with monkeypatch.context() as patch:
        patch.setattr(module, fail(ImportError("no module")))
        message = refusal(ModelUnavailableError, "timm:test_vit")
        assert message == "timm is not installed: pip install 'vitscope[timm]'"
    with monkeypatch.context() as patch:
        patch.setattr(module, fail(RuntimeError("operator nms\ndoes not exist")))
        message = refusal(ModelUnavailableError, "timm:test_vit")
        assert f"torch {torch.__version__}" in message
        assert "operator nms" in message


class _NotFound(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the address of the hub."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return lambda port: monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_hub_that_answers_is_in_reach_whatever_it_answers(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(server.server_port)
        assert hub.hub_in_reach()
        monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
        assert not hub.hub_in_reach()
        server.shutdown()


def test_a_hub_that_is_silent_or_absent_is_not_in_reach(endpoint: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(silent.getsockname()[1])
        assert not hub.hub_in_reach()
        port = silent.getsockname()[1]
    endpoint(port)
    assert not hub.hub_in_reach()


# Other sizes


@pytest.mark.parametrize("size", [48, (48, 48), (32, 48), (64, 24)], ids=str)
def test_transformers_at_another_size(folder: Path, size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    model = vs.load(folder, image_size=size)
    pixels, (picture,) = model.prepare(photo(70, 50))
    assert pixels.shape == (1, 3, height, width)
    assert picture.box == (0, 0, 70, 50)
    with torch.no_grad():
        expected = tiny_vit()(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model.forward(pixels), expected)
    trace = vs.capture(model, photo(70, 50))
    assert trace.steps[0].grid == vs.Grid(height // 8, width // 8, 1)
    assert vs.rollout(trace).values.shape == (1, height // 8, width // 8)


@pytest.mark.parametrize("size", [None, 96, (64, 96)], ids=str)
def test_timm_at_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | tuple[int, int] | None
) -> None:
    """Weights from a file, as timm's registry names one: position embeddings are resampled, the rest is the same."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    trained = timm.create_model("test_vit")
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    registered = timm.models._registry._model_pretrained_cfgs["test_vit.r160_in1k"]
    monkeypatch.setattr(registered, "file", str(tmp_path / "weights.pth"))
    model = vs.load("timm:test_vit", image_size=size)
    height, width = (160, 160) if size is None else (size, size) if isinstance(size, int) else size
    grid = vs.Grid(height // 16, width // 16, 1)
    assert vs.capture(model, photo(70, 50)).steps[0].grid == grid
    weights = dict(model.module.named_parameters())
    for name, parameter in trained.named_parameters():
        if name == "pos_embed":
            expected = timm.layers.resample_abs_pos_embed(parameter, (grid.height, grid.width), (10, 10))
            torch.testing.assert_close(weights[name], expected)
        else:
            assert torch.equal(weights[name], parameter)
    assert model.labels is not None
    assert len(model.labels) == 1000
    assert model.labels[0].startswith("tench")


def test_timm_refuses_a_size_for_a_model_that_takes_none() -> None:
    pytest.importorskip("timm")
    assert "takes no image_size" in refusal(vs.CallError, "timm:test_resnet", pretrained=False, image_size=64)


@pytest.fixture
def small_torchvision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision's named vision transformers, with the width and depth of a test."""
    torchvision = pytest.importorskip("torchvision")

    def build(*, patch_size: int, weights: Any, progress: bool, **options: Any) -> nn.Module:
        del weights, progress
        options = {name: options[name] for name in ("image_size", "num_classes") if name in options}
        return torchvision.models.VisionTransformer(
            patch_size=patch_size,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=16,
            **{"image_size": 224, **options},
        )

    monkeypatch.setattr(torchvision.models.vision_transformer, "_vision_transformer", build)
    return torchvision


@pytest.mark.parametrize("size", [None, 64], ids=str)
def test_torchvision_at_another_size(small_torchvision: Any, monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    torch.manual_seed(0)
    trained = small_torchvision.models.vit_b_16()
    monkeypatch.setattr(
        small_torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: trained.state_dict()
    )
    model = vs.load("torchvision:vit_b_16", image_size=size)
    side = size or 224
    trace = vs.capture(model, photo(300, 260))
    assert trace.steps[0].grid == vs.Grid(side // 16, side // 16, 1)
    weights = dict(model.module.named_parameters())
    for name, parameter in trained.named_parameters():
        assert name == "encoder.pos_embedding" or torch.equal(weights[name], parameter)
    assert len(model.predict(photo(300, 260), top_k=2000)[0]) == len(model.labels or ()) == 1000


def test_torchvision_takes_the_size_its_weights_were_trained_at(
    small_torchvision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vit_h_14's were trained at 518 pixels; the class alone would say 224."""
    trained = small_torchvision.models.vit_h_14(image_size=518)
    monkeypatch.setattr(
        small_torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: trained.state_dict()
    )
    model = vs.load("torchvision:vit_h_14")
    assert model.preprocessing is not None
    assert model.preprocessing.size == (518, 518)
    assert torch.equal(model.module.encoder.pos_embedding, trained.encoder.pos_embedding)


def test_torchvision_refuses_sizes_it_cannot_take(small_torchvision: Any) -> None:
    assert "square pictures only, not 32×64" in refusal(vs.CallError, "torchvision:vit_b_16", image_size=(32, 64))
    assert "65 pixels" in refusal(vs.CallError, "torchvision:vit_b_16", image_size=65, pretrained=False)
    module = small_torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 16)
    assert "takes 32×32 pixels, not 48×48" in refusal(vs.CallError, module, image_size=48)
    assert vs.load(module, image_size=32).preprocessing == vs.load(module).preprocessing


@pytest.mark.parametrize("size", [0, -8, (32,), (32, 0), (8, 8, 8)], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_a_size_that_is_none_is_refused(folder: Path, size: Any) -> None:
    assert "image_size is" in refusal(vs.CallError, folder, image_size=size)


# Predicting


def test_classes_are_ranked_and_named(folder: Path) -> None:
    model = vs.load(folder)
    pixels, _ = model.prepare([photo(40, 50), photo(50, 40, 1)])
    with torch.no_grad():
        expected = tiny_vit()(pixels).logits.softmax(-1)
    rows = model.predict([photo(40, 50), photo(50, 40, 1)], top_k=7)
    for row, probabilities in zip(rows, expected, strict=True):
        assert [p.probability for p in row] == sorted((p.probability for p in row), reverse=True)
        assert {p.index for p in row} == set(range(7))
        assert sum(p.probability for p in row) == pytest.approx(1)
        for prediction in row:
            assert prediction.probability == pytest.approx(probabilities[prediction.index].item(), abs=1e-6)
            assert prediction.label == LABELS[prediction.index]
    assert [row[:2] for row in rows] == model.predict([photo(40, 50), photo(50, 40, 1)], top_k=2)
    assert [len(row) for row in model.predict(photo(40, 50))] == [5]
    assert model.predict(photo(40, 50), top_k=100) == rows[:1]


def test_a_class_without_a_name_has_a_number() -> None:
    timm = pytest.importorskip("timm")
    model = vs.load(timm.create_model("test_vit", num_classes=3))
    assert {p.label for p in model.predict(photo(40, 50))[0]} == {"class 0", "class 1", "class 2"}


@pytest.mark.parametrize("top_k", [0, -1])
def test_no_classes_is_no_question(folder: Path, top_k: int) -> None:
    with pytest.raises(vs.CallError, match=f"top_k is {top_k}"):
        vs.load(folder).predict(photo(40, 50), top_k=top_k)


def test_weights_that_answer_nan_are_said_to(folder: Path) -> None:
    model = vs.load(folder)
    with torch.no_grad():
        model.module.classifier.bias[0] = torch.nan
    with pytest.raises(WorkError, match="answered with NaN or infinity"):
        model.predict(photo(40, 50))


def test_pictures_of_mixed_sizes_and_kinds_give_what_each_gives_alone(folder: Path, tmp_path: Path) -> None:
    model = vs.load(folder)
    photo(33, 90, 2).save(tmp_path / "third.png")
    mixed = [photo(80, 40), np.asarray(photo(40, 80, 1)), tmp_path / "third.png", str(tmp_path / "third.png")]
    together = vs.rollout(model, mixed)
    assert len(together) == 4
    rows = model.predict(mixed)
    for i, alone in enumerate(mixed):
        torch.testing.assert_close(together.values[i : i + 1], vs.rollout(model, alone).values)
        assert together.pictures[i].photo.size == [(80, 40), (40, 80), (33, 90), (33, 90)][i]
        (row,) = model.predict(alone)
        assert [p.index for p in row] == [p.index for p in rows[i]]
        assert [p.probability for p in row] == pytest.approx([p.probability for p in rows[i]])
    assert torch.equal(together.values[2], together.values[3])
    assert not torch.allclose(together.values[0], together.values[1])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 3, 32, 32).index_fill(-1, torch.tensor(5), torch.nan), "NaN or infinity"),
        (torch.zeros(1, 3, 32, 32).index_fill(-1, torch.tensor(5), torch.inf), "NaN or infinity"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\) is no batch of pictures"),
        (torch.zeros(1, 32, 32, 3), r"\(1, 32, 32, 3\) is no batch of pictures"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\) is no batch of pictures"),
        (torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\) is no batch of pictures"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8 is not preprocessed"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64 is not preprocessed"),
        (torch.zeros(1, 3, 32, 36), "32×36 pixels is not a whole number of patches of 8×8.*is 32×32"),
        (torch.zeros(1, 3, 5, 32), "5×32 pixels is not a whole number of patches of 8×8.*is 8×32"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{tuple(value.shape)}-{value.dtype}",
)
def test_a_tensor_that_is_no_batch_of_pictures(folder: Path, tensor: Tensor, message: str) -> None:
    model = vs.load(folder)
    for ask in (model.predict, lambda images: vs.capture(model, images)):
        with pytest.raises(vs.CallError, match=message) as caught:
            ask(tensor)
        assert "\n" not in str(caught.value)


def test_no_picture_and_no_such_picture(folder: Path) -> None:
    model = vs.load(folder)
    with pytest.raises(vs.CallError, match="no picture was given"):
        model.predict([])
    with pytest.raises(PictureNotFoundError, match=r"nowhere\.png does not exist"):
        model.predict([photo(40, 40), "nowhere.png"])


def test_a_double_tensor_becomes_what_the_model_takes(folder: Path) -> None:
    model = vs.load(folder)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model.prepare(pixels)[0].dtype == model.dtype == torch.float32
    assert model.predict(pixels) == model.predict(pixels.float())


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_as_before(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_vit().train()
    module.vit.layers[1].eval()
    before = {name: child.training for name, child in module.named_modules()}
    assert len(set(before.values())) == 2
    model = vs.load(module)
    during: list[bool] = []
    module.classifier.register_forward_hook(lambda *_: during.append(any(c.training for c in module.modules())))
    if fails:
        monkeypatch.setattr(module.classifier, "forward", lambda _: (_ for _ in ()).throw(ArithmeticError("no")))
    for ask in (model.predict, lambda images: vs.capture(model, images)):
        try:
            ask(photo(40, 40))
        except ArithmeticError:
            assert fails
    assert during == ([] if fails else [False, False])
    assert {name: child.training for name, child in module.named_modules()} == before


# Models without attention


def resnets() -> dict[str, Any]:
    def of_transformers() -> vs.VisionModel:
        import transformers

        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=7)
        return vs.load(transformers.ResNetForImageClassification(config), image_size=64)

    return {
        "torchvision": lambda: vs.load("torchvision:resnet18", pretrained=False, image_size=(64, 96)),
        "timm": lambda: vs.load("timm:test_resnet", pretrained=False),
        "transformers": of_transformers,
    }


@pytest.mark.parametrize("library", resnets())
def test_a_convolutional_network_predicts_and_has_no_attention(library: str) -> None:
    pytest.importorskip(library)
    torch.manual_seed(0)
    model = resnets()[library]()
    (row,) = model.predict(photo(70, 50), top_k=3)
    assert 1 > row[0].probability >= row[1].probability >= row[2].probability > 0
    with pytest.raises(NoAttentionError, match="has no attention that could be seen"):
        vs.capture(model, photo(70, 50))


# Modules of nobody knows where


class ByHand(nn.Module):
    """Attention as it is written in a hundred notebooks."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(16, 48), nn.Linear(16, 16), fused

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Torchs(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(16, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens, tokens, tokens, need_weights=False)[0]


class Homemade(nn.Module):
    """A vision transformer of no library: a CLS token, eight-pixel patches, two layers."""

    def __init__(self, kind: str, answer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.head = nn.Linear(16, 5)
        by_hand = [ByHand(kind == "fused") for _ in range(2)]
        self.stages = nn.ModuleList(Torchs() if kind == "torch" else layer for layer in by_hand)
        self.answer = answer or (lambda logits: logits)
        with torch.no_grad():
            for layer, source in zip(self.stages, by_hand, strict=True):
                source.qkv.weight.mul_(4)
                if kind == "torch":
                    layer.in_proj_weight.copy_(source.qkv.weight)
                    layer.in_proj_bias.copy_(source.qkv.bias)
                    layer.out_proj.load_state_dict(source.out.state_dict())

    def forward(self, pixels: Tensor) -> Any:
        tokens = self.embed(pixels).flatten(2).mT
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        for layer in self.stages:
            tokens = tokens + layer(tokens)
        return self.answer(self.head(tokens[:, 0]))


def expected_attention(pixels: Tensor) -> list[Tensor]:
    """The attention of every Homemade, from its definition."""
    module = Homemade("by hand").double()
    tokens = module.embed(pixels.double()).flatten(2).mT
    tokens = torch.cat([module.cls.expand(len(tokens), -1, -1), tokens], dim=1)
    maps = []
    for layer in module.stages:
        query, key, _ = layer.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = (query @ key.mT / 8**0.5).exp()
        maps.append((scores / scores.sum(-1, keepdim=True)).float().detach())
        tokens = tokens + layer(tokens)
    return maps


HOMEMADE = ["torch", "by hand", "fused"]
LAYOUT: dict[str, Any] = {"patch_size": 8, "prefix": ("cls",), "readout": "cls"}


@pytest.mark.parametrize("layout", [{}, LAYOUT], ids=["bare", "with layout"])
@pytest.mark.parametrize("kind", HOMEMADE)
def test_a_foreign_module_is_seen(kind: str, layout: dict[str, Any]) -> None:
    pixels = torch.randn(2, 3, 32, 24)
    trace = vs.capture(vs.load(Homemade(kind), **layout), pixels)
    assert [step.module for step in trace.steps] == ["stages.0", "stages.1"]
    for layer, expected in enumerate(expected_attention(pixels)):
        torch.testing.assert_close(trace.attention(layer), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", HOMEMADE)
def test_with_its_layout_given_a_foreign_module_is_rolled_out(kind: str) -> None:
    pixels = torch.randn(2, 3, 32, 24)
    model = vs.load(Homemade(kind), **LAYOUT)
    assert (model.library, model.name) == ("module", "Homemade")
    row = torch.eye(13)[:1].expand(2, 1, 13)
    for attention in reversed(expected_attention(pixels)):
        row = row @ (attention.mean(1) + torch.eye(13)) / 2
    torch.testing.assert_close(vs.rollout(model, pixels).values, row[:, 0, 1:].unflatten(-1, (4, 3)), atol=1e-6, rtol=0)


def test_without_its_layout_a_foreign_module_says_what_to_pass() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    model = vs.load(Homemade("fused"))
    trace = vs.capture(model, pixels)
    for ask in (lambda: trace.map(-1), lambda: vs.rollout(trace), lambda: vs.rollout(model, pixels)):
        with pytest.raises(vs.CallError, match=r"pass patch_size, prefix and readout to vitscope\.load"):
            ask()


def test_a_foreign_module_takes_photos_once_its_size_is_known() -> None:
    with pytest.raises(vs.CallError, match=r"pass a tensor .* or image_size to vitscope\.load"):
        vs.capture(vs.load(Homemade("fused")), photo(40, 40))
    model = vs.load(Homemade("fused"), image_size=(32, 24), **LAYOUT)
    pixels, _ = model.prepare(photo(40, 50))
    assert pixels.shape == (1, 3, 32, 24)
    assert pixels.abs().max() <= 1
    assert vs.rollout(model, photo(40, 50)).values.shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("readout", "expected"),
    [
        ("cls", [1.0, 0, 0, 0, 0]),
        ("patches", [0, 0.25, 0.25, 0.25, 0.25]),
        ({"cls": 0.5, "patches": 0.5}, [0.5, 0.125, 0.125, 0.125, 0.125]),
        ("tokens", [0.2] * 5),
    ],
    ids=str,
)
def test_the_readout_that_was_given_is_the_one_used(readout: Any, expected: list[float]) -> None:
    model = vs.load(Homemade("fused"), **(LAYOUT | {"readout": readout}))
    torch.testing.assert_close(vs.capture(model, torch.randn(1, 3, 16, 16)).readout, torch.tensor([expected]))


@pytest.mark.parametrize(
    "layout",
    [
        {"patch_size": 8},
        {"patch_size": 8, "readout": "cls"},
        {"patch_size": 8, "readout": {"patches": 0.5}},
        {"patch_size": 8, "prefix": ("cls",), "readout": "register_1"},
        {"patch_size": 0, "readout": "patches"},
        {"prefix": ("cls",)},
        {"readout": "patches"},
    ],
    ids=str,
)
def test_half_a_layout_is_refused(layout: dict[str, Any]) -> None:
    refusal(vs.CallError, Homemade("fused"), **layout)


def test_what_a_foreign_module_answers_is_classes_only_if_it_looks_like_them() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    plain = vs.load(Homemade("fused")).predict(pixels)
    assert vs.load(Homemade("fused", lambda logits: {"logits": logits})).predict(pixels) == plain
    for answer in (lambda logits: logits[:, None], lambda logits: (logits,), lambda _: None, lambda _: {"loss": 1}):
        model = vs.load(Homemade("fused", answer))
        assert vs.capture(model, pixels).num_layers == 2
        with pytest.raises(vs.CallError, match="Homemade has no classifier"):
            model.predict(pixels)


def test_a_compiled_module_is_read_through_what_was_compiled() -> None:
    module = tiny_vit()
    pixels = torch.randn(1, 3, 32, 32)
    expected = vs.rollout(vs.load(module), pixels).values
    model = vs.load(torch.compile(module))
    assert model.module is module
    assert torch.equal(vs.rollout(model, pixels).values, expected)


# The model that comes along


@pytest.mark.skipif(not (bundled_path("vit-nano") / "config.json").exists(), reason="vit-nano is not in this tree")
def test_vit_nano_is_there_without_a_network(chelsea: np.ndarray) -> None:
    model = vs.load("vit-nano")
    assert repr(model) == "<VisionModel vit-nano (transformers) 32×32 px, patches of 4×4>"
    assert model.labels is not None
    assert set(model.labels) == {
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    }
    (row,) = model.predict(chelsea, top_k=10)
    assert sum(p.probability for p in row) == pytest.approx(1)
    assert vs.rollout(model, chelsea).values.shape == (1, 8, 8)
    size = sum(file.stat().st_size for file in bundled_path("vit-nano").iterdir())
    assert size < 12_000_000
