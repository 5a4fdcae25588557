"""Accuracy, its intervals, F1 and interactions, against formulas and laws."""

import math

import numpy as np
import pytest

from vitscope.errors import CallError
from vitscope.tune import metrics as measures
from vitscope.tune.metrics import accuracy_interval, confusion, gain, interaction, macro_f1, wilson


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "RESAMPLES", 300)


def cell(share: float, seeds: int = 2, images: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, images)) < share


def test_wilson_is_what_it_is_known_to_be() -> None:
    for right, total, low, high in ((8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)):
        assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    z = 1.959963984540054
    for right, total in ((3, 7), (50, 99), (960, 1000)):
        for edge in wilson(right, total):  # the roots of (p̂ − p)² = z² p (1 − p) / n
            assert (right / total - edge) ** 2 == pytest.approx(z**2 * edge * (1 - edge) / total)
    for right, total in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(CallError, match="is no share"):
            wilson(right, total)


def test_confusion_counts_row_by_true_class() -> None:
    truth, said = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    assert confusion(truth, said, 4).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]


def test_macro_f1_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        truth, said = np.random.default_rng(seed).integers(0, 5, (2, 40))
        labels = list(range(6))
        expected = sklearn.f1_score(truth, said, labels=labels, average="macro", zero_division=0)
        assert macro_f1(confusion(truth, said, 6)) == pytest.approx(expected)


def test_macro_f1_by_hand() -> None:
    assert macro_f1(np.array([[3, 1], [2, 4]])) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert macro_f1(np.diag([2, 5])) == 1.0
    assert macro_f1(np.array([[0, 2], [2, 0]])) == 0.0


def test_one_seed_has_wilsons_interval_and_more_a_bootstrap() -> None:
    one = cell(0.8, seeds=1)
    assert accuracy_interval(one) == wilson(int(one.sum()), 120)
    many = cell(0.8, seeds=3)
    low, high = accuracy_interval(many)
    assert low < many.mean() < high
    spread = math.sqrt(0.8 * 0.2 / 360)
    assert 2 * spread < high - low < 8 * spread
    assert accuracy_interval(many) == (low, high)
    assert accuracy_interval(many, seed=1) != (low, high)


def test_what_is_always_right_has_no_spread() -> None:
    sure, wrong = np.ones((3, 40), bool), np.zeros((3, 40), bool)
    assert accuracy_interval(sure) == (1.0, 1.0)
    assert gain(sure, wrong) == (1.0, (1.0, 1.0))
    assert interaction((sure, wrong), (sure, wrong)) == (0.0, (0.0, 0.0))


def test_a_gain_turns_its_sign_and_identical_cells_gain_nothing() -> None:
    tuned, base = cell(0.9), cell(0.6, seed=1)
    value, (low, high) = gain(tuned, base)
    assert value == pytest.approx(tuned.mean() - base.mean())
    assert 0 < low < value < high
    turned, (other_low, other_high) = gain(base, tuned)
    assert turned == pytest.approx(-value)
    assert (other_low, other_high) == pytest.approx((-high, -low), abs=0.03)
    alone = cell(0.7, seeds=1)
    assert gain(alone, alone) == (0.0, (0.0, 0.0))


def test_images_are_drawn_for_all_cells_together() -> None:
    """The difference of two that are right on the same images but one has no spread of its own to speak of."""
    base = cell(0.5, seeds=1)
    tuned = base.copy()
    tuned[0, np.flatnonzero(~base[0])[0]] = True
    value, (low, high) = gain(tuned, base)
    assert value == pytest.approx(1 / 120)
    assert low >= 0
    assert high <= 5 / 120


def test_seeds_are_drawn_too() -> None:
    split = np.zeros((2, 50), bool)
    split[0] = True
    low, high = accuracy_interval(split)
    assert (low, high) == (0.0, 1.0)


def test_an_interaction_is_a_difference_of_gains() -> None:
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
def test_different_test_images_are_not_compared() -> None:
    with pytest.raises(CallError, match="compared on the same test images"):
        gain(cell(0.5), cell(0.5, images=60))
