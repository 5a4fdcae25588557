"""Other classes for a model of any family, and what its library says about its blocks and its making."""

import json

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.every_model import LABELS, Case, case, every_case, logits, same, weights
from tests.helpers.families import hf
from vitscope.errors import CallError, UnknownModelError
from vitscope.models.blocks import blocks
from vitscope.models.checkpoints.serialization import check_folder
from vitscope.models.heads import Classified, architecture, build, get_classifiers, reset_classifier

NO_CLASS = {"transformers-dinov3"}  # transformers has no classifier for it
BARE = {"transformers-vit-bare", "transformers-dinov2", "transformers-clip", "transformers-siglip"}
TWO_HEADS = {"transformers-deit-distilled", "timm-deit-distilled"}


def made(case: Case, seed: int = 0) -> vs.VisionModel:
    base = case.model()
    torch.manual_seed(seed)
    return reset_classifier(base, LABELS)


def at(key: str, state: dict[str, Tensor]) -> Tensor | None:
    """The tensor of this name, also where the module now stands inside another."""
    inside = [f"{first}.{key}" for first in sorted({name.partition(".")[0] for name in state})]
    return next((state[name] for name in (key, *inside) if name in state), None)


@every_case
def test_the_logits_are_as_many_as_the_classes_and_the_rest_is_known_as_before(case: Case) -> None:
    before, model = case.model(), made(case)
    assert (model.preprocessing, model.name, model.library) == (before.preprocessing, before.name, case.library)
    assert (before.layout is None) == (model.layout is None)
    if before.layout is not None and model.layout is not None:
        assert model.layout.patch_size == before.layout.patch_size
        assert model.layout.prefix_names == before.layout.prefix_names
    assert logits(model, case.pixels).shape == (len(case.pixels), 3)
    assert model.labels == LABELS
    assert model.predict(case.pixels)[0][0].label in LABELS
    five = reset_classifier(model, [f"thing {i}" for i in range(5)])
    assert logits(five, case.pixels).shape == (len(case.pixels), 5)
    assert five.labels == tuple(f"thing {i}" for i in range(5))


@every_case
def test_the_given_model_stays_as_it_was_whatever_the_copy_learns(case: Case) -> None:
    model = case.model()
    model.module.requires_grad_(False)
    before, first = weights(model), model.forward(case.pixels)
    copied = reset_classifier(model, LABELS)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in copied.module.parameters())
    with torch.no_grad():
        for parameter in copied.module.parameters():
            parameter.add_(1)
    assert same(weights(model), before)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    if first is not None:
        assert torch.equal(model.forward(case.pixels), first)
    assert not model.module.training


def test_a_classifier_of_ones_own_has_the_mode_of_its_backbone() -> None:
    assert not reset_classifier(case("transformers-dinov3").model(), LABELS).module.training


@every_case
def test_the_backbone_keeps_its_weights(case: Case) -> None:
    model = case.model()
    before, after = weights(model), weights(reset_classifier(model, LABELS))
    old_heads = (
        {id(one) for layer in get_classifiers(model) for one in layer.parameters()} if case.name not in BARE else set()
    )
    names = {id(one): name for name, one in model.module.named_parameters()}
    replaced = {names[one] for one in old_heads}
    lost = [key for key in before if key not in replaced and at(key, after) is None]
    assert all(key.startswith("pooler.") for key in lost), "a layer that a class with a classifier has not"
    assert not lost or case.name in BARE
    for key, tensor in before.items():
        if key not in replaced and key not in lost:
            assert torch.equal(at(key, after), tensor), key


@pytest.mark.parametrize("name", ["transformers-dinov3", "timm-siglip", "transformers-dinov2-head"])
def test_the_classifier_reads_the_same_features_as_before(name: str) -> None:
    model = case(name).model()
    copied = reset_classifier(model, LABELS)
    seen: dict[str, Tensor] = {}
    for key, one in (("old", model), ("new", copied)):
        if key == "old" and name in NO_CLASS:
            seen["old"] = model.features(case(name).pixels).detach()
            continue
        (head,) = get_classifiers(one)
        handle = head.register_forward_pre_hook(lambda _, inputs, key=key: seen.update({key: inputs[0].detach()}))
        logits(one, case(name).pixels)
        handle.remove()
    assert torch.equal(seen["old"], seen["new"])


