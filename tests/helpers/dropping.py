"""Images, models as functions, and patches as pixels, for tests without hidden patches."""

from collections.abc import Callable

import torch
from torch import Tensor

import vitscope as vs


def evaluator(model: vs.VisionModel) -> Callable[[Tensor], Tensor]:
    """Return a function of pixels that returns logits, or features if there is no classifier."""

    def evaluate(pixels: Tensor) -> Tensor:
        with torch.no_grad(), model.running():
            logits = model.logits(pixels)
            return model.features(pixels) if logits is None else logits

    return evaluate


def image(size: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def over_pixels(visible: Tensor, grid: vs.Grid, patch: int, size: tuple[int, int]) -> Tensor:
    """Return (patch,) as (height, width); pixels outside all patches are visible."""
    blocks = visible.view(grid.height, grid.width).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    original = torch.ones(max(size[0], len(blocks)), max(size[1], blocks.shape[1]), dtype=torch.bool)
    original[: len(blocks), : blocks.shape[1]] = blocks
    return original[: size[0], : size[1]]
