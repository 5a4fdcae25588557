"""Targets of the methods that perturb images: contrasts, functions, similarity to an image, one per image, log-odds."""

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families
from tests.reference import lime as slow
from vitscope.models.targets import numbers_of_classes, score

NAMES = ("boxer", "bull mastiff, mastiff", "tabby")
LABELS = slow.stripes(4)
MATRIX = np.random.default_rng(3).normal(size=(4, 3))
BLACK = np.zeros((8, 16, 3), np.uint8)


def classifier(matrix: np.ndarray = MATRIX) -> vs.VisionModel:
    return vs.load(slow.linear(LABELS, matrix), image_size=(8, 16), labels=NAMES)


def embedding() -> vs.VisionModel:
    return vs.load(slow.linear(LABELS, MATRIX, base=0.3), image_size=(8, 16), output="features")


def logits_of(visible: np.ndarray, base: float = 0.0) -> np.ndarray:
    return base + visible.astype(float) @ MATRIX


def number(logits: np.ndarray, index: int, output: str) -> float:
    """Return the number of a class, from logits of one image."""
    others = sum(np.exp(value) for i, value in enumerate(logits) if i != index)
    probability = np.exp(logits[index]) / (others + np.exp(logits[index]))
    return {
        "logit": logits[index],
        "probability": probability,
        "log_probability": np.log(probability),
        "log_odds": np.log(probability / (1 - probability)),
    }[output]


def shapley(value: Callable[[np.ndarray], float]) -> np.ndarray:
    """Return the mean gain of each of four segments over all orders in which they can be shown."""
    gains = np.zeros(4)
    orders = list(permutations(range(4)))
    for order in orders:
        visible = np.zeros(4, dtype=bool)
        for segment in order:
            before = value(visible)
            visible[segment] = True
            gains[segment] += (value(visible) - before) / len(orders)
    return gains


def explained(model: vs.VisionModel, target: Any, image: np.ndarray = slow.WHITE, **options: Any) -> Any:
    return vs.kernel_shap(model, image, target=target, segments=LABELS, hide="black", num_samples=14, **options)


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability", "log_odds"])
@pytest.mark.parametrize("target", [0, "tabby", ("boxer", "mastiff"), (2, 0), (None, "tabby")], ids=str)
def test_every_output_of_classes_and_contrasts(target: Any, output: Any) -> None:
    top = int(logits_of(np.ones(4)).argmax())
    indices = {"boxer": 0, "mastiff": 1, "tabby": 2, None: top}
    pair = target if isinstance(target, tuple) else (target,)
    first, *second = (indices.get(choice, choice) for choice in pair)

    def value(visible: np.ndarray) -> float:
        logits = logits_of(visible)
        return number(logits, first, output) - sum(number(logits, index, output) for index in second)

    result = explained(classifier(), target, output=output)
    np.testing.assert_allclose(result.weights, shapley(value), atol=2e-6)
    assert result.output == pytest.approx(value(np.ones(4)), abs=1e-6)
    assert result.target == " − ".join(NAMES[index] for index in (first, *second))
    assert result.provenance["parameters"]["output"] == output
    assert sorted(result.classes[len(second) :] if second else result.classes) == sorted(NAMES)


def test_a_function_of_the_logits() -> None:
    def product(logits: Tensor) -> Tensor:
        return logits[:, 0] * logits[:, 2]

    result = explained(classifier(), product)
    expected = shapley(lambda visible: float(np.prod(logits_of(visible)[[0, 2]])))
    np.testing.assert_allclose(result.weights, expected, atol=2e-6)
    assert (result.target, result.provenance["parameters"]["output"]) == ("product", "custom")
    assert (result.class_indices[0], len(result.classes)) == (None, 4)
    # The number of a function does not make it one of the most probable classes.
    large = explained(classifier(), lambda logits: 100 + logits[:, 1], top_labels=1)
    assert large.classes[1:] == explained(classifier(), None, top_labels=1).classes


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_similarity_to_another_image() -> None:
    reference = np.where((LABELS % 2 == 0)[..., None], slow.WHITE, BLACK)
    features = logits_of(np.array([1, 0, 1, 0]), base=0.3)
    result = explained(embedding(), vs.SimilarTo(reference))
    expected = shapley(lambda visible: cosine(logits_of(visible, base=0.3), features))
    np.testing.assert_allclose(result.weights, expected, atol=2e-6)
    assert result.target == "similarity to another image"
    assert result.provenance["parameters"]["output"] == "similarity"
    own = result.of("similarity").weights
    features = logits_of(np.ones(4), base=0.3)
    np.testing.assert_allclose(own, shapley(lambda visible: cosine(logits_of(visible, base=0.3), features)), atol=2e-6)


