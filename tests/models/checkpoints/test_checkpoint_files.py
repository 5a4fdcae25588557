"""Transformers folders: every weight of the model comes from the file, or the folder is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import TINY
from tests.helpers.tiny import refusal, tiny_vit
from vitscope.errors import CallError, ModelUnavailableError, VitscopeWarning
from vitscope.models.backends.transformers import backend as library

VISION: dict[str, Any] = TINY | {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
MAE = {
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 48,
}


def build(class_name: str, config_name: str, settings: dict[str, Any], **options: Any) -> nn.Module:
    """Return a seeded model without weights of exactly zero or one."""
    torch.manual_seed(0)
    module = getattr(transformers, class_name)(getattr(transformers, config_name)(**settings), **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def text_and_image(class_name: str, config_name: str) -> nn.Module:
    return build(class_name, config_name, {"vision_config": VISION, "text_config": TEXT, "num_labels": 7})


def with_decoder(class_name: str, config_name: str, settings: dict[str, Any] = VISION) -> nn.Module:
    return build(class_name, config_name, settings | {"encoder_stride": 4 if settings is SWIN else 8})


# Models that people save, and the submodule that vitscope runs.
SAVED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "vit": (lambda: build("ViTForImageClassification", "ViTConfig", VISION), lambda m: m),
    "vit-bare": (lambda: build("ViTModel", "ViTConfig", VISION), lambda m: m),
    "vit-no-pooler": (lambda: build("ViTModel", "ViTConfig", VISION, add_pooling_layer=False), lambda m: m),
    "vit-masked": (lambda: with_decoder("ViTForMaskedImageModeling", "ViTConfig"), lambda m: m.vit),
    "vit-mae": (lambda: build("ViTMAEForPreTraining", "ViTMAEConfig", VISION | MAE), lambda _: None),
    "deit": (lambda: build("DeiTForImageClassification", "DeiTConfig", VISION), lambda m: m),
    "deit-teacher": (lambda: build("DeiTForImageClassificationWithTeacher", "DeiTConfig", VISION), lambda m: m),
    "deit-masked": (lambda: with_decoder("DeiTForMaskedImageModeling", "DeiTConfig"), lambda m: m.deit),
    "dinov2": (lambda: build("Dinov2Model", "Dinov2Config", VISION), lambda m: m),
    "dinov2-head": (lambda: build("Dinov2ForImageClassification", "Dinov2Config", VISION), lambda m: m),
    "dinov3": (lambda: build("DINOv3ViTModel", "DINOv3ViTConfig", VISION), lambda m: m),
    "beit": (
        lambda: build("BeitForImageClassification", "BeitConfig", VISION | {"use_relative_position_bias": True}),
        lambda m: m,
    ),
    "beit-masked": (lambda: build("BeitForMaskedImageModeling", "BeitConfig", VISION), lambda m: m.beit),
    "clip": (lambda: text_and_image("CLIPModel", "CLIPConfig"), lambda m: m.vision_model),
    "clip-vision": (lambda: build("CLIPVisionModel", "CLIPVisionConfig", VISION), lambda m: m),
    "clip-projected": (
        lambda: build("CLIPVisionModelWithProjection", "CLIPVisionConfig", VISION),
        lambda m: m.vision_model,
    ),
    "clip-head": (lambda: text_and_image("CLIPForImageClassification", "CLIPConfig"), lambda m: m),
    "siglip": (lambda: text_and_image("SiglipModel", "SiglipConfig"), lambda m: m.vision_model),
    "siglip-vision": (lambda: build("SiglipVisionModel", "SiglipVisionConfig", VISION), lambda m: m),
    "siglip-head": (lambda: text_and_image("SiglipForImageClassification", "SiglipConfig"), lambda m: m),
    "swin": (lambda: build("SwinForImageClassification", "SwinConfig", SWIN), lambda m: m),
    "swin-masked": (lambda: with_decoder("SwinForMaskedImageModeling", "SwinConfig", SWIN), lambda m: m.swin),
    "swinv2": (lambda: build("Swinv2ForImageClassification", "Swinv2Config", SWIN), lambda m: m),
}
HEADS = ("vit", "deit", "deit-teacher", "dinov2-head", "beit", "clip-head", "siglip-head", "swin", "swinv2")
# One model per family, for damaged copies.
FAMILIES = ("vit", "vit-bare", "deit", "dinov2", "dinov3", "beit", "clip-vision", "siglip-vision", "swin", "vit-masked")

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), device="cpu")


def saved(name: str, folder: Path, **options: Any) -> nn.Module:
    module = SAVED[name][0]()
    module.save_pretrained(folder, **options)
    return module


def output(module: Any) -> Tensor:
    with torch.no_grad():
        returned = module(pixel_values=PIXELS)
    logits = getattr(returned, "logits", None)
    return returned.last_hidden_state if logits is None else logits


def load(folder: Path, **options: Any) -> vs.VisionModel:
    settings: dict[str, Any] = {"pretrained": True, "image_size": None, "dtype": None}
    return library.load(str(folder), **(settings | options))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one file", "shards", "torch", "torch shards"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_models_are_loaded_without_warnings(name: str, form: str, tmp_path: Path) -> None:
    """pytest turns every warning into an error."""
    options = {"max_shard_size": "20KB"} if "shards" in form else {}
    module = saved(name, tmp_path, **options)
    if "torch" in form:
        as_torch(tmp_path)
    files = {file.suffix for file in tmp_path.iterdir()} - {".json"}
    assert files == ({".bin"} if "torch" in form else {".safetensors"})
    model = load(tmp_path)
    expected = SAVED[name][1](module)
    if expected is not None:  # ViT-MAE hides patches at random
        assert torch.equal(output(model.module), output(expected))
    assert not any(parameter.is_meta for parameter in model.module.parameters())
    if getattr(expected, "pooler", None) is not None:
        assert same_state(model.module.pooler, expected.pooler)


def same_state(first: nn.Module, second: nn.Module) -> bool:
    weights, expected = first.state_dict(), second.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)


def as_torch(folder: Path) -> None:
    """Rewrite the weights in torch's format, as older versions of transformers did."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / f"{file.stem.replace('model', 'pytorch_model', 1)}.bin")
        file.unlink()
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {
            key: shard.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            for key, shard in content["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_features_leave_the_classifier_out(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    model = load(tmp_path, output="features")
    assert model.labels is None
    assert model.forward(PIXELS) is None
    assert model.features(PIXELS).ndim == 2
    assert not any("classifier" in key for key in model.module.state_dict())


@pytest.mark.parametrize("output", ["logits", "", 5])
@pytest.mark.usefixtures("unchecked")
def test_another_output_is_refused(output: Any, folder: Path) -> None:
    with pytest.raises(CallError, match='pass "features"'):
        load(folder, output=output)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_a_file_without_the_classifier_is_refused(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    rewrite(tmp_path, lambda state: {key: t for key, t in state.items() if "classifier" not in key})
    message = refusal(ModelUnavailableError, tmp_path)
    assert 'output="features" loads it without a classifier' in message
    assert "classifier" in message.split("missing")[1]
    assert load(tmp_path, output="features").labels is None


PREFIXES = ("model.", "module.", "net.", "backbone.", "vit.", "module.model.", "anything.")


@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["vit", "vit-bare", "dinov2", "swin", "beit", "deit-masked", "siglip-vision"])
def test_a_prefix_is_removed_with_a_warning(name: str, prefix: str, tmp_path: Path) -> None:
    module = saved(name, tmp_path)
    rewrite(tmp_path, lambda state: {f"{prefix}{key}": tensor for key, tensor in state.items()})
    expected = SAVED[name][1](module)
    if prefix == "vit." and name in ("vit", "vit-bare"):
        model = load(tmp_path)  # transformers removes its own prefix of the bare model in a class with a head
    else:
        with pytest.warns(VitscopeWarning, match=f"the prefix '{prefix}' was removed from every name"):
            model = load(tmp_path)
    assert torch.equal(output(model.module), output(expected))
    assert vs.load(model.module).name == tmp_path.name


def norm(state: dict[str, Tensor]) -> str:
    return next(key for key in sorted(state) if "norm" in key and key.endswith("weight"))


def last_layer(state: dict[str, Tensor]) -> str:
    layers = [
        path for key in sorted(state) for path in [key.split(".")] if "layer" in key and any(map(str.isdigit, path))
    ]
    last = layers[-1]
    return ".".join(last[: next(i for i, name in enumerate(last) if name.isdigit()) + 1]) + "."


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "one norm missing": (lambda s: {key: t for key, t in s.items() if key != norm(s)}, "1 missing"),
    "a layer missing": (lambda s: {key: t for key, t in s.items() if not key.startswith(last_layer(s))}, "missing"),
    "another shape": (lambda s: s | {norm(s): s[norm(s)][:-1].contiguous()}, "1 of another shape"),
    "a weight more": (lambda s: s | {"extra.weight": torch.ones(2, 2, device="cpu")}, "1 unexpected (extra.weight)"),
    "whole numbers": (
        lambda s: {key: (t * 100).to(torch.int8) for key, t in s.items()},
        "not floating-point numbers",
    ),
    "one of whole numbers": (lambda s: s | {norm(s): s[norm(s)].to(torch.int64)}, "1 weights are not floating-point"),
    "another name for one": (
        lambda s: {(f"x.{key}" if key == norm(s) else key): t for key, t in s.items()},
        "unexpected (x.",
    ),
    "a prefix and one missing": (lambda s: {f"model.{key}": t for key, t in s.items() if key != norm(s)}, "missing"),
    "a prefix on half": (
        lambda s: {(f"odd.{key}" if i % 2 else key): t for i, (key, t) in enumerate(sorted(s.items()))},
        "unexpected (odd.",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_runs_on_weights_that_were_not_in_the_file(name: str, damage: str, tmp_path: Path) -> None:
    change, difference = DAMAGE[damage]
    saved(name, tmp_path)
    rewrite(tmp_path, change)
    message = refusal(ModelUnavailableError, tmp_path)
    assert message.startswith(f"{tmp_path} cannot be loaded: ")
    assert difference in message


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("name", ["vit", "vit-bare", "deit", "dinov2", "dinov3", "beit", "siglip-vision"])
def test_a_configuration_with_another_number_of_layers_is_refused(name: str, layers: int, tmp_path: Path) -> None:
    saved(name, tmp_path)
    configure(tmp_path, num_hidden_layers=layers, out_features=["stage1"], out_indices=[1])
    message = refusal(ModelUnavailableError, tmp_path)
    assert ("missing" if layers == 5 else "unexpected") in message


@pytest.mark.parametrize("architectures", [None, [], ["ViTModel"], ["NoSuchClass"], ["AutoConfig"], [5]])
def test_leftover_weights_must_belong_to_the_saved_class(architectures: Any, tmp_path: Path) -> None:
    saved("vit-masked", tmp_path)
    configure(tmp_path, architectures=architectures)
    message = refusal(vs.VitscopeError, tmp_path)
    assert "unexpected (decoder." in message or "config.json" in message or "missing" in message


def test_a_pooling_layer_must_be_complete_or_absent(tmp_path: Path) -> None:
    saved("vit-bare", tmp_path)
    rewrite(tmp_path, lambda state: {key: t for key, t in state.items() if key != "pooler.dense.bias"})
    assert "1 missing (pooler.dense.bias)" in refusal(ModelUnavailableError, tmp_path)
    rewrite(tmp_path, lambda state: {key: t for key, t in state.items() if "pooler" not in key})
    model = load(tmp_path)
    assert model.module.pooler is None
    assert torch.equal(model.features(PIXELS), output(model.module)[:, 0])


def test_buffers_of_older_files_may_be_left_over(tmp_path: Path) -> None:
    """Older versions saved CLIP's position_ids and Swin's relative_position_index."""
    module = saved("clip-vision", tmp_path)
    rewrite(tmp_path, lambda s: s | {"embeddings.position_ids": torch.arange(17, device="cpu")[None]})
    assert torch.equal(output(load(tmp_path).module), output(module))
    module = saved("swin", tmp_path)
    name = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    rewrite(tmp_path, lambda s: s | {name: torch.zeros(16, 16, dtype=torch.int64, device="cpu")})
    assert torch.equal(output(load(tmp_path).module), output(module))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved("vit", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(ModelUnavailableError, tmp_path)


def test_the_precision_is_applied(tmp_path: Path) -> None:
    build("ViTForImageClassification", "ViTConfig", VISION).to(torch.bfloat16).save_pretrained(tmp_path)
    assert vs.load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_with_more_than_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weights": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    assert "never runs code from a file" in refusal(ModelUnavailableError, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_random_weights_need_no_file(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert len(load(tmp_path, pretrained=False).predict(PIXELS, top_k=9)[0]) == 7
