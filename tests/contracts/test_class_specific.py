"""Gradient methods explain a class and a model: another class, or other weights, give another map."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from scipy.stats import spearmanr

import vitscope as vs
from vitscope.methods.registry import METHODS

GRADIENT = [name for name, method in METHODS.items() if method.kind == "gradient"]
FEW = {"smooth_grad": {"samples": 3}, "integrated_gradients": {"steps": 5}, "transition_attention": {"steps": 5}}


@pytest.fixture(scope="module")
def two_objects() -> np.ndarray:
    """A picture of a cat beside a rocket."""
    cat, rocket = skimage.data.chelsea()[:300, 75:375], skimage.data.rocket()[:300, 170:470]
    return np.concatenate([cat, rocket], axis=1)


def explain(name: str, model: vs.VisionModel, photo: np.ndarray, target: Any) -> np.ndarray:
    return METHODS[name].compute(model, photo, target=target, **FEW.get(name, {})).values[0].flatten().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
def test_two_classes_have_different_maps(name: str, two_objects: np.ndarray) -> None:
    model = vs.load("vit-nano")
    cat, ship = (explain(name, model, two_objects, target) for target in ("cat", "ship"))
    assert spearmanr(cat, ship).statistic < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
def test_other_weights_give_another_map(name: str, two_objects: np.ndarray) -> None:
    model = vs.load("vit-nano")
    expected = explain(name, model, two_objects, "cat")
    module: Any = deepcopy(model.module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            shuffled = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[shuffled].view_as(parameter))
    random = vs.load(module, image_size=32)
    assert abs(spearmanr(expected, explain(name, random, two_objects, "cat")).statistic) < 0.6
