"""Accuracy, its intervals, F1 and interactions, against formulas and laws."""

import math

import numpy as np
import pytest

from vitscope.errors import CallError
from vitscope.tune import metrics
from vitscope.tune.metrics import (
    accuracy_interval,
    confusion_matrix,
    gain,
    interaction,
    macro_f1,
    wilson_interval,
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 300)


def cell(share: float, seeds: int = 2, images: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, images)) < share


def test_wilson_intervals_match_published_values_and_their_definition() -> None:
    for correct, total, low, high in ((8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)):
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    z = 1.959963984540054
    for correct, total in ((3, 7), (50, 99), (960, 1000)):
        for edge in wilson_interval(correct, total):  # the roots of (p̂ − p)² = z² p (1 − p) / n
            assert (correct / total - edge) ** 2 == pytest.approx(z**2 * edge * (1 - edge) / total)
    for correct, total in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(CallError, match="is not a share"):
            wilson_interval(correct, total)


def test_rows_of_a_confusion_matrix_are_true_classes() -> None:
    labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    assert confusion_matrix(labels, predictions, 4).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]


def test_macro_f1_equals_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        labels, predictions = np.random.default_rng(seed).integers(0, 5, (2, 40))
        classes = list(range(6))
        expected = sklearn.f1_score(labels, predictions, labels=classes, average="macro", zero_division=0)
        assert macro_f1(confusion_matrix(labels, predictions, 6)) == pytest.approx(expected)


def test_macro_f1_of_small_matrices() -> None:
    assert macro_f1(np.array([[3, 1], [2, 4]])) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert macro_f1(np.diag([2, 5])) == 1.0
    assert macro_f1(np.array([[0, 2], [2, 0]])) == 0.0


def test_one_seed_has_the_wilson_interval_and_several_a_bootstrap() -> None:
    single = cell(0.8, seeds=1)
    assert accuracy_interval(single) == wilson_interval(int(single.sum()), 120)
    many = cell(0.8, seeds=3)
    low, high = accuracy_interval(many)
    assert low < many.mean() < high
    spread = math.sqrt(0.8 * 0.2 / 360)
    assert 2 * spread < high - low < 8 * spread
    assert accuracy_interval(many) == (low, high)
    assert accuracy_interval(many, seed=1) != (low, high)


def test_cells_that_are_always_correct_have_no_spread() -> None:
    sure, wrong = np.ones((3, 40), bool), np.zeros((3, 40), bool)
    assert accuracy_interval(sure) == (1.0, 1.0)
    assert gain(sure, wrong) == (1.0, (1.0, 1.0))
    assert interaction((sure, wrong), (sure, wrong)) == (0.0, (0.0, 0.0))


def test_swapped_cells_change_the_sign_of_the_gain_and_identical_cells_gain_nothing() -> None:
    tuned, base = cell(0.9), cell(0.6, seed=1)
    value, (low, high) = gain(tuned, base)
    assert value == pytest.approx(tuned.mean() - base.mean())
    assert 0 < low < value < high
    turned, (other_low, other_high) = gain(base, tuned)
    assert turned == pytest.approx(-value)
    assert (other_low, other_high) == pytest.approx((-high, -low), abs=0.03)
    alone = cell(0.7, seeds=1)
    assert gain(alone, alone) == (0.0, (0.0, 0.0))


def test_all_cells_share_the_resampled_images() -> None:
    """Two cells that differ in a single image have a narrow interval of their difference."""
    base = cell(0.5, seeds=1)
    tuned = base.copy()
    tuned[0, np.flatnonzero(~base[0])[0]] = True
    value, (low, high) = gain(tuned, base)
    assert value == pytest.approx(1 / 120)
    assert low >= 0
    assert high <= 5 / 120


def test_seeds_are_resampled_too() -> None:
    split = np.zeros((2, 50), bool)
    split[0] = True
    low, high = accuracy_interval(split)
    assert (low, high) == (0.0, 1.0)


def test_an_interaction_is_the_difference_of_two_gains() -> None:
    a, b, c, d = (cell(share, seed=i) for i, share in enumerate((0.9, 0.6, 0.8, 0.7)))
    value, (low, high) = interaction((a, b), (c, d))
    assert value == pytest.approx(gain(a, b)[0] - gain(c, d)[0])
    assert low < value < high
    swapped, (other_low, other_high) = interaction((c, d), (a, b))
    assert swapped == pytest.approx(-value)
    assert (other_low, other_high) == pytest.approx((-high, -low), abs=0.05)
    crossed, _ = interaction((b, a), (d, c))
    assert crossed == pytest.approx(-value)
    assert interaction((a, b), (c, d)) == (value, (low, high))
    assert interaction((a, b), (c, d), seed=1)[1] != (low, high)
    assert interaction((a, b), (a, b))[0] == 0


@pytest.mark.usefixtures("unchecked")
def test_different_test_images_are_refused() -> None:
    with pytest.raises(CallError, match="cannot compare accuracies on different test images"):
        gain(cell(0.5), cell(0.5, images=60))
