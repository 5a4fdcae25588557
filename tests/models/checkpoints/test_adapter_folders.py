"""PEFT adapters from their folders give the outputs of the live model that saved them, on a copy of the base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.families import from_timm, hf
from tests.helpers.tiny import refusal, tiny_vit
from vitscope.errors import ModelUnavailableError, UnknownModelError, WorkError
from vitscope.models.checkpoints.adapter_folder import is_adapter_folder, load_adapter
from vitscope.models.checkpoints.local import with_adapter

peft = pytest.importorskip("peft")

# peft reads an attribute of transformers by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PIXELS = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), device="cpu")
SQUARE = PIXELS[..., :32]


def open_clip_tower() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=2, output_dim=16
    )
    return tower.eval()


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=7)


BASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[str] | None, Tensor]] = {
    "transformers-vit": (tiny_vit, ["q_proj", "v_proj"], ["classifier"], SQUARE),
    "transformers-dinov2": (
        hf("Dinov2ForImageClassification", "Dinov2Config"),
        ["q_proj", "v_proj"],
        ["classifier"],
        SQUARE,
    ),
    "timm-vit": (from_timm("vit_small_patch16_224"), ["qkv", "fc1"], ["head"], PIXELS),
    "timm-vit-no-head": (from_timm("vit_small_patch16_224"), ["qkv"], None, PIXELS),
    "open_clip-tower": (open_clip_tower, ["c_fc", "c_proj"], None, SQUARE),
    "torchvision-vit": (torchvision_vit, ["0", "3"], ["heads"], SQUARE),
}
every_base = pytest.mark.parametrize("name", BASES)


def base_of(name: str) -> nn.Module:
    if name.startswith(("timm", "torchvision")):
        pytest.importorskip(name.split("-")[0])
    torch.manual_seed(0)
    return BASES[name][0]().eval()


def config(kind: str, targets: list[str], saved: list[str] | None) -> Any:
    options: dict[str, Any] = {"target_modules": targets, "modules_to_save": saved}
    if kind == "lora":
        return peft.LoraConfig(r=4, lora_alpha=8, **options)
    if kind == "loha":
        return peft.LoHaConfig(r=4, **options)
    return peft.IA3Config(feedforward_modules=[], **options)


def adapted(base: nn.Module, kind: str, targets: list[str], saved: list[str] | None) -> Any:
    """Return a live PEFT model whose adapter changes the output."""
    model = peft.get_peft_model(base, config(kind, targets, saved))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def logits_of(module: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        output = module(pixels)
    return getattr(output, "logits", output)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.slow
@every_base
@pytest.mark.parametrize("kind", ["lora", "loha", "ia3"])
def test_an_adapter_gives_the_outputs_of_the_live_model_that_saved_it(name: str, kind: str, tmp_path: Path) -> None:
    _, targets, saved, pixels = BASES[name]
    live = adapted(base_of(name), kind, targets, saved)
    live.save_pretrained(tmp_path)
    expected = logits_of(live, pixels)

    base = base_of(name)
    before, plain, random_state = state(base), logits_of(base, pixels), torch.get_rng_state()
    assert is_adapter_folder(tmp_path)
    loaded = load_adapter(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(logits_of(loaded, pixels), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert type(loaded) is type(base)
    assert not any(child.training for child in loaded.modules())
    # The caller's module is unchanged.
    assert state(base).keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(base).items())
    assert torch.equal(logits_of(base, pixels), plain)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a weight less", "a weight more", "another shape", "another layer", "cut off"])
@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit"])
def test_an_adapter_with_damaged_weights_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    _, targets, saved, _ = BASES[name]
    adapted(base_of(name), "lora", targets, saved).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(key for key in sorted(weights) if "lora_A" in key)
    if damage == "a weight less":
        del weights[key]
    elif damage == "a weight more":
        weights[key.replace("lora_A", "lora_C")] = weights[key].clone()
    elif damage == "another shape":
        weights[key] = weights[key][:, :-1].contiguous()
    elif damage == "another layer":
        weights = {key.replace("s.0.", "s.7."): tensor for key, tensor in weights.items()}
    save_file(weights, file)
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-50])
    base = base_of(name)
    before = state(base)
    with pytest.raises(ModelUnavailableError) as caught:
        load_adapter(base, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(base).items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of the unsupported kind 'PROMPT_TUNING'"),
        ({"peft_type": None}, "of the unsupported kind None"),
        ({"peft_type": ["LORA"]}, "of the unsupported kind"),
        ({"init_lora_weights": "loftq"}, "changes the base model's weights"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config is set"),
        ({"target_modules": ["no_such_layer"]}, "failed"),
        ({"r": "four"}, "failed"),
        ({"made_up": 5}, "does not support the setting made_up"),
    ],
    ids=str,
)
def test_an_invalid_adapter_configuration_is_refused_in_one_line(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    adapted(tiny_vit(), "lora", ["q_proj"], None).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelUnavailableError, match=reason) as caught:
        load_adapter(tiny_vit(), tmp_path)
    assert "\n" not in str(caught.value)


# Folders passed to load


def test_load_uses_the_base_model_that_the_adapter_names(folder: Path, tmp_path: Path) -> None:
    import transformers

    base = transformers.ViTForImageClassification.from_pretrained(folder)
    live = adapted(base.eval(), "lora", ["q_proj"], ["classifier"])
    live.save_pretrained(tmp_path / "adapter")
    model, plain = vs.load(tmp_path / "adapter"), vs.load(folder)
    with torch.no_grad():
        assert torch.equal(model.forward(SQUARE), logits_of(live, SQUARE))
    assert model.labels == plain.labels
    assert model.preprocessing == plain.preprocessing
    assert model.layout is not None
    assert vs.rollout(model, SQUARE).values.shape == (2, 4, 4)


@pytest.mark.parametrize("bare", [True, False], ids=["no classifier", "another classifier"])
def test_the_classifier_of_the_adapter_replaces_the_one_of_the_base(bare: bool, tmp_path: Path) -> None:
    """A common workflow: a pretrained backbone, a new head with three classes, LoRA, and only the adapter is saved."""
    import transformers

    saved = tiny_vit()
    (saved.vit if bare else saved).save_pretrained(tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    live = adapted(base.eval(), "lora", ["q_proj"], ["classifier"])
    live.save_pretrained(tmp_path / "adapter")
    model = vs.load(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model.forward(SQUARE), logits_of(live, SQUARE))
    assert len(model.predict(SQUARE, top_k=9)[0]) == 3


def test_the_base_model_may_be_a_timm_folder(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    module = from_timm("vit_small_patch16_224", img_size=(32, 32))().eval()
    timm.models.save_for_hf(module, tmp_path / "base", safe_serialization=True)
    live = adapted(module, "lora", ["qkv"], ["head"])
    live.save_pretrained(tmp_path / "adapter")
    for name in (str(tmp_path / "base"), f"timm:local-dir:{tmp_path / 'base'}"):
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
        model = vs.load(tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(model.forward(SQUARE), logits_of(live, SQUARE))


@pytest.mark.parametrize("base", [None, "", "/no/such/base", "org/not-here", "itself", 5])
def test_the_error_for_a_missing_base_model_shows_how_to_pass_it(base: Any, tmp_path: Path) -> None:
    adapted(tiny_vit(), "lora", ["q_proj"], None).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    name = str(tmp_path / "a") if base == "itself" else base
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    message = refusal(UnknownModelError, tmp_path / "a")
    assert f"pass the base model: vs.load(base, adapter='{tmp_path / 'a'}')" in message


def test_an_adapter_folder_needs_weights(tmp_path: Path) -> None:
    adapted(tiny_vit(), "lora", ["q_proj"], None).save_pretrained(tmp_path)
    assert "so omit pretrained=False" in refusal(vs.CallError, tmp_path, pretrained=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match=r"adapter_model\.safetensors or adapter_model\.bin is missing"):
        load_adapter(tiny_vit(), tmp_path)


def test_the_caller_can_pass_the_base_model(tmp_path: Path) -> None:
    live = adapted(tiny_vit(), "lora", ["q_proj"], ["classifier"])
    live.save_pretrained(tmp_path)
    base = vs.load(tiny_vit(), image_size=32)
    model = with_adapter(base, tmp_path, image_size=None, name="tuned")
    with torch.no_grad():
        assert torch.equal(model.forward(SQUARE), logits_of(live, SQUARE))
        assert not torch.equal(base.forward(SQUARE), model.forward(SQUARE))
    assert (model.name, model.labels, model.preprocessing) == ("tuned", base.labels, base.preprocessing)


def test_a_pickled_adapter_is_not_unpickled(tmp_path: Path) -> None:
    live = adapted(tiny_vit(), "lora", ["q_proj"], None)
    live.save_pretrained(tmp_path / "a", safe_serialization=False)
    loaded = load_adapter(tiny_vit(), tmp_path / "a")
    assert torch.equal(logits_of(loaded, SQUARE), logits_of(live, SQUARE))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    torch.save({"weights": Bomb(tmp_path / "ran")}, tmp_path / "b" / "adapter_model.bin")
    with pytest.raises(ModelUnavailableError, match="never runs code from a file"):
        load_adapter(tiny_vit(), tmp_path / "b")
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# Another classifier for a model with an adapter


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "layers in place"])
def test_replacing_the_classifier_never_loses_adapter_weights(wrapped: bool) -> None:
    """The backbone of a model with an adapter does not fit the class without one."""
    from vitscope.models.backends.transformers.heads import reset_classifier

    live = adapted(tiny_vit(), "lora", ["q_proj"], None)
    with pytest.raises(WorkError, match=r"\d+ of its \d+ weights do not exist in ViTForImageClassification"):
        reset_classifier(live if wrapped else live.get_base_model(), ("cat", "dog"))
    merged = live.merge_and_unload()
    tuned = reset_classifier(merged, ("cat", "dog"))
    assert tuned is not None
    assert torch.equal(tuned.vit.layers[0].attention.q_proj.weight, merged.vit.layers[0].attention.q_proj.weight)
