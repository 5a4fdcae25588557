"""A vision model with a loss for the training engine, and the features that its classifier reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.errors import WorkError
from vitscope.models.heads import get_classifiers
from vitscope.models.vision_model import VisionModel
from vitscope.tune.logistic_regression import LogisticRegression, fit_logistic_regression


class Classifier(nn.Module):
    """Compute the logits and the cross entropy of a model, from images or from features of its frozen backbone.

    A frozen backbone runs in evaluation mode, so its features are the same in every epoch.
    """

    def __init__(self, model: VisionModel, label_smoothing: float, *, frozen: bool) -> None:
        super().__init__()
        self.module = model.module
        self._model, self._smoothing, self._frozen = (model,), label_smoothing, frozen

    def train(self, mode: bool = True) -> "Classifier":
        """Set the training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.module.eval()
        return self

    def forward(
        self, pixel_values: Tensor | None = None, features: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the logits, and the loss if there are labels."""
        (model,) = self._model
        if features is not None:
            (head,) = get_classifiers(model)
            logits: Tensor | None = head(features)
        else:
            assert pixel_values is not None
            logits = model.forward(pixel_values.to(model.dtype))
        if logits is None:
            raise WorkError(f"{model.name} returned no logits: choose a model whose library can give it a classifier")
        output = {"logits": logits}
        if labels is not None:
            output = {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=self._smoothing), **output}
        return output


@contextmanager
def classifier_inputs(model: VisionModel) -> Iterator[list[Any]]:
    """Yield a list that receives the input of each classifier in each forward pass."""
    inputs: list[Any] = []
    handles = [
        head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
        for head in get_classifiers(model)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def compute_features(model: VisionModel, batches: Any) -> Tensor:
    """Return the features (classifier, image, channel) that each classifier reads, for every image, on the CPU."""
    features: list[Tensor] = []
    with torch.no_grad(), model.running(), classifier_inputs(model) as inputs:
        for pixels in batches:
            model.forward(pixels.to(model.device, model.dtype))
            features.append(torch.stack([entry.cpu() for entry in inputs]))
            inputs.clear()
    return torch.cat(features, dim=1)


def fit_classifiers(
    model: VisionModel,
    features: Tensor,
    classes: np.ndarray,
    seed: int,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> LogisticRegression:
    """Set each classifier of a model to a logistic regression on its features, and return the last one.

    Args:
        model: the model, whose classifiers change.
        features: (classifier, image, channel) from :func:`compute_features`.
        classes: the class index of each image.
        seed: random seed of the folds of the cross-validation.
        report: receives the number of finished fits, of all fits, and the loss after every fit.

    Raises:
        WorkError: a feature is not finite.
    """
    if not bool(torch.isfinite(features).all()):
        raise WorkError(f"{model.name} has features that are NaN or infinite: load it in float32, or check its weights")
    heads = get_classifiers(model)
    for i, (head, inputs) in enumerate(zip(heads, features, strict=True)):

        def report_head(completed: int, total: int, loss: float, i: int = i) -> None:
            report(i * total + completed, len(heads) * total, loss)

        fit = fit_logistic_regression(
            inputs.double().numpy(),
            classes,
            head.out_features,
            seed=seed,
            has_bias=head.bias is not None,
            report=report_head,
        )
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(fit.weight))
            if head.bias is not None:
                head.bias.copy_(torch.from_numpy(fit.bias))
    return fit
