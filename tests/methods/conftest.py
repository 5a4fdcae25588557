"""A model and a photo that several tests of methods share."""

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.lime import shrunk


@pytest.fixture(scope="module")
def nano() -> vs.VisionModel:
    return vs.load("vit-nano")


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return shrunk("chelsea", (60, 40))
