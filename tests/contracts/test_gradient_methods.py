"""Every gradient method on every family: finite, batch by batch, in low precision, and nothing is left behind."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.contracts.test_leaks import assert_same, mixed, state
from tests.helpers.gradients import FITTING, METHODS, PLAIN, Case, assert_equal, case, each_method, named, target_of
from tests.helpers.tiny import photo
from vitscope.errors import CallError, UnsupportedModelError, VitscopeWarning, WorkError
from vitscope.models.vision_model import VisionModel

CASES = [*PLAIN, *FITTING]
# The type checks draw random numbers of their own.
pytestmark = pytest.mark.usefixtures("unchecked")


class TroubleError(Exception):
    pass


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let memory suffice for one image, and list the sizes of the batches that run."""
    sizes: list[int] = []
    logits = VisionModel.logits

    def limited(self: VisionModel, pixels: Tensor) -> Any:
        if pixels.requires_grad or torch.is_grad_enabled():
            sizes.append(len(pixels))
            if len(pixels) > 1:
                raise torch.OutOfMemoryError("simulated")
        return logits(self, pixels)

    monkeypatch.setattr(VisionModel, "logits", limited)
    return sizes


def quietly(method: str, *args: Any, **options: Any) -> vs.Attribution:
    """Run a method; maps of zeros may warn, for some models have them by construction."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zero everywhere", category=VitscopeWarning)
        return METHODS[method](*args, **options)


@pytest.mark.slow
@each_method
@named(CASES)
def test_every_method_runs_on_every_family(case: Case, method: str) -> None:
    """Values are finite and on the finest grid, do not depend on the batch or a caller's grad mode; nothing changes."""
    model, pixels = case.in_float64()
    mixed(model.module)
    target = target_of(model)
    try:
        result = quietly(method, model, pixels, target=target)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    before = state(model.module)
    grid = vs.capture(model, pixels).grid
    assert grid is not None
    sides = pixels.shape[-2:] if method.endswith("pixels") else (grid.height, grid.width)
    assert result.values.shape == (2, *sides)
    assert result.values.dtype == torch.float32
    assert bool(result.values.isfinite().all())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = quietly(method, model, pixels.clone(), target=target)
        assert torch.equal(again.values, result.values)
        assert not again.values.requires_grad
    if not method.startswith("smooth"):  # all images of a batch share its noise
        assert_equal_or_zero(quietly(method, model, pixels[1:], target=target).values, result.values[1:])
    assert_same(state(model.module), before)


def assert_equal_or_zero(values: Tensor, expected: Tensor) -> None:
    if float(expected.abs().max()) > 1e-4:
        assert_equal(values, expected)
    else:
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["timm-vit", "transformers-dinov2-head", "timm-swin-fitting"])
def test_low_precision_is_close_to_float32(name: str, dtype: torch.dtype, method: str) -> None:
    model, pixels = case(name).model(), case(name).pixels
    expected = METHODS[method](model, pixels, target=1).values
    model.module.to(dtype)
    result = METHODS[method](model, pixels.to(dtype), target=1)
    assert bool(result.values.isfinite().all())
    assert result.provenance["dtype"] == str(dtype).removeprefix("torch.")
    # The γ-rule divides by sums near zero; discarding and clamping jump.
    share = float((result.values - expected).norm() / expected.norm())
    assert share < (0.5 if dtype == torch.bfloat16 else 0.15)


@each_method
def test_nothing_is_left_behind_after_a_failure_in_the_target(method: str) -> None:
    model, pixels = case("timm-vit").model(), case("timm-vit").pixels
    mixed(model.module)
    before = state(model.module)

    def fail(_: Tensor) -> Tensor:
        raise TroubleError

    with pytest.raises(TroubleError):
        METHODS[method](model, pixels, target=fail)
    assert_same(state(model.module), before)


@each_method
@pytest.mark.parametrize("fails", [False, True])
def test_checkpointing_is_off_during_the_run_and_on_afterwards(method: str, fails: bool) -> None:
    model, pixels = case("timm-vit").model(), case("timm-vit").pixels
    expected = METHODS[method](model, pixels, target=1).values
    module: Any = model.module
    module.set_grad_checkpointing(True)

    def target(output: Tensor) -> Tensor:
        if fails:
            raise TroubleError
        return output[:, 1]

    if fails:
        with pytest.raises(TroubleError):
            METHODS[method](model, pixels, target=target)
    else:
        assert torch.equal(METHODS[method](model, pixels, target=target).values, expected)
    assert module.grad_checkpointing is True
    leaf = pixels.clone().requires_grad_()
    module(leaf).sum().backward()  # the library's own checkpointing still works
    assert leaf.grad is not None


