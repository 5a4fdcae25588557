"""New classifiers, blocks and architectures for a model of any family."""

import json

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.every_model import LABELS, Case, case, every_case, logits, same, weights
from tests.helpers.families import hf
from vitscope.errors import CallError, UnknownModelError, UnsupportedModelError
from vitscope.models.blocks import blocks
from vitscope.models.checkpoints.serialization import check_folder
from vitscope.models.heads import Classified, architecture, build, get_classifiers, reset_classifier

NO_CLASS = {"transformers-dinov3"}  # transformers has no class with a classifier for it
BARE = {"transformers-vit-bare", "transformers-dinov2", "transformers-clip", "transformers-siglip"}
TWO_HEADS = {"transformers-deit-distilled", "timm-deit-distilled"}


def with_labels(case: Case, seed: int = 0) -> vs.VisionModel:
    """Return the model of a case with an untrained classifier for LABELS."""
    base = case.model()
    torch.manual_seed(seed)
    return reset_classifier(base, LABELS)


def tensor_or_none(key: str, state: dict[str, Tensor]) -> Tensor | None:
    """Return the tensor with this name, also if its module is now inside another one."""
    nested = [f"{first}.{key}" for first in sorted({name.partition(".")[0] for name in state})]
    return next((state[name] for name in (key, *nested) if name in state), None)


@pytest.mark.slow
@every_case
def test_a_new_classifier_has_one_logit_per_class_and_keeps_all_other_facts(case: Case) -> None:
    before, model = case.model(), with_labels(case)
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


@pytest.mark.slow
@every_case
def test_training_the_copy_does_not_change_the_original(case: Case) -> None:
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


def test_an_added_classifier_has_the_mode_of_its_backbone() -> None:
    assert not reset_classifier(case("transformers-dinov3").model(), LABELS).module.training


@pytest.mark.slow
@every_case
def test_the_backbone_keeps_its_weights(case: Case) -> None:
    model = case.model()
    before, after = weights(model), weights(reset_classifier(model, LABELS))
    old_heads = (
        {id(parameter) for layer in get_classifiers(model) for parameter in layer.parameters()}
        if case.name not in BARE
        else set()
    )
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    replaced = {names[identity] for identity in old_heads}
    lost = [key for key in before if key not in replaced and tensor_or_none(key, after) is None]
    assert all(key.startswith("pooler.") for key in lost), "only classes without a classifier have this layer"
    assert not lost or case.name in BARE
    for key, tensor in before.items():
        if key not in replaced and key not in lost:
            assert torch.equal(tensor_or_none(key, after), tensor), key


@pytest.mark.parametrize("name", ["transformers-dinov3", "timm-siglip", "transformers-dinov2-head"])
def test_the_classifier_reads_the_same_features_as_before(name: str) -> None:
    model = case(name).model()
    copied = reset_classifier(model, LABELS)
    features: dict[str, Tensor] = {}
    for key, variant in (("old", model), ("new", copied)):
        if key == "old" and name in NO_CLASS:
            features["old"] = model.features(case(name).pixels).detach()
            continue
        (head,) = get_classifiers(variant)
        handle = head.register_forward_pre_hook(lambda _, inputs, key=key: features.update({key: inputs[0].detach()}))
        logits(variant, case(name).pixels)
        handle.remove()
    assert torch.equal(features["old"], features["new"])


@pytest.mark.slow
@every_case
def test_the_classifier_is_small_random_and_seeded(case: Case) -> None:
    model, again = with_labels(case), with_labels(case)
    layers = get_classifiers(model)
    assert len(layers) == (2 if case.name in TWO_HEADS else 1)
    for layer, twin in zip(layers, get_classifiers(again), strict=True):
        assert layer.out_features == 3
        assert not layer.bias.any()
        assert 0.01 < layer.weight.std() < 0.03
        assert torch.equal(layer.weight, twin.weight)
    assert not torch.equal(get_classifiers(with_labels(case, seed=1))[0].weight, layers[0].weight)


@pytest.mark.slow
@every_case
def test_the_classifiers_compute_the_logits(case: Case) -> None:
    model = with_labels(case)
    with torch.no_grad():
        for layer in get_classifiers(model):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(logits(model, case.pixels), torch.tensor([[1.0, 2.0, 3.0]] * len(case.pixels)))


def test_a_backbone_without_a_classifier_in_its_library_gets_a_linear_one() -> None:
    model = with_labels(case("transformers-dinov3"))
    assert isinstance(model.module, Classified)
    again = reset_classifier(model, ("a", "b"))
    assert isinstance(again.module, Classified)
    assert not isinstance(again.module.backbone, Classified)
    assert logits(again, case("transformers-dinov3").pixels).shape == (2, 2)


@pytest.mark.slow
@every_case
def test_blocks_are_in_order_and_have_their_widths(case: Case) -> None:
    model = with_labels(case)
    result = blocks(model.module)
    names = {id(child): name for name, child in model.module.named_modules()}
    assert [block.path for block in result] == [names[id(block.module)] for block in result]
    assert all(names[id(block.attention)].startswith(block.path + ".") for block in result)
    assert all(names[id(block.mlp_end)].startswith(block.path + ".") for block in result)
    widths = [block.width for block in result]
    if "swin" in case.name:
        assert widths == [16, 16, 32, 32, 64, 64]
    elif case.name == "timm-maxvit":
        assert len(widths) == 8
        assert widths == sorted(widths)
    else:
        assert widths == [32] * 3


@pytest.mark.slow
@every_case
def test_every_block_adds_the_outputs_of_its_branch_ends(case: Case) -> None:
    """If the ends of all branches return zero, a block returns its input."""
    model = with_labels(case)
    result = blocks(model.module)

    def silence(_module: nn.Module, _inputs: object, output: object) -> object:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    pairs: list[tuple[Tensor, Tensor]] = []

    def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        pairs.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    for block in result:
        block.attention_end.register_forward_hook(silence)
        block.mlp_end.register_forward_hook(silence)
        block.module.register_forward_hook(record)
    logits(model, case.pixels)
    assert len(pairs) == len(result)
    for tokens, output in pairs:
        torch.testing.assert_close(output, tokens)


def test_modules_without_blocks_or_from_elsewhere_are_refused() -> None:
    with pytest.raises(UnknownModelError, match=r"^Linear has no blocks of attention and MLP"):
        blocks(nn.Linear(3, 4))
    foreign = vs.load(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), image_size=8)
    with pytest.raises(UnsupportedModelError, match="is not a model of transformers, timm, torchvision"):
        reset_classifier(foreign, LABELS)


@pytest.mark.slow
@every_case
def test_a_model_can_be_built_again_from_its_architecture_as_json(case: Case) -> None:
    model = with_labels(case)
    built = build(model.library, json.loads(json.dumps(architecture(model))))
    assert type(built) is type(model.module)
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in (built, model.module)]
    assert shapes[0] == shapes[1]
    check_folder(model)


def test_a_live_timm_module_that_cannot_be_built_again_is_refused() -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    direct = timm.models.vision_transformer.VisionTransformer(**size)
    shorter, relu = (timm.create_model("vit_small_patch16_224", **size) for _ in range(2))
    shorter.blocks[1] = nn.Identity()
    for block in relu.blocks:
        block.mlp.act = nn.ReLU()
    for module in (direct, shorter, relu):
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
