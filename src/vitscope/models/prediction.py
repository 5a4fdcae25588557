"""The prediction of one class for an image."""

from dataclasses import dataclass


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
