"""Rollout through shifted windows and patch merging, as the product of dense matrices, in float64, image by image.

Nothing of vitscope: weights are those of the library's own softmax in a plain run, windows are cut place by place,
every block and every merging is a matrix with one row and column more, in which what falls on padding stays.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import product as pairs
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Size = tuple[int, int]

MERGING = ("SwinPatchMerging", "Swinv2PatchMerging", "PatchMerging", "PatchMergingV2")
BLOCKS = ("SwinLayer", "Swinv2Layer", "SwinTransformerBlock", "SwinTransformerV2Block", "SwinTransformerBlockV2")


@dataclass(eq=False)
class Block:
    weights: Tensor  # (batch, window, head, slot, slot)
    grid: Size
    size: Size
    shift: Size
    roll_first: bool

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """The window and slot of each token, row by row, then of each place of padding."""
        (height, width), (down, across) = self.grid, self.size
        padded = (math.ceil(height / down) * down, math.ceil(width / across) * across)
        tokens, padding = [], []
        for row, column in pairs(range(padded[0]), range(padded[1])):
            real = row < height and column < width
            around = self.grid if self.roll_first else padded
            moves = real or not self.roll_first
            y = (row - self.shift[0]) % around[0] if moves else row
            x = (column - self.shift[1]) % around[1] if moves else column
            window = y // down * (padded[1] // across) + x // across
            (tokens if real else padding).append((window, y % down * across + x % across))
        return tokens + padding

    def dense(self, image: int) -> tuple[Tensor, Tensor]:
        """(head, token, place) weights, places of padding last, and which tokens share a window."""
        window, slot = torch.tensor(self.places).T
        tokens = math.prod(self.grid)
        together = window[:tokens, None] == window
        heads = self.weights[image].transpose(0, 1).double()
        return heads[:, window[:tokens, None], slot[:tokens, None], slot] * together, together[:, :tokens]

    def matrix(self, image: int, head_fusion: str, discard_ratio: float, normalize: bool) -> Tensor:
        """(token + 1, token + 1): discard(E A) + I, what falls on padding in the last column."""
        heads, together = self.dense(image)
        fused = {"mean": heads.mean(0), "max": heads.max(0).values, "min": heads.min(0).values}[head_fusion]
        tokens = len(fused)
        attention, padding = fused[:, :tokens].clone(), fused[:, tokens:].sum(1)
        entries = attention[together]
        entries[entries.argsort(stable=True)[: math.floor(discard_ratio * len(entries))]] = 0
        attention[together] = entries
        made = torch.zeros(tokens + 1, tokens + 1, dtype=torch.float64)
        made[:tokens, :tokens] = attention + torch.eye(tokens)
        made[:tokens, tokens] = padding
        if normalize:
            made /= made.sum(1, keepdim=True)
        made[tokens] = 0
        made[tokens, tokens] = 1
        return made


@dataclass
class Merge:
    parts: Tensor  # (batch, merged, 4, out): T_q x_q
    grid: Size

    def groups(self) -> list[list[int | None]]:
        """The tokens of each merged token: top left, bottom left, top right, bottom right; None for padding."""
        height, width = self.grid
        return [
            [
                row * width + column if row < height and column < width else None
                for column in (left, left + 1)
                for row in (top, top + 1)
            ]
            for top in range(0, height, 2)
            for left in range(0, width, 2)
        ]

    def shares(self, image: int, merge: str) -> Tensor:
        if merge == "equal":
            return torch.full(self.parts.shape[1:3], 0.25, dtype=torch.float64)
        norms = self.parts[image].norm(dim=-1)
        return norms / norms.sum(-1, keepdim=True)

    def matrix(self, image: int, merge: str) -> Tensor:
        """(merged + 1, token + 1), what is a share of padding in the last column."""
        groups, shares = self.groups(), self.shares(image, merge)
        made = torch.zeros(len(groups) + 1, math.prod(self.grid) + 1, dtype=torch.float64)
        for merged, group in enumerate(groups):
            for part, token in enumerate(group):
                made[merged, -1 if token is None else token] += shares[merged, part]
        made[-1, -1] = 1
        return made


@dataclass
class Story:
    """A plain run: blocks and merging in order, and the last tokens with the classifier that reads their mean."""

    steps: list[Block | Merge]
    features: Tensor
    classifier: nn.Linear
    logits: Tensor

    def readout(self, image: int, target: int | None) -> Tensor:
        """The row over the last tokens, with a place for padding."""
        features = self.features[image].double()
        row = torch.ones(len(features), dtype=torch.float64)
        if target is not None:
            row = (features @ self.classifier.weight[target].double()).clamp_min(0)
        return torch.cat([row / row.sum(), torch.zeros(1)])

    def evolution(
        self,
        image: int,
        *,
        head_fusion: str = "mean",
        discard_ratio: float = 0.0,
        start_layer: int = 0,
        normalize: bool = True,
        merge: str = "equal",
        target: int | None = None,
    ) -> list[Tensor]:
        """After each block: the readout, brought there by merging alone, times all matrices before; padding last."""
        matrices = [
            step.matrix(image, merge)
            if isinstance(step, Merge)
            else step.matrix(image, head_fusion, discard_ratio, normalize)
            for step in self.steps
        ]
        blocks = [i for i, step in enumerate(self.steps) if isinstance(step, Block)]
        first = blocks[start_layer]
        results, product = [], None
        for i, (step, matrix) in enumerate(zip(self.steps, matrices, strict=True)):
            if i < first and isinstance(step, Block):
                continue
            product = matrix if product is None else matrix @ product
            if isinstance(step, Block):
                row = self.readout(image, target)
                for later in range(len(self.steps) - 1, i, -1):
                    row = row @ matrices[later] if isinstance(self.steps[later], Merge) else row
                results.append(row @ product)
        return results

    def rollout(self, **options: Any) -> Tensor:
        """(batch, token + 1), what fell on padding last."""
        return torch.stack([self.evolution(image, **options)[-1] for image in range(len(self.features))])


def moved(layer: Any, parts: Tensor) -> Tensor:
    """(batch, merged, 4, channel) → T_q x_q, the LayerNorm's deviation held at what all four parts make it."""
    weight, gamma, eps = layer.reduction.weight.double(), layer.norm.weight.double(), layer.norm.eps
    whole = parts.flatten(2)
    norm_first = layer.norm.normalized_shape[0] == whole.shape[-1]
    normed = whole if norm_first else whole @ weight.T
    deviation = (normed.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    results = []
    for q in range(4):
        alone = torch.zeros_like(parts)
        alone[:, :, q] = parts[:, :, q]
        x = alone.flatten(2) if norm_first else alone.flatten(2) @ weight.T
        x = gamma * (x - x.mean(-1, keepdim=True)) / deviation
        results.append(x @ weight.T if norm_first else x)
    return torch.stack(results, dim=2)


def story(module: nn.Module, pixels: Tensor, grid: Size) -> Story:
    """A plain run of a copy; the weights are what the library's softmax gives."""
    module = deepcopy(module)
    if type(module).__name__.startswith("SwinFor"):
        module.set_attn_implementation("eager")
    backbone: Any = getattr(module, getattr(module, "base_model_prefix", ""), module)
    last = backbone.layernorm if hasattr(backbone, "layernorm") else backbone.norm
    head: Any = getattr(module, "classifier", None) or getattr(module.head, "fc", module.head)
    seen: list[Any] = []
    softmax = torch.nn.functional.softmax

    def recorded(*args: Any, **options: Any) -> Tensor:
        seen.append(softmax(*args, **options))
        return seen[-1]

    for layer in module.modules():
        if type(layer).__name__ in MERGING:
            layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0].flatten(1, -2).double())))
    features: list[Tensor] = []
    last.register_forward_hook(lambda _, __, output: features.append(output.flatten(1, -2)))
    with torch.no_grad(), mock.patch.object(torch.nn.functional, "softmax", recorded):
        output = module(pixels)
        steps: list[Block | Merge] = []
        blocks = iter([block for block in module.modules() if type(block).__name__ in BLOCKS])
        for event in seen:
            if isinstance(event, Tensor):
                weights = event.unflatten(0, (len(pixels), -1))
                steps.append(Block(weights, grid, *_settings(next(blocks), grid)))
            else:
                layer, tokens = event
                merge = Merge(torch.empty(0), grid)
                padded = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
                groups = [[-1 if token is None else token for token in group] for group in merge.groups()]
                merge.parts = moved(layer, padded[:, groups])
                steps.append(merge)
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return Story(steps, features[0], head, getattr(output, "logits", output))


def _settings(block: Any, grid: Size) -> tuple[Size, Size, bool]:
    """Window, shift and order of a block that has run: transformers' Swin writes down what it used."""
    library = type(block).__module__.split(".")[0]
    if library == "transformers":
        return (block.window_size,) * 2, (block.shift_size,) * 2, False
    if library == "timm":
        return tuple(block.window_size), tuple(block.shift_size), True
    size, shift = block.attn.window_size, block.attn.shift_size
    shift = [0 if window >= side else by for window, by, side in zip(size, shift, grid, strict=True)]
    return tuple(size), tuple(shift), False
