"""load(): names, folders and live modules, and one line for everything else."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import TINY
from tests.helpers.tiny import LABELS, photo, refusal, tiny_vit
from vitscope.errors import ModelUnavailableError, UnknownModelError
from vitscope.models import bundled_path

# Local folders


@pytest.mark.parametrize("name", ["vit-nano", "vit-tiny"])
def test_a_folder_can_have_the_name_of_a_bundled_model(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path / name)
    assert vs.load(tmp_path / name).labels == LABELS
    assert vs.load(str(tmp_path / name)).labels == LABELS


def test_a_live_model_has_the_name_of_its_folder(folder: Path) -> None:
    assert vs.load(vs.load(folder).module).name == "tiny-vit"
    assert vs.load(tiny_vit()).name == "ViTForImageClassification"


@pytest.mark.parametrize("model", [None, 5, b"vit"], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_other_types_than_names_and_modules_are_refused(model: Any) -> None:
    assert "a model is a name" in refusal(vs.CallError, model)


def test_a_folder_contains_the_model_that_was_saved(folder: Path) -> None:
    import transformers

    original, image = tiny_vit(), photo(50, 40)
    processor = transformers.ViTImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        expected = original(**processor(image, return_tensors="pt")).logits
    for source in (folder, str(folder)):
        model = vs.load(source)
        pixels, _ = model.prepare(image)
        with torch.no_grad():
            torch.testing.assert_close(model.forward(pixels), expected)
        assert model.labels == LABELS
        assert (model.name, model.library) == (str(folder), "transformers")
        assert not any(child.training for child in model.module.modules())
    assert repr(model) == f"<VisionModel {folder} (transformers) 32×32 px, patches of 8×8>"


def test_a_folder_without_a_processor_needs_its_preprocessing_passed(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    model = vs.load(tmp_path)
    assert model.preprocessing is None
    with pytest.raises(
        vs.CallError, match=r"has no preprocessor_config\.json.*image_size .* mean and std, or processor"
    ):
        model.predict(photo(40, 40))
    assert len(model.predict(torch.zeros(1, 3, 32, 32))) == 1
    named = vs.load(tmp_path, image_size=32, mean=0.5, std=0.25).preprocessing
    assert named is not None
    assert (named.size, named.mean, named.std, named.fit) == ((32, 32), (0.5,) * 3, (0.25,) * 3, "squash")


def test_a_model_saved_without_a_classifier_has_none(tmp_path: Path) -> None:
    tiny_vit().vit.save_pretrained(tmp_path)
    model = vs.load(tmp_path)
    assert model.labels is None
    with pytest.raises(vs.UnsupportedModelError, match="has no classifier: it returns features, not classes"):
        model.predict(torch.zeros(1, 3, 32, 32))
    assert vs.rollout(model, torch.zeros(1, 3, 32, 32)).values.shape == (1, 4, 4)


def test_random_weights_depend_on_torchs_seed(folder: Path) -> None:
    def weights(seed: int | None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return vs.load(folder, pretrained=seed is None).module.classifier.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1), weights(None))
    assert torch.equal(weights(None), tiny_vit().classifier.weight)


@pytest.mark.slow
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
def test_a_model_type_means_its_default_configuration(
    monkeypatch: pytest.MonkeyPatch, model_type: str, config_name: str, prefix: tuple[str, ...], has_classifier: bool
) -> None:
    from vitscope.models.backends.transformers.backend import transformers

    def default() -> Any:
        return getattr(transformers, config_name)(**(TINY | {"image_size": 32, "patch_size": 8}))

    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {model_type: default})
    model = vs.load(model_type, pretrained=False)
    assert vs.capture(model, photo(40, 50)).prefix_names == prefix
    if has_classifier:
        assert len(model.predict(photo(40, 50), top_k=9)[0]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16, "float64"], ids=str)
def test_a_precision_is_kept_and_results_are_float32(folder: Path, dtype: str | torch.dtype) -> None:
    image = photo(40, 50)
    full, model = vs.load(folder), vs.load(folder, dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    result = vs.rollout(model, image)
    assert result.values.dtype == vs.capture(model, image).map(-1).dtype == torch.float32
    torch.testing.assert_close(result.values, vs.rollout(full, image).values, atol=1e-3, rtol=0)
    for prediction, expected in zip(
        sorted(model.predict(image, 7)[0], key=lambda p: p.index),
        sorted(full.predict(image, 7)[0], key=lambda p: p.index),
        strict=True,
    ):
        assert prediction.probability == pytest.approx(expected.probability, abs=5e-3)


def test_weights_are_on_the_chosen_device(folder: Path) -> None:
    assert vs.load(folder, device="cpu").device == vs.load(folder, device=torch.device("cpu")).device
    assert vs.load(folder, device="meta").device == torch.device("meta")


@pytest.mark.parametrize("device", ["gpu", "cuda:977"])
def test_a_missing_device_is_refused_in_one_line(folder: Path, device: str) -> None:
    message = refusal(ModelUnavailableError, folder, device=device)
    assert message.startswith(f"device {device!r} cannot be used")
    assert "usable here: cpu" in message
    assert "Expected one of" not in message


@pytest.mark.parametrize("dtype", ["int8", "half precision", "nn", torch.int8], ids=str)
def test_an_invalid_dtype_is_refused(folder: Path, dtype: str | torch.dtype) -> None:
    assert "pass float32, bfloat16 or float16" in refusal(vs.CallError, folder, dtype=dtype)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"dtype": "float32"}], ids=str)
def test_a_live_module_is_not_moved(options: dict[str, Any]) -> None:
    assert "move it with its own .to() first" in refusal(vs.CallError, tiny_vit(), **options)


@pytest.mark.parametrize("options", [{"patch_size": 8}, {"prefix": ("cls",)}, {"readout": "cls"}], ids=str)
def test_a_layout_is_not_for_a_named_model(folder: Path, options: dict[str, Any]) -> None:
    assert "only for a live module: omit them" in refusal(vs.CallError, folder, **options)


# Names without a model


def test_a_misspelled_name_suggests_the_right_one() -> None:
    for name in ("vit-nanno", "vitnano", "vit_nano"):
        assert refusal(UnknownModelError, name) == f"unknown model {name!r}: did you mean 'vit-nano'?"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("vit_small_patch16_224", "did you mean 'timm:vit_small_patch16_224'?"),
        ("vit_small_patch16_224.augreg_in1k", "did you mean 'timm:vit_small_patch16_224.augreg_in1k'?"),
        ("swin_t", "did you mean 'torchvision:swin_t'?"),
        ("resnet18", "did you mean 'timm:resnet18' or 'torchvision:resnet18'?"),
        ("hf-hub:timm/a.b", "for a repository or folder of timm, pass 'timm:hf-hub:timm/a.b'"),
        ("local-dir:folder", "for a repository or folder of timm, pass 'timm:local-dir:folder'"),
    ],
)
def test_a_name_without_the_prefix_of_its_library_suggests_the_prefix(
    name: str, suggestion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert refusal(UnknownModelError, name) == f"unknown model {name!r}: {suggestion}"


@pytest.mark.parametrize("name", ["best.pt", "/no/such/folder/last.ckpt"])
def test_a_missing_file_of_weights_is_not_looked_up_as_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    message = refusal(UnknownModelError, name)
    assert message.startswith(f"{name} does not exist; a file of weights needs an architecture too: vs.load('timm:")
    assert message.endswith("--model timm:<name> --weights file")


def test_a_name_that_no_library_has_is_refused_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert "foo_bar is not in the local cache" in refusal(ModelUnavailableError, "foo_bar")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_name_that_the_library_does_not_know_is_refused(library: str) -> None:
    pytest.importorskip(library)
    assert f"{library} has no model 'foo'" in refusal(UnknownModelError, f"{library}:foo")
    assert f"{library} has no model ''" in refusal(UnknownModelError, f"{library}:")


def test_similar_names_of_a_library_are_suggested() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    assert "did you mean vit_tiny_patch16_224," in refusal(UnknownModelError, "timm:vit_tiny_patch16_24")
    assert "did you mean resnet18," in refusal(UnknownModelError, "torchvision:resnet_18")


@pytest.mark.parametrize("pretrained", [True, False])
def test_unknown_weights_of_timm_are_refused(pretrained: bool) -> None:
    pytest.importorskip("timm")
    message = refusal(UnknownModelError, "timm:test_vit.nope", pretrained=pretrained)
    assert message == "timm has no weights 'test_vit.nope': available: test_vit.r160_in1k"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./models", "../models", "~/models", "a/b/c", "detectron:vit", "a\nb"]
)
def test_an_impossible_name_lists_the_possible_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(UnknownModelError, name)
    for example in ("vit-nano", "local transformers folder", "hub id", "timm:<name>", "torchvision:<name>"):
        assert example in message


def test_folders_without_a_model_are_refused(tmp_path: Path, folder: Path) -> None:
    assert f"{tmp_path} is not a transformers folder" in refusal(UnknownModelError, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert f"{tmp_path} cannot be loaded" in refusal(ModelUnavailableError, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    assert f"{tmp_path} cannot be loaded" in refusal(ModelUnavailableError, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path} is not a transformers folder" in refusal(UnknownModelError, tmp_path)


def test_a_model_without_image_input_is_refused(tmp_path: Path) -> None:
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
        assert "BertModel, which does not take images" in refusal(UnknownModelError, source)


# Other sizes


@pytest.mark.slow
@pytest.mark.parametrize("size", [48, (48, 48), (32, 48), (64, 24)], ids=str)
def test_transformers_at_another_size(folder: Path, size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    model = vs.load(folder, image_size=size)
    pixels, (image,) = model.prepare(photo(70, 50))
    assert pixels.shape == (1, 3, height, width)
    assert image.box == (0, 0, 70, 50)
    with torch.no_grad():
        expected = tiny_vit()(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model.forward(pixels), expected)
    trace = vs.capture(model, photo(70, 50))
    assert trace.steps[0].grid == vs.Grid(height // 8, width // 8, 1)
    assert vs.rollout(trace).values.shape == (1, height // 8, width // 8)


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 96, (64, 96)], ids=str)
def test_timm_at_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | tuple[int, int] | None
) -> None:
    """Position embeddings are resampled, all other weights are those of the file in timm's registry."""
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


