"""A model with a loss: what the training engine wants to see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.errors import WorkError
from vitscope.models.heads import get_classifiers
from vitscope.models.vision_model import VisionModel


class Classifier(nn.Module):
    """Logits and cross entropy of a model's images, or of the features that its frozen backbone gave.

    A backbone that does not learn runs in evaluation mode, so its features are the same in every epoch.
    """

    def __init__(self, model: VisionModel, label_smoothing: float, *, frozen: bool) -> None:
        super().__init__()
        self.module = model.module
        self._model, self._smoothing, self._frozen = (model,), label_smoothing, frozen

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self._frozen:
            self.module.eval()
        return self

    def forward(
        self, pixel_values: Tensor | None = None, features: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        (model,) = self._model
        if features is not None:
            (head,) = get_classifiers(model)
            logits: Tensor | None = head(features)
        else:
            assert pixel_values is not None
            logits = model.forward(pixel_values.to(model.dtype))
        if logits is None:
            raise WorkError(f"{model.name} gave no logits")
        answer = {"logits": logits}
        if labels is not None:
            answer = {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=self._smoothing), **answer}
        return answer


@contextmanager
def seen_by_head(model: VisionModel) -> Iterator[list[Any]]:
    """What enters the classifier while the model runs."""
    seen: list[Any] = []
    (head,) = get_classifiers(model)
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def features_of(model: VisionModel, batches: Any, progress: Any = None) -> Tensor:
    """(image, channel): what the classifier reads of every image, on the CPU."""
    found: list[Tensor] = []
    with torch.no_grad(), model.running(), seen_by_head(model) as seen:
        for pixels in batches:
            model.forward(pixels.to(model.device, model.dtype))
            found.append(seen.pop().cpu())
            seen.clear()
            if progress is not None:
                progress(len(pixels))
    return torch.cat(found)
