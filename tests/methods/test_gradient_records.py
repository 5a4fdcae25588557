"""Results of gradient methods: the record of each image, and models that end in a softmax."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.attention.test_flow import timm_parallel
from tests.helpers.gradients import case
from vitscope.errors import CallError


def test_each_image_of_a_batch_has_its_own_target_and_record(chelsea: np.ndarray) -> None:
    model = vs.load("vit-nano")
    result = vs.libra(model, [chelsea, chelsea], target=["cat", "dog"])
    assert result.target is None
    assert [image.target for image in result] == ["cat", "dog"]
    for image, label in zip(result, ("cat", "dog"), strict=True):
        alone = vs.libra(model, chelsea, target=label)
        torch.testing.assert_close(image.values, alone.values, rtol=1e-4, atol=1e-4)
        assert image.provenance["parameters"] == alone.provenance["parameters"]
        ours, expected = image.provenance["completeness"][0], alone.provenance["completeness"][0]
        assert len(image.provenance["completeness"]) == 1
        assert ours["output"] == pytest.approx(expected["output"], rel=1e-5)


def test_the_records_survive_saving(chelsea: np.ndarray, tmp_path: Any) -> None:
    result = vs.attn_lrp(vs.load("vit-nano"), [chelsea, chelsea], target=["cat", "dog"])
    loaded = vs.Attribution.load(result.save(tmp_path / "map.safetensors"))
    assert [image.target for image in loaded] == ["cat", "dog"]
    assert loaded.provenance == result.provenance


class Chances(nn.Module):
    """A classifier that returns probabilities."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        chances: Tensor = self.module(pixels).logits.softmax(-1)
        return chances


def test_libra_differentiates_the_softmax_over_classes() -> None:
    module: Any = vs.load("vit-nano").module
    model = vs.load(Chances(module), image_size=32)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CallError, match="gives probabilities, not logits: pass output='probability'"):
        vs.libra(model, pixels, target=3)
    logits = vs.libra(vs.load("vit-nano"), pixels, target=3, output="log_odds", variant="input_x_gradient")
    chances = vs.libra(model, pixels, target=3, output="log_odds", variant="input_x_gradient")
    torch.testing.assert_close(chances.values, logits.values, rtol=1e-3, atol=1e-3)


def test_the_relevance_of_each_image_is_in_its_own_record(chelsea: np.ndarray) -> None:
    result = vs.transformer_attribution(vs.load("vit-nano"), [chelsea, chelsea[:, ::-1].copy()], target="cat")
    totals = result.provenance["relevance"]
    assert [image.provenance["relevance"] for image in result] == [[total] for total in totals]


def test_le_grad_of_features_explains_the_target_and_not_always_the_similarity() -> None:
    """The map of another image's similarity is not that of the features' own direction."""
    model = vs.load("vit-nano", output="features")
    first, second = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = vs.le_grad(model, first, target="similarity")
    other = vs.le_grad(model, first, target=vs.SimilarTo(second))
    assert own.target == "similarity"
    assert other.target != own.target
    correlation = torch.corrcoef(torch.stack([own.values.flatten(), other.values.flatten()]))[0, 1]
    assert float(correlation) < 0.99


@pytest.mark.parametrize("name", ["generic_attention", "gradient_rollout"])
def test_parallel_blocks_are_refused_by_the_name_of_the_method(name: str) -> None:
    torch.manual_seed(0)
    model = vs.load(timm_parallel().eval())
    images = torch.randn(1, 3, 32, 48, device="cpu")
    with pytest.raises(vs.UnsupportedModelError, match=f"^{name} is not available for .* run in parallel"):
        getattr(vs, name)(model, images)


@pytest.mark.parametrize(("name", "passes"), [("integrated_gradients", 6), ("smooth_grad", 5), ("le_grad", 1)])
def test_a_reference_image_is_evaluated_once(name: str, passes: int) -> None:
    model = vs.load("vit-nano", output="features")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), device="cpu")
    options = {"integrated_gradients": {"steps": 4}, "smooth_grad": {"samples": 4}}.get(name, {})
    runs: list[nn.Module] = []
    handle = model.module.register_forward_hook(lambda module, *_: runs.append(module))
    getattr(vs, name)(model, images[:2], target=vs.SimilarTo(images[2:]), **options)
    handle.remove()
    assert len(runs) == passes + 1


@pytest.mark.parametrize("method", [vs.smooth_grad, vs.integrated_gradients])
def test_the_activations_of_earlier_runs_are_released(method: Any) -> None:
    model = case("timm-vit").model()
    activations: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        alive.append(sum(activation() is not None for activation in activations))
        activations.append(weakref.ref(output))

    linear: Any = model.module.get_submodule("blocks.0.mlp.fc1")
    linear.register_forward_hook(count)
    method(model, case("timm-vit").pixels, **({"samples": 2} if method is vs.smooth_grad else {"steps": 2}))
    assert len(alive) > 2
    assert not any(alive)
