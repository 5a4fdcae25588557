"""KernelSHAP: exact Shapley values, equal to a slow reference and to PyPI's shap."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.perturbed import noise, outputs_of
from tests.helpers.tiny import LABELS, tiny_vit
from tests.reference import lime as slow
from tests.reference.shapley import shapley as slow_shapley
from vitscope.estimators.shapley import shapley
from vitscope.methods.kernel_shap import coalitions


def game(players: int, seed: int = 0) -> Callable[[np.ndarray], float]:
    """Return the value of a coalition whose players interact."""
    random = np.random.default_rng(seed)
    alone, pairs = random.normal(size=players), random.normal(size=(players, players))
    return lambda row: float(np.tanh(row @ alone + row @ pairs @ row) + 0.2 * row.prod())


def solved(value: Callable[[np.ndarray], float], players: int, count: int, seed: int = 0) -> np.ndarray:
    rows, kernel = coalitions(players, count, seed)
    ends = np.array([[value(np.zeros(players))], [value(np.ones(players))]])
    outputs = np.array([[value(row)] for row in rows.astype(float)])
    return shapley(rows, kernel, outputs, ends)[0][0]


@pytest.mark.parametrize("players", [2, 3, 4, 5, 6, 7, 8])
def test_with_all_coalitions_the_values_are_exact(players: int) -> None:
    value = game(players)
    expected = slow_shapley(lambda row: value(row.astype(float)), players)
    for count in (2**players - 2, 10_000):
        assert solved(value, players, count) == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("players", [6, 7])
def test_it_equals_shaps_kernel_explainer(players: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shap = pytest.importorskip("shap", reason="the reference is PyPI's shap")
        value = game(players, seed=3)
        explainer = shap.KernelExplainer(
            lambda rows: np.array([value(row) for row in rows]), np.zeros((1, players)), silent=True
        )
        expected = explainer.shap_values(np.ones(players), nsamples=2**players, l1_reg=False, silent=True)
    assert solved(value, players, 2**players) == pytest.approx(np.asarray(expected).ravel(), abs=1e-6)


@pytest.mark.slow
def test_kernel_shap_of_an_image_equals_the_slow_reference() -> None:
    model, photo = vs.load(tiny_vit(), image_size=32), noise(40, 60)
    labels = np.repeat(np.arange(6), 10)[None].repeat(40, 0)

    def outputs(row: np.ndarray) -> np.ndarray:
        return outputs_of(model, model.prepare(slow.hidden(photo, labels, row))[0])[0]

    result = vs.kernel_shap(model, photo, target=3, num_samples=62, segments=labels)
    assert result.intervals is None
    for label in result.classes:
        index, explained = LABELS.index(label), result.of(label)
        expected = slow_shapley(lambda row, index=index: float(outputs(row)[index]), 6)
        assert explained.weights.numpy() == pytest.approx(expected, abs=1e-5)
        assert explained.intercept == pytest.approx(outputs(np.zeros(6, dtype=bool))[index], abs=1e-6)
        assert explained.local_prediction == pytest.approx(explained.output, abs=1e-6)
    assert result.provenance["samples"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 9, 20, 50, 200])
@pytest.mark.parametrize("output", ["probability", "logit"])
def test_the_values_always_add_up_to_the_output(count: int, output: str) -> None:
    model, photo = vs.load(tiny_vit(), image_size=(32, 48)), noise(32, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        result = vs.kernel_shap(model, photo, num_samples=count, segments="patches", output=output, seed=count)
    for label in result.classes:
        assert result.of(label).local_prediction == pytest.approx(result.of(label).output, abs=1e-5)


@pytest.mark.parametrize("players", [2, 3, 5, 6, 9, 30])
@pytest.mark.parametrize("count", [2, 7, 40, 300])
def test_coalitions_are_complete_sizes_first_and_then_pairs(players: int, count: int) -> None:
    rows, kernel = coalitions(players, count, 1)
    sizes = rows.sum(1)
    assert len(rows) == len(kernel) <= count
    assert len(rows) >= min(count - 1, 2**players - 2)
    assert bool((sizes > 0).all())
    assert bool((sizes < players).all())
    assert bool((kernel > 0).all())
    if len(rows):
        assert kernel.sum() == pytest.approx(1) or count < 2 * players
    unique = {tuple(row) for row in rows.tolist()}
    assert all(tuple(~np.array(row)) in unique for row in unique)
    if count >= 2**players - 2:
        assert len(unique) == len(rows) == 2**players - 2


def test_equal_players_get_equal_values_and_idle_ones_zero() -> None:
    def value(row: np.ndarray) -> float:
        return float(np.sin(row[0] + row[2]) + row[4] * row[3])

    values = solved(value, 6, 62)
    assert values[0] == pytest.approx(values[2])
    assert values[3] == pytest.approx(values[4])
    assert values[[1, 5]] == pytest.approx([0, 0], abs=1e-12)


def test_more_samples_are_more_accurate() -> None:
    value = game(10, seed=4)
    expected = solved(value, 10, 1022)
    errors = [
        np.mean([np.abs(solved(value, 10, count, seed) - expected).mean() for seed in range(20)]) for count in (40, 400)
    ]
    assert errors[1] < errors[0] / 2


def test_permuting_the_segments_permutes_the_shapley_values_even_with_few_samples() -> None:
    random = np.random.default_rng(0)
    rows, kernel = coalitions(12, 6, 0)
    outputs, ends = random.random((len(rows), 1)), np.array([[0.0], [7.8]])
    order = random.permutation(12)
    values, *_ = shapley(rows, kernel, outputs, ends)
    permuted, *_ = shapley(rows[:, order], kernel, outputs, ends)
    np.testing.assert_allclose(permuted, values[:, order], atol=1e-10)
    equal, *_ = shapley(rows[:0], kernel[:0], outputs[:0], ends)
    np.testing.assert_allclose(equal, 7.8 / 12)
    assert values.sum() == pytest.approx(7.8)
