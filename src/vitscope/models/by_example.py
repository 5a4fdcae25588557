"""Classes by example: a classifier for a model that has none, from a few pictures of each class."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.arguments import number
from vitscope.errors import CallError
from vitscope.models.vision_model import VisionModel
from vitscope.picture import check_file

TEMPERATURE = 0.07  # as DINO's nearest-neighbour classifier has it
WORDNET_NUMBER = re.compile(r"^n\d{8}_")  # how ImageNet's pictures are named


def by_example(
    model: VisionModel, examples: Mapping[str, Any] | str | Path, *, temperature: float | int = TEMPERATURE
) -> VisionModel:
    """The same model with classes: how alike a picture's features are to the mean of each class's examples.

    With f the features of a picture divided by their length and m_c the mean of those of class c, divided by its own,
    the logit is f·m_c / temperature.

    Reference: nearest class mean, Mensink et al., 2013; with features of a network, Snell et al., 2017
    (arXiv 1703.05175); the temperature, Caron et al., 2021 (arXiv 2104.14294).

    Args:
        model: one that gives features, as DINOv2 without a head.
        examples: for each class its pictures, as :meth:`VisionModel.prepare` takes them; or a folder, with a folder of
            pictures for each class, or one picture for each class, named as it.
        temperature: above 0; the smaller, the surer the answers.

    Raises:
        CallError: fewer than two classes, a folder without pictures, or a model that has classes already.
    """
    if model.embed is None:
        why = "has classes already" if model.labels is not None else "gives no features that vitscope knows"
        raise CallError(f"{model.name} {why}: classes by example are for models without a classifier")
    if number(temperature, "temperature") <= 0:
        raise CallError(f"temperature is {temperature!r}: a number above 0 is expected")
    if not isinstance(examples, Mapping):
        examples = _in_folder(Path(examples))
    if len(examples) < 2:
        raise CallError(f"classes by example need two classes or more, {len(examples)} came")
    means = torch.stack([_mean(model, pictures) for pictures in examples.values()])
    embed = model.embed

    def forward(pixels: Tensor) -> Tensor:
        features = F.normalize(embed(pixels).float(), dim=-1)
        return features @ means.to(features.device).T / temperature

    return replace(model, forward=forward, labels=tuple(examples), embed=None)


def _mean(model: VisionModel, pictures: Any) -> Tensor:
    """(channel,) of length one."""
    several = isinstance(pictures, list | tuple)
    features = []
    for picture in pictures if several else [pictures]:
        pixels, _ = model.prepare(picture)
        with torch.no_grad(), model.running():
            features.append(F.normalize(model.features(pixels).float(), dim=-1))
    if not features:
        raise CallError("a class has no examples: pass one picture or more for each")
    mean = torch.cat(features).mean(0)
    if not math.isfinite(float(mean.norm())):
        raise CallError(f"the features of {model.name} came out as NaN or infinity")
    return F.normalize(mean, dim=0)


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise CallError(f"{folder} is no folder: pass one with a folder of pictures for each class")
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        pictures = sorted(part for part in entry.iterdir() if part.is_file()) if entry.is_dir() else [entry]
        name = WORDNET_NUMBER.sub("", entry.stem if entry.is_file() else entry.name).replace("_", " ")
        for picture in pictures:
            check_file(picture)
            found.setdefault(name, []).append(picture)
    if not found:
        raise CallError(f"{folder} holds no pictures")
    return found