@each_method
def test_permuting_heads_changes_nothing(method: str) -> None:
    model, pixels = case("timm-vit").in_float64()
    expected = METHODS[method](model, pixels, target=1).values
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for block in model.module.blocks:  # type: ignore[union-attr]
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                by_head = tensor.unflatten(0, (3, 4, 8))
                tensor.copy_(by_head[:, order].flatten(0, 2))
            columns = block.attn.proj.weight.unflatten(1, (4, 8))
            block.attn.proj.weight.copy_(columns[:, order].flatten(1, 2))
    assert_equal(METHODS[method](model, pixels, target=1).values, expected)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("name", ["transformers-vit", "transformers-swin-padded", "transformers-dinov2-registers"])
def test_fused_and_eager_attention_agree(name: str, method: str) -> None:
    model, pixels = case(name).model(), case(name).pixels
    module: Any = model.module
    results = []
    for implementation in ("sdpa", "eager"):
        module.set_attn_implementation(implementation)
        results.append(METHODS[method](model, pixels, target=1).values)
    least = 1e-6 if method == "transition_attention" else 1e-4  # a share of the row times a gradient
    assert_equal(results[1], results[0], 2e-3 if "γ" in method else 5e-5, least)  # float32; γ divides by sums near zero


@each_method
def test_classes_have_different_maps_and_a_list_explains_one_class_per_image(method: str) -> None:
    model, pixels = case("timm-vit").in_float64()
    first, second, both = (METHODS[method](model, pixels, target=target).values for target in (0, 1, [0, 1]))
    assert float((first - second).norm()) > 0.05 * float(first.norm())
    assert_equal(both, torch.stack([first[0], second[1]]))


@each_method
@pytest.mark.parametrize(
    ("target", "text"),
    [
        ((1, 1), "with itself is always 0"),
        ([1, 2, 3], "target is a list of 3 for 2 images"),
        (9, "target 9 does not exist"),
        ("similarity", "has classes"),
    ],
)
def test_targets_that_are_refused(method: str, target: Any, text: str) -> None:
    model, pixels = case("timm-vit").model(), case("timm-vit").pixels
    with pytest.raises(CallError, match=text):
        METHODS[method](model, pixels, target=target)
    with pytest.raises(CallError, match="unknown output 'loss'"):
        METHODS[method](model, pixels, target=1, output="loss")


@each_method
def test_a_model_without_classes_is_refused_unless_its_features_are_explained(method: str) -> None:
    model, pixels = case("transformers-vit-bare").model(), case("transformers-vit-bare").pixels
    for target in (None, 1):
        with pytest.raises(CallError, match="has no classifier, so there is no class to explain"):
            METHODS[method](model, pixels, target=target)


@each_method
def test_a_constant_logit_warns(method: str) -> None:
    model, pixels = case("timm-vit").model(), case("timm-vit").pixels
    with torch.no_grad():
        model.module.head.weight[1] = 0  # type: ignore[union-attr,operator]
    with pytest.warns(VitscopeWarning, match="zero everywhere"):
        assert not bool(METHODS[method](model, pixels, target=1).values.any())


@each_method
def test_too_little_memory_halves_the_batch(method: str, little_memory: list[int]) -> None:
    model, pixels = case("timm-vit").model(), torch.cat([case("timm-vit").pixels] * 2)[:3]
    with pytest.warns(VitscopeWarning, match="not enough memory for a batch of"):
        result = METHODS[method](model, pixels, target=[0, 1, 2])
    assert little_memory[0] == 3
    assert result.values.shape[0] == 3
    for index in range(3):
        alone = METHODS[method](model, pixels[index : index + 1], target=index).values
        assert_equal(result.values[index : index + 1], alone)
    assert len(result.provenance["score"]) == 3
    assert result.provenance["parameters"]["target"] == ["class 0", "class 1", "class 2"]


@each_method
def test_too_little_memory_for_a_single_image(method: str) -> None:
    model, pixels = case("timm-vit").model(), case("timm-vit").pixels

    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("simulated")

    before = state(model.module)
    with (
        pytest.warns(VitscopeWarning, match="batch of 2: continuing with 1"),
        pytest.raises(WorkError, match="not enough memory for the gradients of a single image"),
    ):
        METHODS[method](model, pixels, target=fail)
    assert_same(state(model.module), before)


@each_method
@pytest.mark.parametrize("bundled", ["vit-nano", "swin-nano"])
def test_a_photo_of_a_bundled_model(bundled: str, method: str) -> None:
    result = METHODS[method](vs.load(bundled), photo(40, 32), target="cat")
    assert bool(result.values.isfinite().all())
    assert result.target == "cat"
    name = "grad_cam" if method.startswith("layer_cam") else method.split(" ")[0].rstrip(",")
    assert result.provenance["method"] == name
