"""Targets: the number that is explained, its label, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.gradients import case, transformers_vit
from tests.helpers.lime import shrunk
from tests.helpers.tiny import LABELS
from vitscope.errors import CallError
from vitscope.methods import _gradient
from vitscope.models.targets import score

LOGITS = torch.tensor(
    [[1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 0.2], [0.3, 4.0, -0.5, 1.0, 2.0, 1.5, -3.0]], dtype=torch.float64
)


@pytest.fixture(scope="module")
def vit() -> vs.VisionModel:
    return transformers_vit()[0]


def values(model: vs.VisionModel, target: Any, kind: Any = "logit", logits: Tensor = LOGITS) -> list[float]:
    return score(model, logits, True, target, kind).values.tolist()


def test_every_way_to_name_a_class(vit: vs.VisionModel) -> None:
    assert values(vit, 3) == [3.0, 1.0]
    assert values(vit, "thing 3") == [3.0, 1.0]
    assert values(vit, None) == [3.0, 4.0]
    assert values(vit, [1, "thing 4"]) == [-2.0, 2.0]
    assert values(vit, (3, "thing 0")) == [2.0, pytest.approx(0.7)]
    assert values(vit, [(0, 1), 2]) == [3.0, -0.5]
    assert values(vit, lambda logits: logits.sum(-1)) == pytest.approx(LOGITS.sum(-1).tolist())


def test_labels(vit: vs.VisionModel) -> None:
    assert list(score(vit, LOGITS, True, [1, 4]).labels) == [LABELS[1], LABELS[4]]
    assert score(vit, LOGITS, True, [1, 4]).label is None
    assert score(vit, LOGITS, True, (1, 4)).label == "thing 1 − thing 4"
    assert score(vit, LOGITS, True, 2, "log_odds").output == "log_odds"


def test_every_output(vit: vs.VisionModel) -> None:
    chances = LOGITS.softmax(-1)[:, 2]
    assert values(vit, 2, "probability") == pytest.approx(chances.tolist(), rel=1e-12)
    assert values(vit, 2, "log_probability") == pytest.approx(chances.log().tolist(), rel=1e-12)
    assert values(vit, 2, "log_odds") == pytest.approx((chances / (1 - chances)).log().tolist(), rel=1e-12)
    # The log-odds of a certain class still have a gradient.
    certain = torch.zeros(1, 7, dtype=torch.float32)
    certain[0, 0] = 200
    certain.requires_grad_()
    (gradient,) = torch.autograd.grad(score(vit, certain, True, 0, "log_odds").values.sum(), certain)
    assert float(gradient[0, 0]) == 1
    assert float(gradient[0, 1:].sum()) == pytest.approx(-1)


def test_the_gradient_of_log_odds_is_that_of_the_probability_rescaled(vit: vs.VisionModel) -> None:
    logits = LOGITS.clone().requires_grad_()
    maps = {}
    for kind in ("log_odds", "probability"):
        result = score(vit, logits, True, 2, kind).values  # type: ignore[arg-type]
        maps[kind] = torch.autograd.grad(result.sum(), logits)[0]
    p = LOGITS.softmax(-1)[:, 2:3]
    torch.testing.assert_close(maps["log_odds"], maps["probability"] / (p * (1 - p)))


def test_features_without_classes() -> None:
    model = case("transformers-vit-bare").model()
    features = LOGITS.clone().requires_grad_()
    result = score(model, features, False, "similarity")
    assert result.values.tolist() == pytest.approx(LOGITS.norm(dim=-1).tolist())
    (gradient,) = torch.autograd.grad(result.values.sum(), features)
    torch.testing.assert_close(gradient, LOGITS / LOGITS.norm(dim=-1, keepdim=True))
    for target in (None, 0, "cat"):
        with pytest.raises(CallError, match=r"has no classifier.*target='similarity'"):
            score(model, features, False, target)


@pytest.mark.parametrize(
    ("target", "kind", "text"),
    [
        (7, "logit", "target 7 does not exist: the model has classes 0 to 6"),
        (-1, "logit", "does not exist"),
        (1.5, "logit", "target is 1.5"),
        ("thing 9", "logit", "is not a label of this model"),
        ([1], "logit", "target is a list of 1 for 2 images"),
        ([1, 2, 3], "logit", "target is a list of 3 for 2 images"),
        ((1, 1), "logit", "with itself is always 0"),
        ((1, "thing 1"), "logit", "with itself is always 0"),
        ((1, 2, 3), "logit", "a contrast is a pair"),
        ("similarity", "logit", "has classes, so pass one of them"),
        (1, "loss", "unknown output 'loss': choose logit, log_odds, probability, log_probability"),
        (lambda logits: logits, "logit", r"target returned \(2, 7\)"),
        (lambda logits: logits.sum(), "logit", r"target returned \(\)"),
        (lambda _: [0.0, 1.0], "logit", "target returned list"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_targets_that_are_refused(vit: vs.VisionModel, target: Any, kind: Any, text: str) -> None:
    with pytest.raises(CallError, match=text) as caught:
        score(vit, LOGITS, True, target, kind)
    assert "\n" not in str(caught.value)


def test_a_target_that_does_not_depend_on_the_output_is_refused(vit: vs.VisionModel) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(CallError, match="does not depend on the model's output, or detaches it"):
        vs.input_x_gradient(vit, pixels, target=lambda output: torch.zeros(len(output), device=output.device))


@pytest.mark.parametrize(
    "target",
    [
        torch.tensor([3, 1], device="cpu"),
        torch.tensor([3, 1], dtype=torch.int32, device="cpu"),
        np.array([3, 1]),
        np.array([3, 1], dtype=np.uint8),
    ],
    ids=lambda target: f"{type(target).__name__} {target.dtype}",
)
def test_a_tensor_or_array_of_indices_is_a_target_for_each_image(vit: vs.VisionModel, target: Any) -> None:
    assert values(vit, target) == values(vit, [3, 1]) == [3.0, 4.0]
    images = torch.randn(2, 3, 32, 32, device="cpu")
    for method in (vs.grad_cam, vs.occlusion, vs.libra):
        results = [method(vit, images, target=choice) for choice in (target, [3, 1])]
        assert torch.equal(results[0].values, results[1].values)
        assert [result.target for result in results[0]] == [LABELS[3], LABELS[1]]


def test_halves_of_a_batch_take_their_part_of_a_tensor(vit: vs.VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images, target = torch.randn(3, 3, 32, 32, device="cpu"), torch.tensor([3, 1, 2], device="cpu")
    whole = vs.grad_cam(vit, images, target=target)
    run = _gradient.in_halves

    def explain_one(images: Any, target: Any, explain: Any, join: Any) -> Any:
        def limited(images: Any, target: Any) -> Any:
            if len(images) > 1:
                raise MemoryError
            return explain(images, target)

        return run(images, target, limited, join)

    monkeypatch.setattr(_gradient, "in_halves", explain_one)
    with pytest.warns(vs.VitscopeWarning, match="not enough memory for a batch"):
        halves = vs.grad_cam(vit, images, target=target)
    torch.testing.assert_close(halves.values, whole.values)
    assert [result.target for result in halves] == [LABELS[3], LABELS[1], LABELS[2]]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([1, 2, 3], device="cpu"), "target is a list of 3 for 2 images: pass one target for each image"),
        (torch.tensor([1.0, 2.0], device="cpu"), "target is 2 of torch.float32: pass whole numbers"),
        (np.array([[1], [2]]), "target is 2×1 of int64: pass whole numbers, one class index for each image"),
        (np.array([True, False]), "target is 2 of bool: pass whole numbers"),
        (torch.tensor(1.5, device="cpu"), "target is a single number of torch.float32: pass whole numbers"),
        (np.array([1, 7]), "target 7 does not exist: the model has classes 0 to 6"),
    ],
)
def test_other_tensors_are_refused(vit: vs.VisionModel, target: Any, message: str) -> None:
    with pytest.raises(CallError) as caught:
        values(vit, target)
    assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("unchecked")
def test_a_tensor_of_a_single_number_is_one_class(vit: vs.VisionModel) -> None:
    assert values(vit, torch.tensor(3, device="cpu")) == values(vit, np.array(3)) == [3.0, 1.0]


def test_an_image_that_is_its_own_reference_is_a_warning() -> None:
    model = vs.load("vit-nano", output="features")
    cat, astronaut = shrunk("chelsea", (60, 40)), shrunk("astronaut", (50, 50))
    own, other = vs.SimilarTo(cat), vs.SimilarTo(astronaut)
    message = (
        r"^image 0 of 2 and the reference of SimilarTo are the same: their similarity is at its maximum, where its "
        r"gradient is zero, so grad_cam shows rounding noise; pass target='similarity', or use vitscope\.occlusion$"
    )
    with pytest.warns(vs.VitscopeWarning, match=message):
        vs.grad_cam(model, [cat, astronaut], target=[own, own])
    with pytest.warns(vs.VitscopeWarning, match="^images 0, 1 of 2 and the reference"):
        vs.grad_cam(model, [cat, astronaut], target=[own, other])
    # Neither another reference, nor the similarity along the features, nor gradients between two images are noise.
    vs.grad_cam(model, cat, target=other)
    vs.grad_cam(model, cat, target="similarity")
    vs.integrated_gradients(model, cat, target=own, steps=4)
    vs.occlusion(model, cat, target=own)
