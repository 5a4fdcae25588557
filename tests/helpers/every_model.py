"""A tiny seeded model of every family, plain and windowed, with a common interface."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families, swin_families
from tests.helpers.swin_families import MAXVIT, MAXVIT_SIZES, SIZES, SwinFamily

LABELS = ("cat", "dog", "owl")

# The tuning methods that every model supports.
WAYS = (
    *("head", "full", "bitfit", "layernorm", "lora"),
    *("adapter-attention", "adapter-mlp", "adapter-both", "adapter-parallel"),
)


@dataclass(frozen=True)
class Case:
    """A family: a function that builds its model, and an input."""

    name: str
    model: Callable[[], vs.VisionModel]
    pixels: Tensor

    @property
    def library(self) -> str:
        return self.name.split("-")[0]


def windowed(family: SwinFamily) -> Case:
    if family is MAXVIT:
        size = MAXVIT_SIZES["fitting"]
        return Case(
            family.name, lambda: vs.load(family.model(size).module, image_size=size), swin_families.pixels(size)
        )
    return Case(family.name, family.model, swin_families.pixels(SIZES["fitting"]))


CASES = [Case(family.name, family.model, family.pixels()) for family in families.ALL]
CASES += [windowed(family) for family in (*swin_families.ALL, MAXVIT)]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def logits(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return the logits of a model with a classifier."""
    with torch.no_grad(), model.running():
        rows = model.logits(pixels)
    assert rows is not None
    return rows


def weights(model: vs.VisionModel) -> dict[str, Tensor]:
    """Return a copy of all weights by name."""
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