@every_case
def test_the_classifier_is_small_random_and_seeded(case: Case) -> None:
    model, again = made(case), made(case)
    layers = get_classifiers(model)
    assert len(layers) == (2 if case.name in TWO_HEADS else 1)
    for layer, twin in zip(layers, get_classifiers(again), strict=True):
        assert layer.out_features == 3
        assert not layer.bias.any()
        assert 0.01 < layer.weight.std() < 0.03
        assert torch.equal(layer.weight, twin.weight)
    assert not torch.equal(get_classifiers(made(case, seed=1))[0].weight, layers[0].weight)


@every_case
def test_the_heads_are_what_the_logits_come_from(case: Case) -> None:
    model = made(case)
    with torch.no_grad():
        for layer in get_classifiers(model):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(logits(model, case.pixels), torch.tensor([[1.0, 2.0, 3.0]] * len(case.pixels)))


def test_a_backbone_without_a_classifier_in_its_library_gets_one() -> None:
    model = made(case("transformers-dinov3"))
    assert isinstance(model.module, Classified)
    again = reset_classifier(model, ("a", "b"))
    assert isinstance(again.module, Classified)
    assert not isinstance(again.module.backbone, Classified)
    assert logits(again, case("transformers-dinov3").pixels).shape == (2, 2)


@every_case
def test_blocks_are_found_in_order_with_their_widths(case: Case) -> None:
    model = made(case)
    found = blocks(model.module)
    names = {id(child): name for name, child in model.module.named_modules()}
    assert [block.path for block in found] == [names[id(block.module)] for block in found]
    assert all(names[id(block.attention)].startswith(block.path + ".") for block in found)
    assert all(names[id(block.mlp_end)].startswith(block.path + ".") for block in found)
    widths = [block.width for block in found]
    if "swin" in case.name:
        assert widths == [16, 16, 32, 32, 64, 64]
    elif case.name == "timm-maxvit":
        assert len(widths) == 8
        assert widths == sorted(widths)
    else:
        assert widths == [32] * 3


@every_case
def test_every_block_adds_its_branches_at_their_ends(case: Case) -> None:
    """With the ends of all branches silenced a block gives what it was given."""
    model = made(case)
    found = blocks(model.module)

    def silent(_module: nn.Module, _inputs: object, output: object) -> object:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    seen: list[tuple[Tensor, Tensor]] = []

    def compare(_module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        seen.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    for block in found:
        block.attention_end.register_forward_hook(silent)
        block.mlp_end.register_forward_hook(silent)
        block.module.register_forward_hook(compare)
    logits(model, case.pixels)
    assert len(seen) == len(found)
    for given, gave in seen:
        torch.testing.assert_close(gave, given)


def test_a_module_without_blocks_and_one_of_no_library_are_refused() -> None:
    with pytest.raises(UnknownModelError, match=r"^Linear has no blocks of attention and MLP"):
        blocks(nn.Linear(3, 4))
    foreign = vs.load(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), image_size=8)
    with pytest.raises(CallError, match="is of none of the libraries transformers, timm, torchvision"):
        reset_classifier(foreign, LABELS)


@every_case
def test_an_architecture_is_json_that_the_model_is_built_from(case: Case) -> None:
    model = made(case)
    built = build(model.library, json.loads(json.dumps(architecture(model))))
    assert type(built) is type(model.module)
    shapes = [{name: one.shape for name, one in module.state_dict().items()} for module in (built, model.module)]
    assert shapes[0] == shapes[1]
    check_folder(model)


def test_a_live_timm_module_that_cannot_be_built_again_is_refused() -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    direct = timm.models.vision_transformer.VisionTransformer(**size)
    shorter, other = (timm.create_model("vit_small_patch16_224", **size) for _ in range(2))
    shorter.blocks[1] = nn.Identity()
    for block in other.blocks:
        block.mlp.act = nn.ReLU()
    for module in (direct, shorter, other):
        model = reset_classifier(vs.load(module.eval()), LABELS)
        with pytest.raises(CallError, match="cannot be rebuilt from a folder: load it by name") as error:
            check_folder(model)
        assert "\n" not in str(error.value)


def test_half_precision_and_training_mode_are_kept() -> None:
    for build_module in (hf("ViTForImageClassification", "ViTConfig"), hf("ViTModel", "ViTConfig")):
        module = build_module().to(torch.bfloat16).train()
        model = reset_classifier(vs.load(module), LABELS)
        assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
        assert model.module.training
    for name in ("timm-vit", "torchvision-swin", "transformers-dinov3"):
        module = case(name).model().module.to(torch.bfloat16)
        model = reset_classifier(vs.load(module), LABELS)
        assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
