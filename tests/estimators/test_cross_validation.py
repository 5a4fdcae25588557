"""R² on held-out samples: equal to fits that leave out each group, and honest with fewer samples than segments."""

from collections.abc import Callable

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.lime import blocks
from vitscope.estimators.cross_validation import held_out_r_squared
from vitscope.estimators.shapley import complements, shapley
from vitscope.estimators.surrogate import fit
from vitscope.methods.kernel_shap import coalitions
from vitscope.methods.lime import kernel


def slow_score(
    predict: Callable[[np.ndarray], np.ndarray], outputs: np.ndarray, weights: np.ndarray, groups: np.ndarray
) -> float:
    """Fit once for each group, to all other samples; ``predict`` returns the outputs of such a fit."""
    residual = variation = 0.0
    for group in np.unique(groups):
        kept = groups != group
        predicted = predict(kept)
        mean = (weights[kept] * outputs[kept]).sum() / weights[kept].sum()
        residual += (weights * (outputs - predicted) ** 2)[~kept].sum()
        variation += (weights * (outputs - mean) ** 2)[~kept].sum()
    return 1 - residual / variation


def samples(count: int, segments: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and the outputs of a model that is linear but for one interaction, with two classes."""
    random = np.random.default_rng(seed)
    rows = random.random((count, segments)) < 0.5
    rows[0] = True
    linear = rows @ random.normal(size=(segments, 2))
    return rows, linear + 2.0 * (rows[:, :1] & rows[:, 1:2])


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("count", "segments"), [(60, 6), (12, 20)])
@pytest.mark.parametrize("alpha", [1.0, 0.05])
def test_ridge_equals_a_fit_without_each_group(paired: bool, count: int, segments: int, alpha: float) -> None:
    rows, outputs = samples(count, segments)
    groups = (np.arange(count) + 1) // 2 if paired else np.arange(count)
    weights = kernel(rows.mean(1), 0.25)
    surrogate = fit(rows, outputs, weights, alpha, groups)
    for label in range(2):

        def predict(kept: np.ndarray, label: int = label) -> np.ndarray:
            masks, y, w = rows[kept].astype(float), outputs[kept, label], weights[kept]
            centre, mean = w @ masks / w.sum(), w @ y / w.sum()
            gram = (masks - centre).T @ ((masks - centre) * w[:, None]) + alpha * np.eye(segments)
            slopes = np.linalg.solve(gram, (masks - centre).T @ (w * (y - mean)))
            return mean + (rows - centre) @ slopes

        expected = slow_score(predict, outputs[:, label], weights, groups)
        assert surrogate.held_out_scores[label] == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_shapley_equals_a_fit_without_each_pair() -> None:
    rows, weights = coalitions(9, 120, 0)
    random = np.random.default_rng(1)
    slopes = random.normal(size=9)

    def value(masks: np.ndarray) -> np.ndarray:
        return masks @ slopes + 2.0 * (masks[:, 0] & masks[:, 1]) + 0.3 * (masks[:, 2] & masks[:, 3] & masks[:, 4])

    outputs = value(rows)
    ends = value(np.array([[False] * 9, [True] * 9]))
    groups = complements(rows)
    assert len(np.unique(groups)) < len(rows) / 2 + 1

    def predict(kept: np.ndarray) -> np.ndarray:
        # The last value is what the others leave of the total.
        total, masks = ends[1] - ends[0], rows.astype(float)
        design = masks[:, :-1] - masks[:, -1:]
        target = outputs - ends[0] - masks[:, -1] * total
        root = np.sqrt(weights[kept])
        solution = np.linalg.lstsq(design[kept] * root[:, None], target[kept] * root, rcond=None)[0]
        return design @ solution + ends[0] + masks[:, -1] * total

    *_, (held_out,) = shapley(rows, weights, outputs[:, None], ends[:, None])
    assert held_out == pytest.approx(slow_score(predict, outputs, weights, groups), rel=1e-8)


def test_complements_and_equal_coalitions_share_a_group() -> None:
    rows = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0], [1, 1, 0]], dtype=bool)
    first, *rest = complements(rows).tolist()
    assert rest[:1] == [first]
    assert rest[2] == first
    assert rest[1] == rest[3] != first


def test_noise_is_not_explained_however_many_segments_there_are() -> None:
    """The fitted R² is 1 as soon as there are as many segments as samples; the held-out one stays at 0."""
    random = np.random.default_rng(0)
    rows, noise = random.random((60, 80)) < 0.5, random.normal(size=(60, 1))
    surrogate = fit(rows, noise, np.ones(60), 1.0, np.arange(60))
    assert surrogate.scores[0] > 0.9
    assert surrogate.held_out_scores[0] < 0.1


def test_it_is_not_determined_by_fewer_samples_than_segments_without_a_penalty() -> None:
    rows, outputs = samples(12, 20)
    assert np.isnan(fit(rows, outputs, np.ones(12), 0.0, np.arange(12)).held_out_scores).all()
    few, weights = coalitions(20, 12, 0)
    assert np.isnan(shapley(few, weights, outputs[: len(few)], outputs[:2])[2]).all()


def test_outputs_that_do_not_vary_have_no_score() -> None:
    rows, outputs = samples(30, 4)
    outputs[:, 1] = 0.3
    scores = fit(rows, outputs, np.ones(30), 1.0, np.arange(30)).held_out_scores
    assert np.isfinite(scores).tolist() == [True, False]


def test_a_single_group_has_no_score() -> None:
    ones = np.ones((2, 1))
    assert np.isnan(held_out_r_squared(ones, ones, ones / 2, ones, np.ones(2), np.zeros(2, dtype=np.int64))).all()
    nothing = np.zeros((0, 1))
    empty = np.zeros(0, dtype=np.int64)
    assert np.isnan(held_out_r_squared(nothing, nothing, nothing, nothing, np.zeros(0), empty)).all()


@pytest.mark.parametrize("method", [vs.lime, vs.kernel_shap])
def test_results_hold_both_scores(method: Callable[..., vs.SegmentAttribution]) -> None:
    import skimage.data

    result = method(vs.load("vit-nano"), skimage.data.chelsea()[:40, :60], segments=blocks(40, 60, 20), num_samples=60)
    assert result.held_out_score is not None
    assert result.held_out_score < result.score <= 1
    entry = result.as_json()["images"][0]["classes"][0]
    assert (entry["score"], entry["held_out_score"]) == (result.score, result.held_out_score)


@pytest.mark.parametrize(("method", "words"), [(vs.lime, "depend on the ridge penalty"), (vs.kernel_shap, "smallest")])
def test_fewer_samples_than_segments_are_a_warning(method: Callable[..., vs.SegmentAttribution], words: str) -> None:
    import skimage.data

    with pytest.warns(vs.VitscopeWarning, match=f"^num_samples is 30 for 64 segments: fewer samples than .*{words}"):
        result = method(vs.load("vit-nano"), skimage.data.chelsea()[:40, :60], segments="patches", num_samples=30)
    assert result.held_out_score is None or result.held_out_score < 0.9


def test_a_class_does_not_depend_on_the_others_to_the_last_bit() -> None:
    random = np.random.default_rng(0)
    rows, outputs = random.random((80, 24)) < 0.5, random.random((80, 6))
    together = fit(rows, outputs, np.ones(80), 1.0, np.arange(80))
    coalition_rows, weights = coalitions(24, 80, 0)
    values = outputs[: len(coalition_rows)]
    shares, *scores = shapley(coalition_rows, weights, values, outputs[:2])
    for label in range(6):
        alone = fit(rows, outputs[:, [label]], np.ones(80), 1.0, np.arange(80))
        for name in ("weights", "intercepts", "scores", "held_out_scores", "influences", "shrinkage"):
            assert np.array_equal(getattr(together, name)[label], getattr(alone, name)[0]), name
        share, *score = shapley(coalition_rows, weights, values[:, [label]], outputs[:2, [label]])
        assert np.array_equal(shares[label], share[0])
        assert [scores[0][label], scores[1][label]] == [score[0][0], score[1][0]]
