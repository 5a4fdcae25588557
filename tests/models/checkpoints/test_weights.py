"""Weights files: read without unpickling, and they fill a module completely or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import TINY, from_timm, from_torchvision
from tests.helpers.tiny import photo, tiny_vit
from vitscope.errors import ModelUnavailableError, VitscopeWarning
from vitscope.models.checkpoints.weights import compare, fit_weights
from vitscope.models.checkpoints.weights_file import read_weights


def small_swin() -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=7
    )
    return transformers.SwinForImageClassification(config)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "transformers-vit": tiny_vit,
    "transformers-swin": small_swin,
    "timm-vit": from_timm("vit_small_patch16_224"),
    "timm-swin": from_timm(
        "swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), embed_dim=16, depth=None, patch_size=4
    ),
    "timm-beit": from_timm("beit_base_patch16_224"),
    "torchvision-vit": from_torchvision,
}
every_module = pytest.mark.parametrize("name", MODULES)


def module_of(name: str) -> nn.Module:
    pytest.importorskip(name.split("-")[0])
    torch.manual_seed(0)
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def variant(name: str) -> nn.Module:
    """Return the same class with other weights."""
    module = module_of(name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    return module


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelUnavailableError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files

WEIGHTS = {"layer.weight": torch.ones(2, 3, device="cpu"), "layer.bias": torch.zeros(2, device="cpu")}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
def test_tensors_are_read_from_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(WEIGHTS, file)
    else:
        torch.save(WEIGHTS, file)
    assert equal(read_weights(file), WEIGHTS)
    assert equal(read_weights(str(file)), WEIGHTS)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 3, device="cpu")}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "name",
    ["state_dict", "model", "model_state_dict", "module", "ema", "model_ema", "teacher", "net", "anything"],
)
def test_the_weights_of_a_training_checkpoint_are_extracted(name: str, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    checkpoint = {
        name: WEIGHTS,
        "epoch": 3,
        "optimizer": OPTIMIZER,
        "optimizer_states": [OPTIMIZER],
        "callbacks": {"best": {"best_k_models": {"a.ckpt": torch.tensor(0.5, device="cpu")}}},
    }
    torch.save(checkpoint, file)
    assert equal(read_weights(file), WEIGHTS)
    torch.save({"outer": checkpoint}, file)
    assert equal(read_weights(file), WEIGHTS)


@pytest.mark.parametrize("names", [("model", "model_ema"), ("student", "teacher")])
def test_two_sets_of_weights_are_refused_and_named(names: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "last.pth"
    torch.save(dict.fromkeys(names, WEIGHTS), file)
    message = refusal(lambda: read_weights(file))
    assert f"several sets of weights ({', '.join(names)})" in message
    assert "safetensors" in message


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_file_that_needs_code_is_refused(suffix: str, tmp_path: Path) -> None:
    file, trace = tmp_path / f"weights{suffix}", tmp_path / "ran"
    for content in ({"model": WEIGHTS, "extra": Bomb(trace)}, Bomb(trace), tiny_vit()):
        torch.save(content, file)
        message = refusal(lambda: read_weights(file))
        assert "never runs code from a file" in message
        assert "save its state_dict with safetensors" in message
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_torchscript_program_is_refused_as_such(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2, device="cpu")), file)
    assert "is a TorchScript program" in refusal(lambda: read_weights(file))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_without_weights_are_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    assert "does not exist" in refusal(lambda: read_weights(file))
    file.write_bytes(b"")
    assert "is empty" in refusal(lambda: read_weights(file))
    if suffix == ".safetensors":
        save_file(WEIGHTS, file)
    else:
        torch.save(WEIGHTS, file)
    content = file.read_bytes()
    for damaged in (
        content[:-20],
        content[: len(content) // 2],
        content[:9],
        b"\xff" * 300,
        b"no weights, just text" * 9,
    ):
        file.write_bytes(damaged)
        message = refusal(lambda: read_weights(file))
        assert str(file) in message
        assert "damaged" in message or "more than weights" in message
    file.unlink()
    file.mkdir()
    assert "is a folder" in refusal(lambda: read_weights(file))
    file.rmdir()
    os.mkfifo(file)
    assert "is not a regular file" in refusal(lambda: read_weights(file))


@pytest.mark.parametrize("name", ["x" * 5000 + ".pth", "a\0b.pth", "weights.npz", "weights"])
def test_impossible_names_of_weights_files_are_refused(name: str, tmp_path: Path) -> None:
    if len(name) < 100 and "\0" not in name:
        (tmp_path / name).write_bytes(b"content")
    message = refusal(lambda: read_weights(tmp_path / name if len(name) < 100 and "\0" not in name else name))
    assert "cannot be opened" in message or "not a weights file that vitscope reads" in message


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"model": {"step": torch.tensor(3)}}], ids=str)
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert "does not hold a state dict" in refusal(lambda: read_weights(tmp_path / "w.pth"))


# Fitting


@every_module
def test_weights_of_the_same_class_fit(name: str) -> None:
    module, target = module_of(name), variant(name)
    before = state_of(target)
    fitting = fit_weights(target, state_of(module), "w.pth")
    assert equal(state_of(target), before)
    target.load_state_dict(fitting)
    assert equal(state_of(target), state_of(module))


@pytest.mark.slow
@every_module
@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "net.", "backbone.", "vit.", "module.model.", "_orig_mod.", "x."]
)
def test_an_extra_prefix_is_removed_with_a_warning(name: str, prefix: str) -> None:
    module, target = module_of(name), variant(name)
    state = {f"{prefix}{key}": tensor for key, tensor in state_of(module).items()}
    with pytest.warns(VitscopeWarning, match=f"w.pth: the prefix '{prefix}' was removed from every name"):
        target.load_state_dict(fit_weights(target, state, "w.pth"))
    assert equal(state_of(target), state_of(module))


@every_module
def test_a_missing_prefix_is_added_with_a_warning(name: str) -> None:
    module, target = module_of(name), nn.ModuleDict({"backbone": variant(name)})
    with pytest.warns(VitscopeWarning, match=r"the prefix 'backbone\.' was added to every name"):
        target.load_state_dict(fit_weights(target, state_of(module), "w.pth"))
    assert equal(state_of(target["backbone"]), state_of(module))


def damaged(state: dict[str, Tensor], damage: str) -> dict[str, Tensor]:
    norm = next(key for key in state if "norm" in key or "ln" in key)
    matrix = next(key for key in state if state[key].ndim == 2)
    if damage == "missing":
        del state[norm]
    elif damage == "unexpected":
        state["extra.weight"] = torch.ones(2, 2, device="cpu")
    elif damage == "shape":
        state[matrix] = state[matrix][:-1]
    elif damage == "transposed":
        state[matrix] = state[matrix].unsqueeze(0)
    elif damage == "integer":
        state[norm] = (state[norm] * 100).to(torch.int8)
    elif damage == "boolean":
        state[matrix] = state[matrix] > 0
    elif damage == "complex":
        state[norm] = state[norm].to(torch.complex64)
    elif damage == "sparse":
        state[matrix] = state[matrix].to_sparse()
    elif damage == "prefix on some":
        state = {f"model.{key}" if key != norm else key: tensor for key, tensor in state.items()}
    elif damage == "prefix and missing":
        state = {f"model.{key}": tensor for key, tensor in state.items() if key != norm}
    return state


@pytest.mark.slow
@every_module
@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        ("missing", "1 missing"),
        ("unexpected", "1 unexpected (extra.weight)"),
        ("shape", "1 of another shape"),
        ("transposed", "1 of another shape"),
        ("integer", "1 of another dtype"),
        ("boolean", "1 of another dtype"),
        ("complex", "1 of another dtype"),
        ("sparse", "1 of another dtype"),
        ("prefix on some", "unexpected (model."),
        ("prefix and missing", "unexpected (model."),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(name: str, damage: str, difference: str) -> None:
    target = variant(name)
    before = state_of(target)
    message = refusal(lambda: fit_weights(target, damaged(state_of(module_of(name)), damage), "w.pth"))
    assert message.startswith(f"w.pth does not fit {type(target).__name__}: ")
    assert difference in message
    assert equal(state_of(target), before)


def test_the_message_states_both_shapes() -> None:
    message = refusal(lambda: fit_weights(nn.Linear(2, 3), {"weight": torch.ones(3, 4), "bias": torch.ones(3)}, "w"))
    assert "weight: 3×4 in the file, 3×2 in the model" in message


def test_one_name_of_a_shared_weight_suffices_but_two_must_agree() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1] = module[0]
    weight, bias = torch.ones(2, 2, device="cpu"), torch.zeros(2, device="cpu")
    fitting = fit_weights(module, {"0.weight": weight, "0.bias": bias}, "w")
    assert torch.equal(fitting["1.weight"], weight)
    conflicting = {"0.weight": weight, "0.bias": bias, "1.weight": weight * 2, "1.bias": bias}
    assert "the model shares 1.weight with another name" in refusal(lambda: fit_weights(module, conflicting, "w"))


def test_buffers_that_the_class_computes_may_be_left_over() -> None:
    module = module_of("timm-swin")
    state = state_of(module)
    buffers = {name for name, _ in module.named_buffers()} - state.keys()
    assert buffers
    for name in buffers:
        state[name] = module.get_buffer(name)
    assert not compare(module, state)
    assert fit_weights(module, state, "w").keys() == module.state_dict().keys()


# weights= of the three libraries


def load(library: str, name: str, file: Path, **options: Any) -> vs.VisionModel:
    from vitscope.models.backends.libraries import backend

    return backend(library).load(
        name, **({"pretrained": True, "image_size": None, "dtype": None} | options), weights=file
    )


def logits_of(module: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        output = module(pixels)
    return getattr(output, "logits", output)


PIXELS = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1000, 3])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_timm_adopts_the_number_of_classes_of_a_file(name: str, classes: int, prefix: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=classes).eval()
    file = tmp_path / "best_model.pth"
    torch.save({"state_dict": {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}}, file)
    if prefix:
        with pytest.warns(VitscopeWarning, match="the prefix 'model.' was removed"):
            model = load("timm", name, file)
    else:
        model = load("timm", name, file)
    assert torch.equal(model.forward(PIXELS), logits_of(module, PIXELS))
    assert "state_dict" not in model.module.pretrained_cfg


def test_timm_resamples_a_file_only_for_an_image_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    file = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    large = timm.create_model("test_vit", img_size=192).eval()
    save_file(large.state_dict(), file)
    assert "1 of another shape (pos_embed: 1×145×64 in the file" in refusal(lambda: load("timm", "test_vit", file))
    same_size = load("timm", "test_vit", file, image_size=(192, 192))
    assert equal(state_of(same_size.module), state_of(large))

    trained = timm.create_model("test_vit", num_classes=3).eval()
    save_file(trained.state_dict(), file)
    resampled = load("timm", "test_vit", file, image_size=(192, 192))
    trained.set_input_size((192, 192))
    torch.testing.assert_close(state_of(resampled.module), state_of(trained))
    assert resampled.prepare(photo(200, 200))[0].shape == (1, 3, 192, 192)


def test_weights_that_timm_itself_converts_are_accepted() -> None:
    """open_clip's names differ from timm's."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("vit_base_patch32_clip_224", depth=1, embed_dim=32, num_heads=2, num_classes=0)
    state = module.state_dict()
    from vitscope.models.backends.timm.weights import create_filled

    def create(**options: Any) -> Any:
        return timm.create_model(
            "vit_base_patch32_clip_224", **({"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 0} | options)
        )

    names = {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj.weight": "conv1.weight",
        "norm_pre.weight": "ln_pre.weight",
        "norm_pre.bias": "ln_pre.bias",
        "norm.weight": "ln_post.weight",
        "norm.bias": "ln_post.bias",
        "blocks.0.norm1.weight": "transformer.resblocks.0.ln_1.weight",
        "blocks.0.norm1.bias": "transformer.resblocks.0.ln_1.bias",
        "blocks.0.norm2.weight": "transformer.resblocks.0.ln_2.weight",
        "blocks.0.norm2.bias": "transformer.resblocks.0.ln_2.bias",
        "blocks.0.attn.qkv.weight": "transformer.resblocks.0.attn.in_proj_weight",
        "blocks.0.attn.qkv.bias": "transformer.resblocks.0.attn.in_proj_bias",
        "blocks.0.attn.proj.weight": "transformer.resblocks.0.attn.out_proj.weight",
        "blocks.0.attn.proj.bias": "transformer.resblocks.0.attn.out_proj.bias",
        "blocks.0.mlp.fc1.weight": "transformer.resblocks.0.mlp.c_fc.weight",
        "blocks.0.mlp.fc1.bias": "transformer.resblocks.0.mlp.c_fc.bias",
        "blocks.0.mlp.fc2.weight": "transformer.resblocks.0.mlp.c_proj.weight",
        "blocks.0.mlp.fc2.bias": "transformer.resblocks.0.mlp.c_proj.bias",
    }
    shaped = {f"visual.{names[key]}": tensor.squeeze() for key, tensor in state.items()}
    shaped["visual.conv1.weight"] = state["patch_embed.proj.weight"]
    loaded = create_filled(create, shaped, "open_clip.pth", None, adapt_classes=True)
    assert equal(state_of(loaded), state_of(module))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1000, 3])