def test_timm_refuses_a_size_for_models_without_one() -> None:
    pytest.importorskip("timm")
    assert "does not support image_size" in refusal(vs.CallError, "timm:test_resnet", pretrained=False, image_size=64)


@pytest.fixture
def small_torchvision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torchvision's named vision transformers small."""
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
    monkeypatch.setattr("vitscope.models.backends.torchvision.backend.host_responds", lambda _: True)
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


def test_torchvision_uses_the_size_of_the_pretrained_weights(
    small_torchvision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of vit_h_14 were trained at 518 pixels; the default of its class is 224."""
    trained = small_torchvision.models.vit_h_14(image_size=518)
    monkeypatch.setattr(
        small_torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: trained.state_dict()
    )
    model = vs.load("torchvision:vit_h_14")
    assert model.preprocessing is not None
    assert model.preprocessing.size == (518, 518)
    assert torch.equal(model.module.encoder.pos_embedding, trained.encoder.pos_embedding)


def test_torchvision_refuses_unsupported_sizes(small_torchvision: Any) -> None:
    assert "square images only, not 32×64" in refusal(vs.CallError, "torchvision:vit_b_16", image_size=(32, 64))
    assert "65 pixels" in refusal(vs.CallError, "torchvision:vit_b_16", image_size=65, pretrained=False)
    module = small_torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 16)
    assert "takes 32×32 pixels, not 48×48" in refusal(vs.CallError, module, image_size=48)
    assert vs.load(module, image_size=32).preprocessing == vs.load(module).preprocessing


@pytest.mark.parametrize("size", [0, -8, (32,), (32, 0), (8, 8, 8)], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_an_invalid_size_is_refused(folder: Path, size: Any) -> None:
    assert "image_size is" in refusal(vs.CallError, folder, image_size=size)


# The bundled models


@pytest.mark.slow
@pytest.mark.parametrize(("name", "patch", "grid"), [("vit-nano", "4×4", (8, 8)), ("swin-nano", "2×2", (16, 16))])
def test_bundled_models_work_without_a_network(
    chelsea: np.ndarray, name: str, patch: str, grid: tuple[int, int]
) -> None:
    model = vs.load(name)
    assert repr(model) == f"<VisionModel {name} (transformers) 32×32 px, patches of {patch}>"
    assert model.labels is not None
    classes = "airplane automobile bird cat deer dog frog horse ship truck"
    assert sorted(model.labels) == classes.split()
    (row,) = model.predict(chelsea, top_k=10)
    assert sum(p.probability for p in row) == pytest.approx(1)
    assert vs.rollout(model, chelsea).values.shape == (1, *grid)
    assert sum(file.stat().st_size for file in bundled_path(name).iterdir()) < 12_000_000
