"""Accuracies that need no tuning, beside which an accuracy is read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vitscope.tune.data import Data

NAMES = {"chance": "chance", "majority": "the most frequent class", "nearest": "the nearest training thumbnail"}


def baselines(data: Data, nearest: float | None) -> dict[str, float | None]:
    """Return the accuracies on the test images of chance, the most frequent class and the nearest thumbnail.

    Args:
        data: the data set. ``"chance"`` is one divided by its number of classes; ``"majority"`` is the share of test
            images with the class that is most frequent in the training images.
        nearest: the accuracy of the most similar training thumbnail; None if it was not measured.
    """
    frequent = np.bincount(data.train.classes, minlength=len(data.labels)).argmax()
    majority = float((data.test.classes == frequent).mean())
    return {"chance": 1 / len(data.labels), "majority": majority, "nearest": nearest}


def describe_baselines(record: Mapping[str, Any]) -> str:
    """Return the accuracies beside which a run's accuracy is read, such as ``"chance 33.3%"``; empty if unknown."""
    values = record.get("baselines") or {}
    return ", ".join(f"{name} {values[key]:.1%}" for key, name in NAMES.items() if values.get(key) is not None)


def baseline_warning(record: Mapping[str, Any]) -> str | None:
    """Return a warning if the interval of a run's accuracy is not clearly above every baseline, else None."""
    values = {key: value for key, value in (record.get("baselines") or {}).items() if value is not None}
    if not values:
        return None
    best = max(values, key=lambda key: values[key])
    low, high = record["interval"]
    if low > values[best]:
        return None
    verb = "is below" if high < values[best] else "is not clearly above"
    return (
        f"the accuracy {verb} {NAMES[best]}, {values[best]:.1%} (95 % interval {low:.1%} to {high:.1%}): "
        "use more images or epochs, or another model or tuning"
    )
