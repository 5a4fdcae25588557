"""Integrated gradients equal their quadrature, and converge to the difference of two outputs."""

from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers.gradients import assert_equal, case, transformers_vit
from tests.helpers.tiny import photo
from tests.reference import gradients as reference
from vitscope.errors import CallError, VitscopeWarning


@pytest.mark.slow
def test_pixels_and_patches_equal_the_quadrature() -> None:
    model, pixels = case("timm-vit").in_float64()
    origin = torch.full_like(pixels, 0.3)
    expected = reference.integrated_gradients(lambda x: model.module(x)[:, 1], pixels, origin, 5).sum(1)
    options: dict[str, Any] = {"target": 1, "steps": 5, "baseline": origin}
    assert_equal(vs.integrated_gradients(model, pixels, at="pixels", **options).values, expected)
    # The patch embedding is affine, so the way through its output is the way through the pixels.
    in_patches = expected.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).sum((2, 4))
    assert_equal(vs.integrated_gradients(model, pixels, **options).values, in_patches)


@pytest.mark.slow
def test_the_sum_converges_to_the_difference_of_two_outputs() -> None:
    model, pixels = case("transformers-dinov2-head").in_float64()
    with torch.no_grad(), model.running():
        both = [model.logits(x)[:, 2] for x in (pixels, torch.zeros_like(pixels))]
    errors = []
    for steps in (1, 8, 32):
        result = vs.integrated_gradients(
            model, pixels, target=2, steps=steps, baseline=torch.zeros_like(pixels), at="pixels"
        )
        convergence = result.provenance["convergence"]
        assert [entry["output"] for entry in convergence] == pytest.approx(both[0].tolist())
        assert [entry["baseline"] for entry in convergence] == pytest.approx(both[1].tolist())
        sums = result.values.double().sum((1, 2))
        difference = (both[0] - both[1] - sums).tolist()
        assert [entry["error"] for entry in convergence] == pytest.approx(difference, abs=1e-4)
        errors.append(max(abs(entry["error"]) for entry in convergence))
    assert errors[0] > 30 * errors[2]
    assert errors[2] < 0.01


def test_an_image_as_its_own_baseline_has_a_map_of_zeros() -> None:
    model, pixels = transformers_vit()
    with pytest.warns(VitscopeWarning, match="zero everywhere"):
        result = vs.integrated_gradients(model, pixels, target=1, steps=3, baseline=pixels)
    assert not bool(result.values.any())
    assert [entry["error"] for entry in result.provenance["convergence"]] == [0, 0]


@pytest.mark.parametrize("baseline", ["black", "grey", "mean", "blur", "noise", (10, 200, 30)])
def test_every_baseline_of_a_photo(baseline: Any) -> None:
    model = vs.load("vit-nano")
    result = vs.integrated_gradients(model, photo(32, 32), target="cat", steps=2, baseline=baseline)
    assert result.values.shape == (1, 8, 8)
    assert result.provenance["convergence"][0]["baseline"] != result.provenance["convergence"][0]["output"]


@pytest.mark.slow
def test_the_class_of_the_image_is_explained_along_the_whole_way() -> None:
    model, pixels = transformers_vit()
    with torch.no_grad(), model.running():
        classes = model.logits(pixels).argmax(-1).tolist()
    options: dict[str, Any] = {"steps": 4, "baseline": torch.zeros_like(pixels)}
    expected = vs.integrated_gradients(model, pixels, target=classes, **options)
    assert torch.equal(vs.integrated_gradients(model, pixels, **options).values, expected.values)


@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range() -> None:
    model, pixels = transformers_vit()
    for options, text in (
        ({"steps": 0}, "steps is 0, at least 1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"at": "tokens"}, "at is 'tokens'"),
        ({"baseline": torch.zeros(3, 8, 8)}, "baseline has the shape"),
        ({"baseline": torch.zeros(3, 3, 32, 32)}, "baseline has the shape"),
        ({"baseline": "white noise"}, "baseline is 'white noise'"),
        ({"baseline": "drop"}, "baseline is 'drop'"),
    ):
        with pytest.raises(CallError, match=text):
            vs.integrated_gradients(model, pixels, **options)  # type: ignore[arg-type]
