"""Classes by example: a classifier for a model that has none, from a few images of each class."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.errors import CallError
from vitscope.images.reading import check_file
from vitscope.models.loader import load
from vitscope.models.outputs import UnclearOutputError
from vitscope.models.vision_model import VisionModel
from vitscope.validation import number, only_finite

TEMPERATURE = 0.07  # as DINO's nearest-neighbour classifier has it
WORDNET_NUMBER = re.compile(r"^n\d{8}_")  # how ImageNet's images are named


def few_shot_classifier(
    model: VisionModel | nn.Module,
    examples: Mapping[str, Any] | str | Path,
    *,
    temperature: float | int = TEMPERATURE,
) -> VisionModel:
    """The same model with classes: how alike an image's features are to the mean of each class's examples.

    With f the features of an image, m_c their mean over the examples of class c and μ the mean of all m_c, the logit
    of c is cos(f − μ, m_c − μ) / temperature. Without μ, which all images share, all classes look alike.

    Reference: nearest class mean, Mensink et al., 2013; centred features of a network, Wang et al., 2019
    (arXiv 1911.04623); the temperature, Caron et al., 2021 (arXiv 2104.14294).

    Args:
        model: one that gives features, as DINOv2 without a head; from :func:`vitscope.load`, or a live module.
        examples: for each class its images, as :meth:`VisionModel.prepare` takes them; or a folder, with a folder of
            images for each class, or one image for each class, named as it.
        temperature: above 0; the smaller, the surer the answers.

    Raises:
        CallError: fewer than two classes, a folder without images, or a model that has classes already.
    """
    if isinstance(model, nn.Module):
        model = load(model)
    if model.embed is None or (model.library == "module" and model.labels is not None):
        why = "has classes already" if model.labels is not None else "gives no features that vitscope knows"
        raise CallError(f"{model.name} {why}: classes by example are for models without a classifier")
    if number(temperature, "temperature") <= 0:
        raise CallError(f"temperature is {temperature!r}: a number above 0 is expected")
    if not isinstance(examples, Mapping):
        examples = _in_folder(Path(examples))
    if len(examples) < 2:
        raise CallError(f"classes by example need two classes or more, {len(examples)} came")
    means = torch.stack([_mean(model, images) for images in examples.values()])
    middle = means.mean(0)
    forward = NearestClassMean(model.embed, middle, F.normalize(means - middle, dim=-1), float(temperature))
    return replace(model, forward=forward, labels=tuple(examples), embed=None, output="softmax")


@dataclass(frozen=True, eq=False)
class NearestClassMean:
    """Logits of pixels: the cosine between centred features and each class's centred mean, over the temperature."""

    embed: Callable[[Tensor], Tensor]
    middle: Float[Tensor, " channel"]
    classes: Float[Tensor, "label channel"]
    temperature: float

    def __call__(self, pixels: Tensor) -> Float[Tensor, "batch label"]:
        features = F.normalize(self.embed(pixels).float() - self.middle, dim=-1)
        return features @ self.classes.T / self.temperature


def _mean(model: VisionModel, images: Any) -> Tensor:
    """(channel,) over the images of one class."""
    several = isinstance(images, list | tuple)
    features = []
    for image in images if several else [images]:
        pixels, _ = model.prepare(image)
        try:
            with torch.no_grad(), model.running():
                features.append(model.features(pixels).float())
        except UnclearOutputError as error:
            raise CallError(f"{model.name} gives no features that vitscope knows: {error}") from None
    if not features:
        raise CallError("a class has no examples: pass one image or more for each")
    return only_finite(torch.cat(features).mean(0), f"the features of {model.name}")


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise CallError(f"{folder} is no folder: pass one with a folder of images for each class")
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        inside = (
            (part for part in entry.iterdir() if part.is_file() and not part.name.startswith("."))
            if entry.is_dir()
            else [entry]
        )
        images = sorted(inside)
        name = WORDNET_NUMBER.sub("", entry.stem if entry.is_file() else entry.name).replace("_", " ")
        if not images:
            raise CallError(f"{entry} holds no images of {name}: put some there, or take the folder away")
        for image in images:
            check_file(image)
            found.setdefault(name, []).append(image)
    if not found:
        raise CallError(f"{folder} holds no images")
    return found
