"""What a figure is about, in words: the photo, what the model predicts for it, and the explained class."""

from collections.abc import Sequence
from dataclasses import replace

from vitscope.models.prediction import Prediction
from vitscope.views.numbers import percentage
from vitscope.views.scene import Scene, short_label

COUNT = 3  # predictions that are named


def with_subject(scene: Scene, photo: str, model: str, predictions: Sequence[Prediction], target: str = "") -> Scene:
    """Return a scene that names its photo, the model, the most probable classes and the target.

    Args:
        scene: the scene.
        photo: name of the photo.
        model: name of the model.
        predictions: of the photo, the most probable first; empty if the model has no classes.
        target: label of the explained class; empty if there is none.
    """
    subject = f"{photo}; {model}"
    if predictions:
        subject += f" predicts {', '.join(describe(prediction) for prediction in predictions[:COUNT])}"
    if target and not (predictions and target == predictions[0].label):
        explained = next((prediction for prediction in predictions if prediction.label == target), None)
        subject += f"; target: {short_label(target) if explained is None else describe(explained)}"
    return replace(scene, subject=subject)


def describe(prediction: Prediction) -> str:
    """Return a class with its probability or value, "tabby (73.5%)"."""
    if prediction.probability is None:
        return f"{short_label(prediction.label)} ({prediction.value:.4g})"
    return f"{short_label(prediction.label)} ({percentage(prediction.probability)})"


def describe_target(target: str | None, predictions: Sequence[Prediction]) -> str:
    """Return a class with its probability, and the most probable class if that is another."""
    explained = next((prediction for prediction in predictions if prediction.label == target), None)
    if explained is None or explained.probability is None:
        return short_label(target)
    text = f"{short_label(target)} ({percentage(explained.probability)}"
    if explained != predictions[0]:
        text += f"; predicted: {short_label(predictions[0].label)}, {percentage(predictions[0].probability or 0.0)}"
    return f"{text})"
