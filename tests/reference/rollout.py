"""Rollout by Abnar & Zuidema (2020): the product of all matrices, in float64, one image at a time."""

import math

import torch
from torch import Tensor


def matrix(
    maps: list[Tensor], head_fusion: str, discard_ratio: float, start_layer: int, normalize: bool, image: int
) -> Tensor:
    """Return Â_L ⋯ Â_start of one image, (token, token)."""
    tokens = maps[0].shape[-1]
    product = torch.eye(tokens, dtype=torch.float64)
    for layer in maps[start_layer:]:
        heads = layer[image].double()
        fused = {"mean": heads.mean(0), "max": heads.max(0).values, "min": heads.min(0).values}[head_fusion].clone()
        smallest_first = fused.flatten().argsort(stable=True)
        fused.view(-1)[smallest_first[: math.floor(discard_ratio * tokens * tokens)]] = 0
        step = fused + torch.eye(tokens, dtype=torch.float64)
        if normalize:
            step = step / step.sum(dim=1, keepdim=True)
        product = step @ product
    return product


def rollout(
    maps: list[Tensor],
    readout: Tensor,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    normalize: bool = True,
) -> Tensor:
    """Return the readout times each image's product, (batch, token)."""
    rows = [
        readout[image].double() @ matrix(maps, head_fusion, discard_ratio, start_layer, normalize, image)
        for image in range(len(readout))
    ]
    return torch.stack(rows)