def test_the_gradient_of_the_similarity_to_another_image() -> None:
    reference = np.where((LABELS < 2)[..., None], slow.WHITE, BLACK)
    target = logits_of(np.array([1, 1, 0, 0]), base=0.3)
    features = torch.randn(2, 3, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    output = features.clone().requires_grad_()
    explained_score = score(embedding(), output, False, vs.SimilarTo(reference))
    (gradient,) = torch.autograd.grad(explained_score.values.sum(), output)
    for row, slope, value in zip(features.numpy(), gradient.numpy(), explained_score.values.tolist(), strict=True):
        length, similarity = np.linalg.norm(row), cosine(row, target)
        assert value == pytest.approx(similarity, abs=1e-6)
        expected = target / np.linalg.norm(target) / length - similarity * row / length**2
        np.testing.assert_allclose(slope, expected, atol=1e-6)
    assert (explained_score.label, explained_score.output) == ("similarity to another image", "similarity")


def test_log_odds_of_saturated_logits_are_exact_and_have_a_gradient() -> None:
    rows = torch.tensor([[60.0, 1.0, -3.0], [0.2, 0.2, 0.2], [-50.0, 30.0, 29.0]], device="cpu", requires_grad=True)
    values = numbers_of_classes(classifier(), rows, "log_odds")
    exact = rows.detach().double().numpy()
    for i, j in np.ndindex(3, 3):
        others = np.delete(exact[i], j)
        assert values[i, j].item() == pytest.approx(exact[i, j] - np.logaddexp.reduce(others), rel=1e-5)
        (gradient,) = torch.autograd.grad(values[i, j], rows, retain_graph=True)
        expected = np.insert(-np.exp(others - np.logaddexp.reduce(others)), j, 1.0)
        np.testing.assert_allclose(gradient[i], expected, atol=1e-5)


METHODS: dict[str, Callable[..., vs.Attribution]] = {
    "lime": lambda model, images, **more: vs.lime(model, images, num_samples=30, segments="patches", **more),
    "kernel_shap": lambda model, images, **more: vs.kernel_shap(model, images, num_samples=40, **more),
    "occlusion": vs.occlusion,
    "rise": lambda model, images, **more: vs.rise(model, images, num_samples=20, **more),
    "grad_cam": vs.grad_cam,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::vitscope.VitscopeWarning")
@pytest.mark.parametrize("explain", METHODS.values(), ids=METHODS)
def test_one_target_per_image(explain: Callable[..., vs.Attribution]) -> None:
    family = next(family for family in families.ALL if family.name == "timm-vit")
    model, pixels = family.model(), family.pixels(2)
    options: dict[str, Any] = {"output": "logit"}
    targets = [1, (0, 2)]
    both = explain(model, pixels, target=targets, **options)
    for index, target in enumerate(targets):
        single = explain(model, pixels[index : index + 1], target=target, **options)
        labels = both.provenance["parameters"].get("target") or [image.target for image in both]
        assert labels[index] == single.target
        torch.testing.assert_close(both[index].values, single.values, atol=1e-5, rtol=1e-4)
    assert both.target is None
    for wrong in ([1], [1, 2, 0]):
        with pytest.raises(vs.CallError, match=rf"^target is a list of {len(wrong)} for 2 images: pass one") as caught:
            explain(model, pixels, target=wrong, **options)
        assert "\n" not in str(caught.value)


def test_the_curve_of_a_contrast_is_the_difference_of_curves() -> None:
    family = next(family for family in families.ALL if family.name == "timm-vit")
    model, pixels = family.model(), family.pixels(2)
    result = vs.occlusion(model, pixels, target=0)
    first, second, contrast = (vs.faithfulness(model, pixels, result, target=t, steps=4) for t in (0, 3, (0, 3)))
    mixed = vs.faithfulness(model, pixels, result, target=[0, 3], steps=4)
    for name in ("deletion", "insertion", "random_deletion", "random_insertion"):
        areas = [getattr(areas, name) for areas in (first, second, contrast, mixed)]
        np.testing.assert_allclose(areas[2], areas[0] - areas[1], atol=1e-12)
        assert areas[3].tolist() == [areas[0][0], areas[1][1]]
    with pytest.raises(vs.CallError, match="target is a list of 1 for 2 images"):
        vs.faithfulness(model, pixels, result, target=[0])


def test_a_contrast_is_a_column_beside_the_classes_of_lime(tmp_path: Path) -> None:
    options: dict[str, Any] = {"segments": LABELS, "hide": "black", "num_samples": 40}
    result = vs.lime(classifier(), slow.WHITE, target=("boxer", "tabby"), **options)
    first, second = result.of("boxer"), result.of(2)
    torch.testing.assert_close(result.weights, first.weights - second.weights)
    assert result.target == "boxer − tabby"
    assert result.class_indices[0] is None
    assert sorted(result.classes[1:]) == sorted(NAMES)
    assert first.of("boxer − tabby").target == result.target
    assert result.of("mastiff").target == NAMES[1]
    loaded = vs.SegmentAttribution.load(result.save(tmp_path / "contrast.safetensors"))
    assert loaded.class_indices == result.class_indices
    torch.testing.assert_close(loaded.of("boxer − tabby").weights, result.weights)
    assert vs.lime(classifier(), slow.WHITE, target=(0, 2), top_labels=0, **options).classes == ["boxer − tabby"]
    # A contrast of two long names is not one of its synonyms.
    named = vs.lime(classifier(), slow.WHITE, target=("mastiff", "boxer"), **options)
    assert named.of("bull mastiff").target == NAMES[1]


@pytest.mark.filterwarnings("ignore:the logit of")
def test_a_contrast_of_large_outputs_has_no_rounding_in_it() -> None:
    matrix = np.array([[4e-4, 0.0, 0.0]] * 4)
    model = vs.load(slow.linear(LABELS, matrix, base=1000.0), image_size=(8, 16), labels=NAMES)
    assert not explained(model, (0, 1), output="logit").weights.any()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("tabby", 2), "a contrast of 'tabby' with itself is always 0: pass two different classes"),
        (("boxer", "tabby", 1), "a contrast is a pair of classes, such as"),
        (("boxer", "cat"), "target 'cat' is not a label of this model"),
        (("boxer", None), "target is None, a whole number is expected"),
        ([[0]], "one class for all images is expected"),
        ("similarity", "target 'similarity' is not a label: .* has classes, so pass one of them"),
        (vs.SimilarTo(BLACK), "returns classes, not features: load it with output='features'"),
        (lambda logits: logits, r"target returned \(\d+, 3\): a tensor \(\d+,\), one number per image, is expected"),
        (len, r"target returned int: a tensor \(\d+,\), one number per image, is expected"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_target_that_does_not_fit_is_refused_in_one_line(target: Any, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        explained(classifier(), target)
    assert "\n" not in str(caught.value)


def test_a_reference_is_one_image_and_a_value_is_finite() -> None:
    with pytest.raises(vs.CallError, match="SimilarTo takes one image, not 2: pass a list of targets"):
        explained(embedding(), vs.SimilarTo([BLACK, BLACK]))
    with pytest.raises(vs.WorkError, match="NaN or infinity") as caught:
        explained(classifier(), lambda logits: logits[:, 0] / 0)
    assert "\n" not in str(caught.value)


def test_infinite_log_odds_are_refused() -> None:
    matrix = np.array([[1.0, 0.0, 0.0]] + [[0.0, 0.0, 0.0]] * 3)
    certain = slow.Known(LABELS, lambda visible: visible @ torch.from_numpy(matrix).float())
    model = vs.load(certain, image_size=(8, 16), output="probabilities", labels=NAMES)
    with pytest.raises(vs.WorkError, match="probability of exactly 0 or 1: pass output='probability'"):
        explained(model, 0, output="log_odds")


def columns(result: vs.Composition, names: Sequence[str]) -> np.ndarray:
    return result.outputs[:, [list(result.labels).index(name) for name in names]]


@pytest.mark.filterwarnings("ignore::vitscope.VitscopeWarning")
def test_compose_shows_a_contrast_beside_its_classes() -> None:
    marked = {"a": (1, 1, 5, 5)}
    options: dict[str, Any] = {"tests": ("size", "location"), "places": 2}
    plain = vs.compose(classifier(), slow.WHITE // 2, marked, **options)
    result = vs.compose(classifier(), slow.WHITE // 2, marked, target=("boxer", "tabby"), **options)
    assert list(result.labels) == [*NAMES, "boxer − tabby"]
    assert np.array_equal(result.outputs[:, :3], plain.outputs)
    first, second, contrast = columns(result, ["boxer", "tabby", "boxer − tabby"]).T
    np.testing.assert_allclose(contrast, first - second, atol=1e-12)
    assert [r.label for r in result.ranking(0, top_k=9).classes] == [r.label for r in plain.ranking(0, 9).classes]
    assert result.column() == result.column("boxer − tabby") == 3
    assert result.column((0, 2)) == result.column(("boxer", 2)) == 3
    with pytest.raises(vs.CallError, match="the contrast 'tabby − boxer' was not evaluated: pass it as target= to"):
        result.column((2, 0))
    with pytest.raises(vs.CallError, match="the contrast 'boxer − tabby' was not evaluated"):
        plain.column(("boxer", "tabby"))
    assert (result.column("tabby"), result.output, result.output_of(3)) == (2, "probability", "probability")
    assert result.location_map("a").target == result.size_curve("a").target == "boxer − tabby"
    custom = vs.compose(classifier(), slow.WHITE // 2, marked, target=lambda logits: logits[:, 1], **options)
    assert (custom.output, custom.output_of(custom.column())) == ("probability", "custom")
    with pytest.raises(vs.CallError, match="target is a list of 2 for 1 image: pass one target for each image"):
        vs.compose(classifier(), slow.WHITE // 2, marked, target=[0, 1], **options)
