"""Photos of noise, their segments, and preprocessings, for tests of perturbed images."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vitscope as vs
from tests.helpers import families
from vitscope.images.image import InputImage
from vitscope.images.preprocessing import Preprocessing
from vitscope.perturb.segments import Segments, segment


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def view_of(photo: np.ndarray, box: tuple[float, float, float, float] | None = None) -> InputImage:
    height, width = photo.shape[:2]
    return InputImage(Image.fromarray(photo), box or (0.0, 0.0, float(width), float(height)))


def squares(height: int, width: int, side: int) -> np.ndarray:
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return rows[:, None] * (columns[-1] + 1) + columns


def cut(photo: np.ndarray, segmentation: Any, cells: vs.Grid | None = None) -> Segments:
    return segment(photo, segmentation, view_of(photo), cells)


def family(name: str) -> families.Family:
    return next(family for family in families.ALL if family.name == name)


CROPS = {
    "squash": Preprocessing((32, 48)),
    "crop": Preprocessing((32, 48), fit="crop", resize_to=(40, 60)),
    "crop, rounded": Preprocessing((32, 48), fit="crop", resize_to=(37, 55), round_half_even=True),
    "padded": Preprocessing((32, 48), fit="crop", resize_to=(24, 40)),
}


def outputs_of(model: vs.VisionModel, pixels: Tensor, output: str = "probability") -> np.ndarray:
    with torch.no_grad(), model.running():
        logits = model.logits(pixels)
    assert logits is not None
    return (logits.softmax(-1) if output == "probability" else logits).double().numpy()
