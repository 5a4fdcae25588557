"""Predictions: the most probable classes of an image."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """The prediction of one class for an image.

    Attributes:
        label: name of the class.
        index: index of the class in the model's output.
        probability: probability in [0, 1], from the model's own softmax or sigmoid; None if it predicts values.
        value: predicted value if the model predicts values (regression); None otherwise.

    Examples:
        >>> import skimage, vitscope as vs
        >>> prediction = vs.load("vit-nano").predict(skimage.data.chelsea(), top_k=1)[0][0]
        >>> prediction.label, prediction.index, round(prediction.probability, 2)
        ('cat', 3, 0.74)
    """

    label: str
    index: int
    probability: float | None
    value: float | None = None

    def __repr__(self) -> str:
        number = f"probability={self.probability}" if self.value is None else f"value={self.value}"
        return f"Prediction(label={self.label!r}, index={self.index}, {number})"


def ranked_predictions(
    logits: Tensor, probabilities: Tensor | None, names: Sequence[str], top_k: int
) -> list[list[Prediction]]:
    """Return the most probable classes of each image, the most probable first.

    Args:
        logits: output of the model, (batch, class).
        probabilities: probability of each class, (batch, class); None if the model predicts values.
        names: names of the classes.
        top_k: maximum number of classes per image.
    """
    numbers, indices = (logits.float() if probabilities is None else probabilities).topk(min(top_k, len(names)))
    return [
        [
            Prediction(names[i], i, None, number) if probabilities is None else Prediction(names[i], i, number)
            for i, number in zip(row_i, row_n, strict=True)
        ]
        for row_i, row_n in zip(indices.tolist(), numbers.tolist(), strict=True)
    ]
