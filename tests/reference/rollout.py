"""Rollout by Abnar & Zuidema (2020): the product of all matrices, in float64, one image at a time."""

import math
from typing import Any

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


def rollout_among(maps: list[Tensor], readout: Tensor, remaining: Tensor, **options: Any) -> Tensor:
    """Return the rollout of the remaining tokens (image, token) among themselves, zero for all others.

    Rows and columns of the other tokens are deleted from the attention of every head, and each row is divided by its
    sum.
    """
    rows = torch.zeros(readout.shape, dtype=torch.float64)
    for image, mask in enumerate(remaining):
        tokens = [token for token, remains in enumerate(mask.tolist()) if remains]
        smaller = []
        for layer in maps:
            heads = layer[image].double()[:, tokens][:, :, tokens]
            smaller.append((heads / heads.sum(2, keepdim=True))[None])
        start = readout[image : image + 1, tokens].double()
        rows[image, tokens] = rollout(smaller, start / start.sum(), **options)[0]
    return rows
