"""LIME: equal to PyPI's lime and to a slow reference; its properties."""

from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.lime import (
    COEFFICIENTS,
    assert_close,
    blocks,
    every_sampling,
    fitted,
    linear_model,
    sampler_of,
    shrunk,
)
from tests.helpers.tiny import tiny_vit
from tests.reference import lime as slow
from vitscope.estimators.surrogate import fit
from vitscope.methods.lime import kernel
from vitscope.perturb.masks import PairedSampler, UniformSampler


def probabilities(model: vs.VisionModel, photos: Any) -> np.ndarray:
    with torch.no_grad(), model.running():
        logits = model.logits(model.prepare(list(photos))[0])
    assert logits is not None
    return logits.softmax(-1).numpy()


# Equality with PyPI's lime


PHOTOS: dict[str, tuple[str, tuple[int, int]]] = {
    "cat": ("chelsea", (90, 60)),
    "astronaut": ("astronaut", (96, 96)),
    "grey": ("camera", (60, 70)),
    "as large as the input": ("astronaut", (32, 32)),
}


def pypi(photo: np.ndarray, model: vs.VisionModel, seed: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Return lime's own explanation, without its progress bar."""
    image = pytest.importorskip("lime.lime_image", reason="the reference is PyPI's lime 0.2.0.1")
    monkeypatch.setattr(image, "tqdm", lambda rows: rows)
    explainer = image.LimeImageExplainer(random_state=seed)
    return explainer.explain_instance(photo, lambda photos: probabilities(model, photos), **options)


def assert_equal_to_pypi(result: vs.SegmentAttribution, explanation: Any, model: vs.VisionModel) -> None:
    assert np.array_equal(result.segments.numpy(), explanation.segments)
    assert result.classes == [model.label(int(label)) for label in explanation.top_labels]
    for label in explanation.top_labels:
        explained = result.of(model.label(int(label)))
        assert_close(explained.weights, [weight for _, weight in sorted(explanation.local_exp[label])])
        assert explained.intercept == pytest.approx(explanation.intercept[label], rel=1e-6)
    # lime keeps the score and the local prediction of the class that it explains last.
    assert result.score == pytest.approx(explanation.score, rel=1e-6)
    assert result.local_prediction == pytest.approx(float(explanation.local_pred[0]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(("seed", "hide", "hide_color"), [(0, "mean", None), (17, "black", 0)])
def test_it_equals_pypis_lime(
    nano: vs.VisionModel, name: str, seed: int, hide: str, hide_color: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five classes at once, over quickshift's segments."""
    photo = shrunk(*PHOTOS[name])
    explanation = pypi(photo, nano, seed, monkeypatch, num_samples=60, hide_color=hide_color)
    result = vs.lime(nano, photo, num_samples=60, hide=hide, seed=seed, batch_size=10)
    assert_equal_to_pypi(result, explanation, nano)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 12345])
def test_it_equals_pypis_lime_with_given_segments(
    nano: vs.VisionModel, cat: np.ndarray, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = blocks(40, 60, 10)
    # lime expects labels that are consecutive numbers from 0.
    counted = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    options: dict[str, Any] = {"num_samples": 90, "top_labels": 3}
    explanation = pypi(cat, nano, seed, monkeypatch, segmentation_fn=lambda _: counted, **options)
    explanation.segments = labels
    for segments in (labels, lambda _: labels):
        result = vs.lime(nano, cat, segments=segments, seed=seed, batch_size=10, **options)
        assert_equal_to_pypi(result, explanation, nano)


@pytest.mark.slow
def test_a_grey_photo_equals_pypis_lime(nano: vs.VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo (height, width) equals one of three equal channels."""
    photo = shrunk("camera", (40, 40))
    flat = vs.lime(nano, photo, num_samples=30, batch_size=10)
    coloured = vs.lime(nano, photo[..., None].repeat(3, -1), num_samples=30, batch_size=10)
    assert torch.equal(flat.weights, coloured.weights)
    assert_equal_to_pypi(flat, pypi(photo, nano, 0, monkeypatch, num_samples=30), nano)


# Equality with the slow reference


@pytest.mark.slow
@every_sampling
def test_it_equals_the_slow_reference(nano: vs.VisionModel, cat: np.ndarray, sampling: str) -> None:
    labels = blocks(40, 60, 20)
    rows = sampler_of(sampling, 6, 5).draw(50)
    outputs = probabilities(nano, [slow.hidden(cat, labels, row) for row in rows]).astype(float)
    weights = np.ones(50) if sampling == "glime" else np.array([slow.kernel(row) for row in rows])
    result = vs.lime(nano, cat, num_samples=50, segments=labels, seed=5, batch_size=50, sampling=sampling, alpha=0.5)
    assert len(result.classes) == 5
    for label in result.classes:
        index = nano.labels.index(label)
        coefficients, intercept, score = slow.ridge(rows, outputs[:, index], weights, 0.5)
        explained = result.of(label)
        assert_close(explained.weights, coefficients)
        assert explained.intercept == pytest.approx(intercept, rel=1e-6)
        assert explained.score == pytest.approx(score, rel=1e-6)
        assert explained.local_prediction == pytest.approx(intercept + coefficients.sum(), rel=1e-6)
        assert explained.output == pytest.approx(outputs[0, index], rel=1e-6)


@pytest.mark.parametrize("width", [0.1, 0.25, 1.0])
def test_the_kernel_is_limes(width: float) -> None:
    rows = slow.all_rows(5)
    assert kernel(rows.mean(1), width) == pytest.approx([slow.kernel(row, width) for row in rows], rel=1e-12)


@pytest.mark.slow
def test_options_of_the_regression_have_an_effect(nano: vs.VisionModel, cat: np.ndarray) -> None:
    labels = blocks(40, 60, 20)
    rows = UniformSampler(6, 0).draw(40)
    outputs = probabilities(nano, [slow.hidden(cat, labels, row) for row in rows]).astype(float)
    for alpha, width in ((0.0, 0.25), (10.0, 0.25), (1.0, 0.6)):
        result = vs.lime(
            nano, cat, target="cat", num_samples=40, segments=labels, batch_size=40, alpha=alpha, kernel_width=width
        )
        weights = np.array([slow.kernel(row, width) for row in rows])
        assert_close(result.weights, slow.ridge(rows, outputs[:, 3], weights, alpha)[0])


# Properties


@every_sampling
def test_a_linear_model_is_explained_by_its_coefficients(sampling: str) -> None:
    model, labels = linear_model()
    result = vs.lime(
        model, slow.WHITE, segments=labels, hide="black", output="logit", alpha=1e-9, num_samples=40, sampling=sampling
    )
    assert result.classes == ["class 1", "class 0"]  # likeliest first: 2.25 and 0.25
    for index in (0, 1):
        explained = result.of(f"class {index}")
        assert explained.weights.numpy() == pytest.approx(COEFFICIENTS[:, index], abs=1e-5)
        assert (explained.intercept, explained.score) == pytest.approx((0.5, 1), abs=1e-5)
        assert explained.local_prediction == pytest.approx(0.5 + COEFFICIENTS[:, index].sum(), abs=1e-5)
        assert explained.intervals is not None
        assert float((explained.intervals[:, 1] - explained.intervals[:, 0]).max()) < 1e-4


def test_a_tensor_is_hidden_in_the_same_way_as_a_photo() -> None:
    """Without preprocessing black is the smallest value of a tensor."""
    module = slow.linear(slow.stripes(5), COEFFICIENTS, 0.5)
    white = torch.ones(1, 3, 8, 16)
    results = [
        vs.lime(vs.load(module, image_size=(8, 16)), images, segments=slow.stripes(5), hide="black", output="logit")
        for images in (slow.WHITE, white)
    ]
    torch.testing.assert_close(results[1].weights, results[0].weights, atol=1e-6, rtol=1e-5)


def test_permuting_the_segments_permutes_the_weights_only() -> None:
    random = np.random.default_rng(0)
    rows, order = random.integers(0, 2, (60, 6)).astype(bool), random.permutation(6)
    outputs = random.random((60, 2))
    original, permuted = fitted("lime", rows, outputs), fitted("lime", rows[:, order], outputs)
    assert_close(permuted.weights, original.weights[:, order], 1e-10)
    assert_close(permuted.intervals(0.9), original.intervals(0.9)[:, order], 1e-10)
    assert_close(permuted.intercepts, original.intercepts, 1e-10)
    assert_close(permuted.scores, original.scores, 1e-10)


def test_the_order_of_samples_does_not_matter() -> None:
    random = np.random.default_rng(1)
    rows, order = random.integers(0, 2, (50, 5)).astype(bool), random.permutation(50)
    outputs = random.random((50, 1))
    original, permuted = fitted("lime", rows, outputs), fitted("lime", rows[order], outputs[order])
    assert_close(permuted.weights, original.weights, 1e-10)
    assert_close(permuted.intervals(0.95), original.intervals(0.95), 1e-10)


def test_an_even_effect_cancels_between_a_mask_and_its_complement() -> None:
    """Without weights, an output that a mask shares with its complement gives zero coefficients."""
    rows = PairedSampler(7, 3).draw(41)[1:]
    assert np.array_equal(rows[1::2], ~rows[::2])
    outputs = np.cos((rows.sum(1) - 3.5) ** 2)
    surrogate = fit(rows, outputs[:, None], np.ones(40), 0.1, np.arange(40) // 2)
    assert np.abs(surrogate.weights).max() < 1e-12


@pytest.mark.slow
@every_sampling
def test_batch_size_changes_nothing(nano: vs.VisionModel, cat: np.ndarray, sampling: str) -> None:
    options: dict[str, Any] = {"num_samples": 50, "segments": blocks(40, 60, 20), "sampling": sampling}
    expected = vs.lime(nano, cat, batch_size=64, **options)
    for size in (1, 7):
        result = vs.lime(nano, cat, batch_size=size, **options)
        assert_close(result.weights, expected.weights, 1e-5)
        assert_close(result.intervals, expected.intervals, 1e-5)
        assert result.intercept == pytest.approx(expected.intercept, abs=1e-6)


@pytest.mark.slow
@every_sampling
def test_the_result_depends_on_the_seed_alone(nano: vs.VisionModel, cat: np.ndarray, sampling: str) -> None:
    options: dict[str, Any] = {"num_samples": 40, "segments": blocks(40, 60, 20), "sampling": sampling}
    first, again, reseeded = (vs.lime(nano, cat, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(first.weights, again.weights)
    assert not torch.allclose(first.weights, reseeded.weights, rtol=1e-2)


@pytest.mark.slow
def test_a_target_is_an_index_or_a_label_and_other_classes_come_from_the_same_outputs(
    nano: vs.VisionModel, cat: np.ndarray
) -> None:
    options: dict[str, Any] = {"num_samples": 40, "segments": blocks(40, 60, 20)}
    dog = vs.lime(nano, cat, target=5, **options)
    assert (dog.target, dog.classes[0]) == ("dog", "dog")
    for target in ("dog", "DOG", "5"):
        assert torch.equal(vs.lime(nano, cat, target=target, **options).weights, dog.weights)
    default = vs.lime(nano, cat, **options)
    assert default.target == nano.predict(cat)[0][0].label == default.classes[0]
    switched = default.of("dog")
    assert torch.equal(switched.weights, dog.weights)
    assert torch.equal(switched.values, dog.values)
    assert switched.target == "dog"
    assert sorted(switched.classes) == sorted(default.classes)
    assert torch.equal(switched.of(default.target).weights, default.weights)
    index = default.class_indices[default.classes.index("dog")]
    assert torch.equal(default.of(index).weights, dog.weights)


def test_another_class_is_selected_by_a_synonym_or_by_its_index() -> None:
    twin = tiny_vit()
    twin.config.id2label = {0: "plane, airplane", 1: "thing", 2: "thing", 3: "d", 4: "e", 5: "f", 6: "g"}
    result = vs.lime(vs.load(twin), torch.randn(1, 3, 32, 32), num_samples=40, segments="patches", top_labels=7)
    assert result.of("airplane").target == "plane, airplane"
    assert not torch.equal(result.of(1).weights, result.of(2).weights)


@pytest.mark.slow
def test_top_labels_is_the_number_of_classes_besides_the_target(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 30, "segments": blocks(40, 60, 20)}
    ranked = [prediction.label for prediction in nano.predict(cat, top_k=10)[0]]
    assert vs.lime(nano, cat, top_labels=3, **options).classes == ranked[:3]
    assert vs.lime(nano, cat, target=ranked[-1], top_labels=2, **options).classes == [ranked[-1], *ranked[:2]]
    assert vs.lime(nano, cat, target="dog", top_labels=0, **options).classes == ["dog"]
    assert vs.lime(nano, cat, top_labels=99, **options).classes == ranked


@pytest.mark.slow
def test_the_logit_can_be_explained(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 40, "segments": blocks(40, 60, 20), "target": "cat"}
    probability, logit = vs.lime(nano, cat, **options), vs.lime(nano, cat, output="logit", **options)
    with torch.no_grad(), nano.running():
        logits = nano.logits(nano.prepare(cat)[0])[0]
    assert logit.output == pytest.approx(float(logits[3]), rel=1e-6)
    assert probability.output == pytest.approx(float(logits.softmax(-1)[3]), rel=1e-6)
    assert not torch.allclose(probability.weights, logit.weights)
    assert logit.provenance["parameters"]["output"] == "logit"
