"""Few-shot classification: a nearest-class-mean classifier from a few images of each class, for a model without one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.errors import CallError, UnclearOutputError
from vitscope.images.sources import require_regular_file
from vitscope.models.loader import load
from vitscope.models.vision_model import VisionModel
from vitscope.validation import require_finite_tensor, require_number

TEMPERATURE = 0.07  # as in DINO's nearest-neighbour classifier
WORDNET_NUMBER = re.compile(r"^n\d{8}_")  # at the start of the names of ImageNet's images


def few_shot_classifier(
    model: VisionModel | nn.Module,
    examples: Mapping[str, Any] | str | Path,
    *,
    temperature: float | int = TEMPERATURE,
) -> VisionModel:
    """Return a classifier that compares the features of an image with the mean features of each class.

    With f the features of an image, m_c their mean over the examples of class c and μ the mean of all m_c, the logit
    of c is cos(f − μ, m_c − μ) / temperature. Without subtracting μ, which all images share, all classes look alike.

    Reference: nearest class mean, Mensink et al., 2013; centred features of a network, Wang et al., 2019
    (arXiv 1911.04623); the temperature, Caron et al., 2021 (arXiv 2104.14294).

    Args:
        model: a model that returns features, such as DINOv2 without a head, from :func:`vitscope.load`; or a live
            module.
        examples: example images of each class, by the name of the class: one image or a list of images, as
            :meth:`VisionModel.prepare` takes them. Alternatively, a folder that contains either a folder of images for
            each class, or one image for each class, whose file name is the class.
        temperature: divisor of the cosines, above 0. Smaller values give more confident predictions. The default is
            0.07.

    Returns:
        A copy of the model that shares its weights and predicts the classes of the examples, in their order.

    Raises:
        CallError: there are fewer than two classes, a class has no images, the temperature is not above 0, or the model
            already has classes or returns no features.

    Examples:
        >>> import skimage, torch, vitscope as vs
        >>> backbone = vs.load(vs.load("vit-nano").module.vit, image_size=32)
        >>> cats, rockets = skimage.data.chelsea(), skimage.data.rocket()
        >>> model = vs.few_shot_classifier(backbone, {"cat": cats[:, :300], "rocket": [rockets, rockets[:300]]})
        >>> model.predict(cats[:, 100:], top_k=1)[0][0].label
        'cat'
    """
    if isinstance(model, nn.Module):
        model = load(model)
    if model.embed is None or (model.library == "module" and model.labels is not None):
        problem = "has classes already" if model.labels is not None else "returns no features that vitscope recognises"
        raise CallError(f"{model.name} {problem}: pass a model that returns features, without a classifier")
    if require_number(temperature, "temperature") <= 0:
        raise CallError(f"temperature is {temperature!r}: pass a number above 0")
    if not isinstance(examples, Mapping):
        examples = _examples_in(Path(examples))
    if len(examples) < 2:
        raise CallError(f"examples must contain two classes or more, not {len(examples)}")
    means = torch.stack([_mean_features(model, images) for images in examples.values()])
    center = means.mean(0)
    forward = NearestClassMean(model.embed, center, F.normalize(means - center, dim=-1), float(temperature))
    return replace(model, forward=forward, labels=tuple(examples), embed=None, output="softmax")


@dataclass(frozen=True, eq=False)
class NearestClassMean:
    """The forward pass of a few-shot classifier.

    The logits are cosines between the centred features and the centred mean of each class, over the temperature.
    """

    embed: Callable[[Tensor], Tensor]
    center: Float[Tensor, " channel"]
    classes: Float[Tensor, "label channel"]
    temperature: float

    def __call__(self, pixels: Tensor) -> Float[Tensor, "batch label"]:
        features = F.normalize(self.embed(pixels).float() - self.center, dim=-1)
        return features @ self.classes.T / self.temperature


def _mean_features(model: VisionModel, images: Any) -> Tensor:
    """Return the mean features (channel,) of one class's images."""
    features = []
    for image in images if isinstance(images, list | tuple) else [images]:
        pixels, _ = model.prepare(image)
        try:
            with torch.no_grad(), model.running():
                features.append(model.features(pixels).float())
        except UnclearOutputError as error:
            raise CallError(f"{model.name} returns no features that vitscope recognises: {error}") from None
    if not features:
        raise CallError("a class has no examples: pass at least one image for each class")
    return require_finite_tensor(torch.cat(features).mean(0), f"the features of {model.name}")


def _examples_in(folder: Path) -> dict[str, list[Path]]:
    """Return the images in a folder by the name of their class."""
    if not folder.is_dir():
        raise CallError(f"{folder} is not a folder: pass one with a folder of images for each class")
    examples: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        files = (
            (file for file in entry.iterdir() if file.is_file() and not file.name.startswith("."))
            if entry.is_dir()
            else [entry]
        )
        images = sorted(files)
        name = WORDNET_NUMBER.sub("", entry.stem if entry.is_file() else entry.name).replace("_", " ")
        if not images:
            raise CallError(f"{entry} contains no images of {name}: add some, or remove the folder")
        for image in images:
            require_regular_file(image)
            examples.setdefault(name, []).append(image)
    if not examples:
        raise CallError(f"{folder} contains no images: pass a folder of images for each class")
    return examples
