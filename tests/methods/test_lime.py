"""LIME: equal to PyPI's lime and to a slow reference; properties of its weights, intervals and stopping rule."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers import families, tiny
from tests.helpers.tiny import tiny_vit
from tests.reference import lime as slow
from vitscope.methods.lime import Plan, is_settled, kernel
from vitscope.methods.surrogate import Surrogate, fit, quantile, upper_tail
from vitscope.perturb.masks import KernelSampler, PairedSampler, Sampler, UniformSampler

SAMPLINGS = ["lime", "paired", "glime"]

every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


def shrunk(name: str, size: tuple[int, int]) -> np.ndarray:
    """Return one of scikit-image's photos, resized to (width, height) pixels."""
    import skimage.data

    return np.asarray(Image.fromarray(getattr(skimage.data, name)()).resize(size, Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def nano() -> vs.VisionModel:
    return vs.load("vit-nano")


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return shrunk("chelsea", (60, 40))


def blocks(height: int, width: int, side: int) -> np.ndarray:
    """Return square segments with labels that neither start at 0 nor are consecutive."""
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return 10 + 3 * (rows[:, None] * (columns[-1] + 1) + columns)


def sampler_of(sampling: str, segments: int, seed: int) -> Sampler:
    if sampling == "glime":
        return KernelSampler(segments, seed, lambda counts: kernel(counts / segments, 0.25))
    return {"lime": UniformSampler, "paired": PairedSampler}[sampling](segments, seed)


def fitted(sampling: str, rows: np.ndarray, outputs: np.ndarray, alpha: float = 1.0) -> Surrogate:
    """Fit the regression for a sampling: GLIME has no weights, and pairs form groups."""
    count = len(rows)
    weights = np.ones(count) if sampling == "glime" else kernel(rows.mean(1), 0.25)
    groups = (np.arange(count) + 1) // 2 if sampling == "paired" else np.arange(count)
    return fit(rows, outputs, weights, alpha, groups)


def probabilities(model: vs.VisionModel, photos: Any) -> np.ndarray:
    with torch.no_grad(), model.running():
        logits = model.answer(model.prepare(list(photos))[0])
    assert logits is not None
    return logits.softmax(-1).numpy()


def assert_close(got: Any, expected: Any, rel: float = 1e-6) -> None:
    """Check equality relative to the largest number."""
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= rel * np.abs(expected).max()


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


def test_a_grey_photo_equals_pypis_lime(nano: vs.VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo (height, width) equals one of three equal channels."""
    photo = shrunk("camera", (40, 40))
    flat = vs.lime(nano, photo, num_samples=30, batch_size=10)
    coloured = vs.lime(nano, photo[..., None].repeat(3, -1), num_samples=30, batch_size=10)
    assert torch.equal(flat.weights, coloured.weights)
    assert_equal_to_pypi(flat, pypi(photo, nano, 0, monkeypatch, num_samples=30), nano)


# Equality with the slow reference


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
        assert explained.answer == pytest.approx(outputs[0, index], rel=1e-6)


@pytest.mark.parametrize("width", [0.1, 0.25, 1.0])
def test_the_kernel_is_limes(width: float) -> None:
    rows = slow.all_rows(5)
    assert kernel(rows.mean(1), width) == pytest.approx([slow.kernel(row, width) for row in rows], rel=1e-12)


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


COEFFICIENTS = np.array([[1.5, 0.0], [-0.5, 0.25], [0.75, -1.0], [0.0, 2.0], [-2.0, 0.5]])


def linear_model() -> tuple[vs.VisionModel, np.ndarray]:
    labels = slow.stripes(5)
    return vs.load(slow.linear(labels, COEFFICIENTS, 0.5), image_size=(8, 16)), labels


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


@every_sampling
def test_batch_size_changes_nothing(nano: vs.VisionModel, cat: np.ndarray, sampling: str) -> None:
    options: dict[str, Any] = {"num_samples": 50, "segments": blocks(40, 60, 20), "sampling": sampling}
    expected = vs.lime(nano, cat, batch_size=64, **options)
    for size in (1, 7):
        result = vs.lime(nano, cat, batch_size=size, **options)
        assert_close(result.weights, expected.weights, 1e-5)
        assert_close(result.intervals, expected.intervals, 1e-5)
        assert result.intercept == pytest.approx(expected.intercept, abs=1e-6)


@every_sampling
def test_the_result_depends_on_the_seed_alone(nano: vs.VisionModel, cat: np.ndarray, sampling: str) -> None:
    options: dict[str, Any] = {"num_samples": 40, "segments": blocks(40, 60, 20), "sampling": sampling}
    first, again, reseeded = (vs.lime(nano, cat, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(first.weights, again.weights)
    assert not torch.allclose(first.weights, reseeded.weights, rtol=1e-2)


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
    torch.testing.assert_close(switched.weights, dog.weights)
    torch.testing.assert_close(switched.values, dog.values)
    assert switched.target == "dog"
    assert sorted(switched.classes) == sorted(default.classes)
    assert torch.equal(switched.of(default.target).weights, default.weights)
    index = default.class_indices[default.classes.index("dog")]
    torch.testing.assert_close(default.of(index).weights, dog.weights)
    few = vs.lime(nano, cat, top_labels=1, **options)
    for missing in ("ship", 9, "9"):
        with pytest.raises(vs.CallError, match="cat") as caught:
            few.of(missing)
        assert "\n" not in str(caught.value)


def test_another_class_is_selected_by_a_synonym_or_by_its_index() -> None:
    twin = tiny_vit()
    twin.config.id2label = {0: "plane, airplane", 1: "thing", 2: "thing", 3: "d", 4: "e", 5: "f", 6: "g"}
    result = vs.lime(vs.load(twin), torch.randn(1, 3, 32, 32), num_samples=40, segments="patches", top_labels=7)
    assert result.of("airplane").target == "plane, airplane"
    assert not torch.equal(result.of(1).weights, result.of(2).weights)


def test_top_labels_is_the_number_of_classes_besides_the_target(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 30, "segments": blocks(40, 60, 20)}
    ranked = [prediction.label for prediction in nano.predict(cat, top_k=10)[0]]
    assert vs.lime(nano, cat, top_labels=3, **options).classes == ranked[:3]
    assert vs.lime(nano, cat, target=ranked[-1], top_labels=2, **options).classes == [ranked[-1], *ranked[:2]]
    assert vs.lime(nano, cat, target="dog", top_labels=0, **options).classes == ["dog"]
    assert vs.lime(nano, cat, top_labels=99, **options).classes == ranked


def test_the_logit_can_be_explained(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 40, "segments": blocks(40, 60, 20), "target": "cat"}
    probability, logit = vs.lime(nano, cat, **options), vs.lime(nano, cat, output="logit", **options)
    with torch.no_grad(), nano.running():
        logits = nano.answer(nano.prepare(cat)[0])[0]
    assert logit.answer == pytest.approx(float(logits[3]), rel=1e-6)
    assert probability.answer == pytest.approx(float(logits.softmax(-1)[3]), rel=1e-6)
    assert not torch.allclose(probability.weights, logit.weights)
    assert logit.provenance["parameters"]["output"] == "logit"


# Intervals


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_intervals_contain_the_weights_and_grow_with_confidence(
    nano: vs.VisionModel, cat: np.ndarray, sampling: str
) -> None:
    options: dict[str, Any] = {"num_samples": 60, "segments": blocks(40, 60, 20), "sampling": sampling}
    widths = []
    for confidence in (0.5, 0.95, 0.99):
        result = vs.lime(nano, cat, confidence=confidence, **options)
        assert result.intervals is not None
        assert result.intervals.shape == (6, 2)
        assert bool((result.intervals[:, 0] <= result.weights).all())
        assert bool((result.weights <= result.intervals[:, 1]).all())
        widths.append((result.intervals[:, 1] - result.intervals[:, 0]).sum())
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@every_sampling
def test_variances_equal_the_slow_reference(sampling: str) -> None:
    rows = sampler_of(sampling, 6, 2).draw(60)
    outputs = np.random.default_rng(3).random((60, 2))
    groups = (np.arange(60) + 1) // 2 if sampling == "paired" else np.arange(60)
    weights = np.ones(60) if sampling == "glime" else kernel(rows.mean(1), 0.25)
    for alpha in (0.0, 1.0, 30.0):
        surrogate = fit(rows, outputs, weights, alpha, groups)
        for label in (0, 1):
            expected = slow.variances(rows, outputs[:, label], weights, alpha, groups)
            assert_close((surrogate.influences[label] ** 2).sum(0), expected, 1e-9)


def test_intervals_undo_the_penalty_to_first_order() -> None:
    rows, random = UniformSampler(6, 0).draw(80), np.random.default_rng(0)
    outputs = rows @ random.normal(size=(6, 1)) + 0.1 * random.normal(size=(80, 1))
    unpenalised, penalised = (fitted("lime", rows, outputs, alpha) for alpha in (0.0, 0.5))
    assert np.abs(unpenalised.shrinkage).max() == 0
    error = np.abs(penalised.weights - unpenalised.weights).max()
    assert np.abs(penalised.weights + penalised.shrinkage - unpenalised.weights).max() < 0.15 * error
    centres = penalised.intervals(0.95).mean(-1)
    reaching = np.abs(penalised.shrinkage) < quantile(0.95, penalised.freedom) * np.sqrt(
        (penalised.influences**2).sum(1)
    )
    assert bool(reaching.any())
    assert centres[reaching] == pytest.approx((penalised.weights + penalised.shrinkage)[reaching])


N = 8


@pytest.fixture(scope="module")
def population() -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs of a nonlinear model for all masks, and the coefficients of infinitely many samples."""
    random = np.random.default_rng(7)
    rows, linear, pairs = slow.all_rows(N).astype(float), random.normal(size=N), random.normal(size=(N, N)) * 0.4
    outputs = 1 / (1 + np.exp(-(rows @ linear + np.einsum("ri,ij,rj->r", rows, pairs, rows)))) + 0.3 * rows.prod(1)
    return outputs, slow.population(outputs, N)


def row_numbers(rows: np.ndarray) -> np.ndarray:
    """Return the index of each row among all rows."""
    return rows @ (2 ** np.arange(N - 1, -1, -1))


@every_sampling
@pytest.mark.parametrize("samples", [100, 400])
def test_intervals_cover_the_true_coefficients_at_their_confidence(
    population: tuple[np.ndarray, np.ndarray], sampling: str, samples: int
) -> None:
    outputs, coefficients = population
    covered, widths = [], []
    for seed in range(250):
        rows = sampler_of(sampling, N, seed).draw(samples)
        low, high = fitted(sampling, rows, outputs[row_numbers(rows)][:, None]).intervals(0.95)[0].T
        covered.append((low <= coefficients) & (coefficients <= high))
        widths.append(high - low)
    assert np.mean(covered) >= 0.92
    assert np.mean(covered) <= 0.999
    assert np.mean(covered, axis=0).min() >= 0.85
    assert np.mean(widths) < 1.1 * np.abs(coefficients).max()  # they are informative


@every_sampling
def test_all_samplings_estimate_the_same_coefficients(population: tuple[np.ndarray, np.ndarray], sampling: str) -> None:
    outputs, coefficients = population
    rows = sampler_of(sampling, N, 0).draw(60_001)
    got = fitted(sampling, rows, outputs[row_numbers(rows)][:, None], alpha=1e-9).weights[0]
    assert got == pytest.approx(coefficients, abs=0.02 * np.abs(coefficients).max())


def test_glimes_population_equals_limes(population: tuple[np.ndarray, np.ndarray]) -> None:
    """Unweighted masks drawn from the kernel are equivalent to uniform masks weighted by the kernel."""
    outputs, coefficients = population
    rows = slow.all_rows(N)
    chances = np.array([math.comb(N, int(row.sum())) * slow.kernel(row) for row in rows])
    chances /= np.array([math.comb(N, int(row.sum())) for row in rows])
    assert slow.population(outputs, N, chances / chances.sum()) == pytest.approx(coefficients, rel=1e-9)


def test_more_samples_make_narrower_intervals(population: tuple[np.ndarray, np.ndarray]) -> None:
    outputs, _ = population
    widths = []
    for samples in (100, 400, 1600):
        rows = UniformSampler(N, 0).draw(samples)
        low, high = fitted("lime", rows, outputs[row_numbers(rows)][:, None]).intervals(0.95)[0].T
        widths.append(float((high - low).mean()))
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.3)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize(("confidence", "freedom", "expected"), [(0.95, 10, 2.228), (0.9, 30, 1.697), (0.99, 60, 2.66)])
def test_the_quantile_is_students(confidence: float, freedom: int, expected: float) -> None:
    """Values from textbook tables."""
    assert quantile(confidence, freedom) == pytest.approx(expected, abs=2e-3)


# num_samples="auto"


def test_auto_stops_early_if_the_ranking_is_clear() -> None:
    model, labels = linear_model()
    result = vs.lime(
        model, slow.WHITE, target=0, num_samples="auto", segments=labels, hide="black", output="logit", top_segments=2
    )
    provenance = result.provenance
    assert provenance["samples"] <= 200
    assert provenance["parameters"]["num_samples"] == "auto"
    assert (provenance["parameters"]["settled"], provenance["parameters"]["sampling"]) == (True, "paired")
    assert result.top(2) == [0, 2]


def test_auto_continues_until_the_true_top_segments_are_found() -> None:
    """Two segments differ by less than the first samples resolve, and a product hides their order."""
    labels = slow.stripes(6)

    def logits(visible: torch.Tensor) -> torch.Tensor:
        first = visible @ torch.tensor([0.5, 2.0, 0.0, 1.6, 0.2, 0.0]) + visible[:, 4] * visible[:, 5] * visible[:, 0]
        return torch.stack([first, -first], 1)

    model = vs.load(slow.Known(labels, logits), image_size=(8, 16))
    rows = slow.all_rows(6)
    outputs = logits(torch.from_numpy(rows).float())[:, 0].numpy().astype(float)
    ranking = np.argsort(-slow.population(outputs, 6))
    samples = []
    for seed in range(5):
        result = vs.lime(
            model,
            slow.WHITE,
            target=0,
            num_samples="auto",
            segments=labels,
            hide="black",
            output="logit",
            top_segments=3,
            seed=seed,
        )
        assert result.provenance["parameters"]["settled"] is True
        samples.append(result.provenance["samples"])
        weights = result.weights.numpy()
        ties = 0.1 * np.abs(weights).max()
        for rank, segment in enumerate(result.top(3)):
            assert segment == ranking[rank] or abs(weights[segment] - weights[ranking[rank]]) < ties
    assert max(samples) < 10_000


def test_auto_gives_up_with_a_warning(nano: vs.VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.methods.lime.LOOKS", [128, 160])
    labels = np.arange(64).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    photo = shrunk("chelsea", (32, 32))
    with pytest.warns(
        vs.VitscopeWarning, match=r"after 160 samples the ranking of the top 5 segments is still not"
    ) as c:
        result = vs.lime(nano, photo, num_samples="auto", segments=labels)
    assert "\n" not in str(c[0].message)
    assert result.provenance["samples"] == 160
    assert result.provenance["parameters"]["settled"] is False


def surrogate(weights: list[float], spreads: list[float]) -> Surrogate:
    """Return independent coefficients with these standard errors."""
    return Surrogate(
        weights=np.array([weights]),
        intercepts=np.zeros(1),
        scores=np.ones(1),
        influences=np.diag(np.array(spreads, dtype=float))[None],
        shrinkage=np.zeros((1, len(weights))),
        freedom=1000,
    )


@pytest.mark.parametrize(
    ("weights", "spreads", "top", "settled"),
    [
        ([3.0, 2.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1], 2, True),
        ([3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], 2, False),
        # Segments below the top need not differ significantly.
        ([3.0, 2.0, 0.5, 0.45], [0.1, 0.1, 0.2, 0.2], 2, True),
        # The last of the top, and one far below it with a large error.
        ([3.0, 2.0, 0.5, 0.0], [0.1, 0.1, 0.1, 1.5], 2, False),
        # Certainly within a tenth of the largest weight: equal.
        ([3.0, 2.95, 0.0], [0.01, 0.01, 0.01], 1, True),
        ([3.0, 2.95, 0.0], [0.2, 0.2, 0.2], 1, False),
        # More than there are segments.
        ([2.0, 1.0], [0.01, 0.01], 5, True),
        ([2.0, 1.0], [2.0, 2.0], 5, False),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 2, True),
    ],
)
def test_the_ranking_is_settled_if_adjacent_weights_differ(
    weights: list[float], spreads: list[float], top: int, settled: bool
) -> None:
    assert is_settled(surrogate(weights, spreads), top, 0.05, 0.1) is settled


def test_a_common_influence_does_not_unsettle_the_ranking() -> None:
    correlated = dataclasses.replace(surrogate([2.0, 1.0], [0.0, 0.0]), influences=np.full((1, 4, 2), 5.0))
    assert is_settled(correlated, 1, 0.05, 0.0)


def test_a_smaller_error_needs_more_certainty() -> None:
    unsure = surrogate([1.0, 0.0], [0.3, 0.3])
    assert is_settled(unsure, 1, 0.05, 0.0)
    assert not is_settled(unsure, 1, 0.001, 0.0)


def test_a_wider_tie_needs_less_certainty() -> None:
    near = surrogate([1.0, 0.9], [0.05, 0.05])
    assert not is_settled(near, 1, 0.05, 0.0)
    assert not is_settled(near, 1, 0.05, 0.1)
    assert is_settled(near, 1, 0.05, 0.3)


def test_error_probabilities_add_up() -> None:
    """Each of the ten comparisons alone would be settled."""
    assert is_settled(surrogate([3.0, 0.0], [1.0, 0.0]), 1, 0.01, 0.0)
    assert not is_settled(surrogate([3.0, *[0.0] * 10], [1.0, *[0.0] * 10]), 1, 0.01, 0.0)


@pytest.mark.parametrize("freedom", [1, 3, 10, 100, 5000])
def test_the_tail_is_students(freedom: int) -> None:
    from scipy.stats import t

    values = np.array([-2.0, 0.0, 0.5, 1.0, 2.0, 3.5, 6.0])
    expected = t.sf(values, freedom)
    tolerance = {1: 0.25, 3: 0.12, 10: 0.06}.get(freedom, 0.02)
    assert upper_tail(values, freedom) == pytest.approx(expected, rel=tolerance)


def test_constant_outputs_settle_at_once() -> None:
    model = vs.load(slow.Known(slow.stripes(4), lambda visible: torch.zeros(len(visible), 2)), image_size=(8, 16))
    with pytest.warns(vs.VitscopeWarning) as caught:
        result = vs.lime(model, slow.WHITE, num_samples="auto", segments=slow.stripes(4), hide="black")
    assert ["is the same for all" in str(warning.message) for warning in caught] == [True]
    assert result.provenance["samples"] == 128


def test_pairs_that_were_evaluated_in_part_stay_pairs() -> None:
    """The indices of the evaluated rows determine the pairs."""
    plan = Plan.checked(sampling="paired")
    rows = plan.sampler(5).draw(41)
    outputs = np.random.default_rng(0).random((41, 1))
    evaluated = np.sort(np.random.default_rng(1).permutation(41)[:30])
    partial = plan.fitted(rows[evaluated], outputs[evaluated], evaluated)
    expected = fit(
        rows[evaluated],
        outputs[evaluated],
        kernel(rows[evaluated].mean(1), 0.25),
        1.0,
        np.unique((evaluated + 1) // 2, return_inverse=True)[1],
    )
    assert_close(partial.intervals(0.9), expected.intervals(0.9), 1e-12)
    assert partial.influences.shape[1] == len({(index + 1) // 2 for index in evaluated.tolist()})


# Results


@pytest.fixture(scope="module")
def result(nano: vs.VisionModel, cat: np.ndarray) -> vs.SegmentAttribution:
    return vs.lime(nano, cat, num_samples=60, segments=blocks(40, 60, 10), seed=2)


def test_values_are_the_weights_of_the_segments_in_the_order_of_their_labels(
    result: vs.SegmentAttribution, cat: np.ndarray
) -> None:
    labels = blocks(40, 60, 10)
    assert np.array_equal(result.segments.numpy(), labels)
    assert result.values.shape == (1, *cat.shape[:2])
    assert result.values.dtype == torch.float32
    assert result.weights.dtype == torch.float64
    assert (result.grid.height, result.grid.width, result.grid.prefix) == (40, 60, 0)
    for index, label in enumerate(np.unique(labels)):
        inside = result.values[0].numpy()[labels == label]
        assert np.array_equal(inside, np.full(100, np.float32(result.weights[index])))


def test_top_and_regions_are_the_largest_weights(result: vs.SegmentAttribution) -> None:
    weights = result.weights.numpy()
    orders = {"positive": np.argsort(-weights), "negative": np.argsort(weights), "both": np.argsort(-np.abs(weights))}
    for sign, order in orders.items():
        assert result.top(4, sign=sign) == order[:4].tolist()
        inside = np.isin(result.index.numpy(), order[:4])
        assert np.array_equal(result.regions(4, sign=sign).numpy(), inside)
    assert result.top() == orders["positive"][:5].tolist()
    positive = int((weights > 0).sum())
    assert len(result.top(99)) == positive
    assert len(result.top(99)) + len(result.top(99, sign="negative")) == len(weights)
    assert result.top(0) == []
    assert not result.regions(0).any()
    with pytest.raises(vs.CallError, match="sign is 'up': choose positive, negative, both"):
        result.top(sign="up")


def test_a_saved_result_reads_back(result: vs.SegmentAttribution, tmp_path: Path) -> None:
    back = vs.SegmentAttribution.load(result.save(tmp_path / "cat.safetensors"))
    for name in ("values", "segments", "index", "weights", "intervals"):
        assert torch.equal(getattr(back, name), getattr(result, name)), name
    for label in result.classes:
        explained, saved = result.of(label), back.of(label)
        assert torch.equal(saved.weights, explained.weights)
        assert torch.equal(saved.intervals, explained.intervals)
        assert (saved.intercept, saved.score, saved.target) == (explained.intercept, explained.score, explained.target)
        assert saved.answer == explained.answer
    assert back.provenance == result.provenance
    assert back.signed
    assert back.top(3) == result.top(3)
    assert torch.equal(back.regions(3), result.regions(3))
    with pytest.raises(vs.CallError, match="holds no photos"):
        back.overlay()


def test_a_result_is_saved_as_arrays_as_json_and_as_an_image(result: vs.SegmentAttribution, tmp_path: Path) -> None:
    with np.load(result.save(tmp_path / "cat.npz")) as arrays:
        assert np.array_equal(arrays["values"], result.values.numpy())
        assert np.array_equal(arrays["segments.0"], result.segments.numpy())
        assert np.array_equal(arrays["weights.0.0"], result.weights.numpy())
        assert np.array_equal(arrays["intervals.0.1"], result.of(result.classes[1]).intervals.numpy())
        assert json.loads(str(arrays["about"]))["target"] == result.target
    saved = json.loads(result.save(tmp_path / "cat.json").read_text())
    (image,) = saved["images"]
    assert [entry["label"] for entry in image["classes"]] == result.classes
    for entry in image["classes"]:
        explained = result.of(entry["label"])
        assert (entry["weights"], entry["intervals"]) == (explained.weights.tolist(), explained.intervals.tolist())
        assert (entry["intercept"], entry["score"], entry["answer"]) == (
            explained.intercept,
            explained.score,
            explained.answer,
        )
    assert [entry["label"] for entry in image["segments"]] == np.unique(blocks(40, 60, 10)).tolist()
    assert all(entry["pixels"] == 100 for entry in image["segments"])
    assert image["segments"][7]["centre"] == [14.5, 14.5]
    assert saved["provenance"]["method"] == "lime"
    with Image.open(result.save(tmp_path / "cat.png")) as image:
        assert (image.size, image.mode) == ((60, 40), "RGB")


def test_the_provenance_holds_all_parameters(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 70, "sampling": "glime", "kernel_width": 0.5, "alpha": 2.0, "seed": 9}
    provenance = vs.lime(nano, cat, segments="patches", hide=(1, 2, 3), confidence=0.9, **options).provenance
    assert provenance["method"] == "lime"
    expected = options | {"segments": "patches", "hide": [1.0, 2.0, 3.0], "output": "probability", "confidence": 0.9}
    assert provenance["parameters"] == expected | {"perturbed_at": [40, 60]}
    assert (provenance["samples"], provenance["interrupted"]) == (70, False)
    assert (provenance["model"], provenance["library"]) == ("vit-nano", "transformers")
    assert json.loads(json.dumps(dict(provenance))) == provenance


def test_several_images_are_explained_separately(nano: vs.VisionModel, cat: np.ndarray, tmp_path: Path) -> None:
    astronaut = shrunk("astronaut", (60, 40))
    options: dict[str, Any] = {"num_samples": 80, "segments": "patches"}
    alone = [vs.lime(nano, photo, **options) for photo in (cat, astronaut)]
    together = vs.lime(nano, [cat, astronaut], **options)
    assert len(together) == 2
    assert together.values.shape == (2, 40, 60)
    assert together.target is None
    assert alone[0].target != alone[1].target
    back = vs.SegmentAttribution.load(together.save(tmp_path / "both.safetensors"))
    for index, result in enumerate(together):
        for same in (result, together[index - 2], back[index]):
            assert torch.equal(same.weights, alone[index].weights)
            assert torch.equal(same.intervals, alone[index].intervals)
            assert torch.equal(same.values, alone[index].values)
            assert (same.target, same.classes) == (alone[index].target, alone[index].classes)
        assert result.overlay() == alone[index].overlay()
    for access in (lambda: together.weights, together.top, lambda: together.segments):
        with pytest.raises(vs.CallError, match=r"this result holds 2 images: take one, as in result\[0\]"):
            access()
    for index in (2, -3):
        with pytest.raises(vs.CallError, match=f"image {index} is not there: this result holds 2"):
            together[index]


def test_one_class_of_several_images(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 80, "segments": "patches", "top_labels": 10}
    batch = vs.lime(nano, [cat, shrunk("astronaut", (60, 40))], **options).of("dog")
    assert batch.target == "dog"
    assert [result.target for result in batch] == ["dog", "dog"]
    assert torch.equal(batch.values[0], batch[0].values[0])
    assert not torch.equal(batch.values[0], batch.values[1])


def test_a_tensor_of_several_images(nano: vs.VisionModel, cat: np.ndarray) -> None:
    pixels = nano.prepare([cat, shrunk("astronaut", (48, 40))])[0]
    options: dict[str, Any] = {"num_samples": 80, "segments": "patches", "target": 3}
    together = vs.lime(nano, pixels, **options)
    assert together.values.shape == (2, 32, 32)
    assert together.target == "cat"
    for index in (0, 1):
        assert torch.equal(vs.lime(nano, pixels[index : index + 1], **options).weights, together[index].weights)


def test_images_of_different_sizes_are_refused_before_any_evaluation(nano: vs.VisionModel, cat: np.ndarray) -> None:
    steps: list[vs.Progress] = []
    with pytest.raises(vs.CallError, match=r"results of different sizes \(40×60, 40×32 pixels\)") as caught:
        vs.lime(nano, [cat, shrunk("astronaut", (32, 40))], progress=steps.append)
    assert "\n" not in str(caught.value)
    assert not steps


@pytest.mark.usefixtures("unchecked")
def test_numpys_numbers_are_numbers(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"segments": blocks(40, 60, 20)}
    plain = vs.lime(nano, cat, target=5, num_samples=20, seed=1, batch_size=8, **options)
    same = vs.lime(
        nano, cat, target=np.int64(5), num_samples=np.int32(20), seed=np.uint8(1), batch_size=np.int16(8), **options
    )
    assert torch.equal(same.weights, plain.weights)


def test_a_live_module_equals_a_loaded_model(cat: np.ndarray) -> None:
    module = tiny.tiny_vit()
    options: dict[str, Any] = {"num_samples": 30, "segments": "patches"}
    live, loaded = vs.lime(module, cat, **options), vs.lime(vs.load(module), cat, **options)
    assert torch.equal(live.weights, loaded.weights)
    assert live.target in tiny.LABELS


def test_a_model_without_a_classifier_is_explained_by_the_similarity_of_its_features(cat: np.ndarray) -> None:
    family = next(family for family in families.ALL if family.name == "transformers-vit-bare")
    model, labels = family.model(), blocks(40, 60, 20)
    result = vs.lime(
        model, cat, target="similarity", num_samples=40, segments=labels, batch_size=40, sampling="paired", seed=1
    )
    assert (result.target, result.classes) == ("similarity", ["similarity"])
    assert result.provenance["parameters"]["output"] == "similarity"
    assert result.answer == pytest.approx(1, abs=1e-6)
    rows = PairedSampler(6, 1).draw(40)
    with torch.no_grad(), model.running():
        features = model.features(model.prepare([slow.hidden(cat, labels, row) for row in rows])[0]).double()
    cosines = torch.cosine_similarity(features, features[:1]).numpy()
    coefficients, intercept, _ = slow.ridge(rows, cosines, np.array([slow.kernel(row) for row in rows]), 1.0)
    assert_close(result.weights, coefficients, 1e-3)
    assert result.intercept == pytest.approx(intercept, abs=1e-5)


def test_progress_is_reported(nano: vs.VisionModel, cat: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[vs.Progress] = []
    options: dict[str, Any] = {"num_samples": 30, "segments": blocks(40, 60, 20), "batch_size": 16}
    vs.lime(nano, cat, progress=steps.append, **options)
    assert steps == [vs.Progress("evaluating", 16, 30), vs.Progress("evaluating", 30, 30)]
    assert capsys.readouterr() == ("", "")
    vs.lime(nano, cat, progress=True, **options)
    assert capsys.readouterr().out == ""
