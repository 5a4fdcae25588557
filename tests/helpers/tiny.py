"""A tiny ViT with labels, images of noise, and the one-line message of a refusal."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitscope as vs
from tests.helpers.families import TINY
from vitscope.errors import VitscopeError

LABELS = tuple(f"thing {i}" for i in range(7))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of seeded noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refusal(error: type[VitscopeError], name: Any, **options: Any) -> str:
    """Return the one-line message of an error that load raises."""
    with pytest.raises(error) as caught:
        vs.load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny_vit() -> nn.Module:
    """Return a seeded ViT of transformers with seven labelled classes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**(TINY | {"image_size": 32, "patch_size": 8, "id2label": dict(enumerate(LABELS))}))
    return transformers.ViTForImageClassification(config).eval()