@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_torchvision_adopts_the_number_of_classes_of_a_file(name: str, classes: int, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None, num_classes=classes).eval()
    file = tmp_path / "best.pth"
    torch.save({"model": {f"module.{key}": tensor for key, tensor in module.state_dict().items()}, "epoch": 1}, file)
    with pytest.warns(VitscopeWarning, match="the prefix 'module.' was removed"):
        model = load("torchvision", name, file)
    pixels = PIXELS.new_zeros(1, 3, 224, 224).normal_(generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.forward(pixels), logits_of(module, pixels))


@pytest.mark.parametrize("classes", [7, 3])
@pytest.mark.parametrize("source", ["a folder without weights", "a model type"])
def test_transformers_adopts_the_number_of_classes_of_a_file(
    source: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitscope.models.backends.transformers.backend import transformers

    settings = TINY | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    module = transformers.ViTForImageClassification(transformers.ViTConfig(**(settings | {"num_labels": classes})))
    file = tmp_path / "best_model.pth"
    torch.save(module.state_dict(), file)
    name = "vit"
    if source == "a model type":
        monkeypatch.setattr(transformers, "CONFIG_MAPPING", {"vit": lambda: transformers.ViTConfig(**settings)})
    else:
        config = transformers.ViTConfig(**settings, architectures=["ViTForImageClassification"])
        config.save_pretrained(tmp_path / "config")
        name = str(tmp_path / "config")
    model = load("transformers", name, file)
    pixels = PIXELS[..., :32, :32].contiguous()
    assert torch.equal(model.forward(pixels), logits_of(module.eval(), pixels))
    assert len(model.predict(pixels, top_k=9)[0]) == classes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"), [("timm", "test_vit"), ("torchvision", "vit_b_32"), ("transformers", "vit")]
)
def test_weights_of_another_model_are_refused(
    library: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    from vitscope.models.backends.transformers.backend import transformers

    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=8)
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {"vit": lambda: config})
    file = tmp_path / "w.pth"
    torch.save(WEIGHTS, file)
    message = refusal(lambda: load(library, name, file))
    assert "w.pth" in message
    assert "missing" in message
    assert "unexpected (layer.bias, layer.weight)" in message
