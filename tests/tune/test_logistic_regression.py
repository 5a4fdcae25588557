"""The logistic regression of the classifier reaches the minimum, and the recipe chooses it by the size of the data."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as Reference

from vitscope.tune.baselines import baseline_warning
from vitscope.tune.logistic_regression import fit_logistic_regression
from vitscope.tune.recipe import Recipe, read_recipe


def synthetic(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features of channels with very different scales, and their classes."""
    generator = np.random.default_rng(seed)
    classes = np.arange(count) % 3
    centres = np.random.default_rng(9).normal(0, 1, (3, 12))
    scales = np.logspace(-2, 2, 12)
    return (centres[classes] + generator.normal(0, 1.5, (count, 12))) * scales + 5, classes


def test_the_classifier_is_the_one_of_scikit_learn_with_the_same_penalty() -> None:
    features, classes = synthetic(90, 0)
    tests, _ = synthetic(300, 1)
    fit = fit_logistic_regression(features, classes, 3)
    standardized = (features - features.mean(0)) / features.std(0)
    reference = Reference(C=1 / (fit.penalty * len(classes)), tol=1e-10, max_iter=10000).fit(standardized, classes)
    expected = reference.predict_proba((tests - features.mean(0)) / features.std(0))
    logits = tests @ fit.weight.T + fit.bias
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)


def test_the_default_follows_the_size_of_the_data() -> None:
    recipe = Recipe()
    assert [recipe.resolved("lora", count).epochs for count in (24, 120, 640, 50_000)] == [20, 20, 15, 10]
    assert [recipe.resolved("lora", count).augment for count in (999, 1000)] == [(), ("mirror", "crop")]
    head = recipe.resolved("head", 5000)
    assert (head.epochs, head.augment, head.only_fits("head")) == (None, (), True)
    assert head.resolved("head", 5000) == head
    for changes in ({"epochs": 3}, {"learning_rate": 0.1}, {"augment": ("mirror",)}):
        steps = read_recipe("modern", **changes).resolved("head", 120)  # type: ignore[arg-type]
        assert not steps.only_fits("head")
        assert steps.epochs == changes.get("epochs", 20)
    report = read_recipe("report")
    assert report.resolved("head", 120) == report


@pytest.mark.parametrize(
    ("interval", "words"), [((0.6, 0.8), None), ((0.4, 0.6), "not clearly"), ((0.1, 0.2), "below")]
)
def test_an_accuracy_that_is_not_above_its_baselines_gives_a_warning(
    interval: tuple[float, float], words: str | None
) -> None:
    record = {"interval": interval, "baselines": {"chance": 0.3, "majority": 0.5, "nearest": None}}
    warning = baseline_warning(record)
    assert (
        (warning is None)
        if words is None
        else (words in str(warning) and "the most frequent class, 50.0%" in str(warning))
    )
