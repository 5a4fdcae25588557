"""LIME's confidence intervals, and automatic sampling until the ranking is stable."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.lime import (
    SAMPLINGS,
    assert_close,
    blocks,
    every_sampling,
    fitted,
    linear_model,
    sampler_of,
    shrunk,
)
from tests.reference import lime as slow
from vitscope.estimators.surrogate import Surrogate, fit, quantile, upper_tail
from vitscope.methods.lime import Plan, is_stable, kernel
from vitscope.perturb.masks import UniformSampler


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert (provenance["parameters"]["stable"], provenance["parameters"]["sampling"]) == (True, "paired")
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
        assert result.provenance["parameters"]["stable"] is True
        samples.append(result.provenance["samples"])
        weights = result.weights.numpy()
        ties = 0.1 * np.abs(weights).max()
        for rank, segment in enumerate(result.top(3)):
            assert segment == ranking[rank] or abs(weights[segment] - weights[ranking[rank]]) < ties
    assert max(samples) < 10_000


@pytest.mark.slow
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
    assert result.provenance["parameters"]["stable"] is False


def surrogate(weights: list[float], spreads: list[float]) -> Surrogate:
    """Return independent coefficients with these standard errors."""
    return Surrogate(
        weights=np.array([weights]),
        intercepts=np.zeros(1),
        scores=np.ones(1),
        held_out_scores=np.ones(1),
        influences=np.diag(np.array(spreads, dtype=float))[None],
        shrinkage=np.zeros((1, len(weights))),
        freedom=1000,
    )


@pytest.mark.parametrize(
    ("weights", "spreads", "top", "stable"),
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
    weights: list[float], spreads: list[float], top: int, stable: bool
) -> None:
    assert is_stable(surrogate(weights, spreads), top, 0.05, 0.1) is stable


def test_a_common_influence_does_not_unsettle_the_ranking() -> None:
    correlated = dataclasses.replace(surrogate([2.0, 1.0], [0.0, 0.0]), influences=np.full((1, 4, 2), 5.0))
    assert is_stable(correlated, 1, 0.05, 0.0)


def test_a_smaller_error_needs_more_certainty() -> None:
    unsure = surrogate([1.0, 0.0], [0.3, 0.3])
    assert is_stable(unsure, 1, 0.05, 0.0)
    assert not is_stable(unsure, 1, 0.001, 0.0)


def test_a_wider_tie_needs_less_certainty() -> None:
    near = surrogate([1.0, 0.9], [0.05, 0.05])
    assert not is_stable(near, 1, 0.05, 0.0)
    assert not is_stable(near, 1, 0.05, 0.1)
    assert is_stable(near, 1, 0.05, 0.3)


def test_error_probabilities_add_up() -> None:
    """Each of the ten comparisons alone would be stable."""
    assert is_stable(surrogate([3.0, 0.0], [1.0, 0.0]), 1, 0.01, 0.0)
    assert not is_stable(surrogate([3.0, *[0.0] * 10], [1.0, *[0.0] * 10]), 1, 0.01, 0.0)


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
