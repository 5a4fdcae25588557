"""Rollout through shifted windows and patch merging as a product of dense matrices, in float64, one image at a time.

It does not use vitscope: weights come from the library's own softmax in a plain run, and windows are cut one position
at a time. The matrix of a block or a merging has one extra row and column, which collect the share of padding.
"""

import math
import threading
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
        """Return the window and slot of each token, row by row, then of each position of padding."""
        (height, width), (down, across) = self.grid, self.size
        padded = (math.ceil(height / down) * down, math.ceil(width / across) * across)
        tokens, padding = [], []
        for row, column in pairs(range(padded[0]), range(padded[1])):
            is_token = row < height and column < width
            around = self.grid if self.roll_first else padded
            shifts = is_token or not self.roll_first
            y = (row - self.shift[0]) % around[0] if shifts else row
            x = (column - self.shift[1]) % around[1] if shifts else column
            window = y // down * (padded[1] // across) + x // across
            (tokens if is_token else padding).append((window, y % down * across + x % across))
        return tokens + padding

    def dense(self, image: int) -> tuple[Tensor, Tensor]:
        """Return weights (head, token, position) with padding last, and a mask of the tokens that share a window."""
        window, slot = torch.tensor(self.places).T
        tokens = math.prod(self.grid)
        together = window[:tokens, None] == window
        heads = self.weights[image].transpose(0, 1).double()
        return heads[:, window[:tokens, None], slot[:tokens, None], slot] * together, together[:, :tokens]

    def matrix(self, image: int, head_fusion: str, discard_ratio: float, normalize: bool) -> Tensor:
        """Return discard(E A) + I, (token + 1, token + 1), with the share of padding in the last column."""
        heads, together = self.dense(image)
        fused = {"mean": heads.mean(0), "max": heads.max(0).values, "min": heads.min(0).values}[head_fusion]
        tokens = len(fused)
        attention, padding = fused[:, :tokens].clone(), fused[:, tokens:].sum(1)
        entries = attention[together]
        entries[entries.argsort(stable=True)[: math.floor(discard_ratio * len(entries))]] = 0
        attention[together] = entries
        matrix = torch.zeros(tokens + 1, tokens + 1, dtype=torch.float64)
        matrix[:tokens, :tokens] = attention + torch.eye(tokens)
        matrix[:tokens, tokens] = padding
        if normalize:
            matrix /= matrix.sum(1, keepdim=True)
        matrix[tokens] = 0
        matrix[tokens, tokens] = 1
        return matrix


@dataclass
class Merge:
    parts: Tensor  # (batch, merged, 4, out): T_q x_q
    grid: Size

    def groups(self) -> list[list[int | None]]:
        """Return the tokens of each merged token: top left, bottom left, top right, bottom right; None for padding."""
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
        """Return (merged + 1, token + 1), with the share of padding in the last column."""
        groups, shares = self.groups(), self.shares(image, merge)
        matrix = torch.zeros(len(groups) + 1, math.prod(self.grid) + 1, dtype=torch.float64)
        for merged, group in enumerate(groups):
            for position, token in enumerate(group):
                matrix[merged, -1 if token is None else token] += shares[merged, position]
        matrix[-1, -1] = 1
        return matrix


@dataclass
class Story:
    """A plain run: blocks and mergings in order, the last tokens, and the classifier that reads their mean."""

    steps: list[Block | Merge]
    features: Tensor
    classifier: nn.Linear
    logits: Tensor

    def readout(self, image: int, target: int | None) -> Tensor:
        """Return the weights of the last tokens, with an entry for padding."""
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
        """Return the readout of each block, through later mergings, times all earlier matrices; padding is last."""
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
        """Return (batch, token + 1), with the share of padding last."""
        return torch.stack([self.evolution(image, **options)[-1] for image in range(len(self.features))])


def transformed(layer: Any, tokens: Tensor) -> Tensor:
    """Return T_q x_q of (batch, merged, 4, channel), with the LayerNorm's deviation fixed by all four tokens."""
    weight, gamma, eps = layer.reduction.weight.double(), layer.norm.weight.double(), layer.norm.eps
    joined = tokens.flatten(2)
    norm_first = layer.norm.normalized_shape[0] == joined.shape[-1]
    normed = joined if norm_first else joined @ weight.T
    deviation = (normed.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    results = []
    for q in range(4):
        alone = torch.zeros_like(tokens)
        alone[:, :, q] = tokens[:, :, q]
        x = alone.flatten(2) if norm_first else alone.flatten(2) @ weight.T
        x = gamma * (x - x.mean(-1, keepdim=True)) / deviation
        results.append(x @ weight.T if norm_first else x)
    return torch.stack(results, dim=2)


def story(module: nn.Module, pixels: Tensor, grid: Size) -> Story:
    """Return a plain run of a copy; the weights are those of the library's softmax."""
    module = deepcopy(module)
    if type(module).__name__.startswith("SwinFor"):
        module.set_attn_implementation("eager")
    backbone: Any = getattr(module, getattr(module, "base_model_prefix", ""), module)
    last = backbone.layernorm if hasattr(backbone, "layernorm") else backbone.norm
    head: Any = getattr(module, "classifier", None) or getattr(module.head, "fc", module.head)
    events: list[tuple[Any, Tensor]] = []  # a block and its weights, or a merging layer and its input, in order
    running: list[nn.Module] = []
    softmax, thread = torch.nn.functional.softmax, threading.get_ident()

    def recorded(*args: Any, **options: Any) -> Tensor:
        weights = softmax(*args, **options)
        if running and threading.get_ident() == thread:
            events.append((running[-1], weights))
        return weights

    blocks = [layer for layer in module.modules() if type(layer).__name__ in BLOCKS]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: running.append(block))
        block.register_forward_hook(lambda *_: running.clear())
    for layer in module.modules():
        if type(layer).__name__ in MERGING:
            layer.register_forward_pre_hook(lambda layer, args: events.append((layer, args[0].flatten(1, -2).double())))
    features: list[Tensor] = []
    last.register_forward_hook(lambda _, __, output: features.append(output.flatten(1, -2)))
    with torch.no_grad(), mock.patch.object(torch.nn.functional, "softmax", recorded):
        output = module(pixels)
    with_weights = [layer for layer, _ in events if type(layer).__name__ in BLOCKS]
    assert with_weights == blocks, f"{len(with_weights)} softmaxes ran in {len(blocks)} blocks: one in each is expected"
    steps: list[Block | Merge] = []
    for layer, tensor in events:
        if type(layer).__name__ in BLOCKS:
            steps.append(Block(tensor.unflatten(0, (len(pixels), -1)), grid, *_settings(layer, grid)))
        else:
            merge = Merge(torch.empty(0), grid)
            padded = torch.cat([tensor, torch.zeros_like(tensor[:, :1])], dim=1)
            groups = [[-1 if token is None else token for token in group] for group in merge.groups()]
            with torch.no_grad():
                merge.parts = transformed(layer, padded[:, groups])
            steps.append(merge)
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return Story(steps, features[0], head, getattr(output, "logits", output))


def _settings(block: Any, grid: Size) -> tuple[Size, Size, bool]:
    """Return window, shift and order of a block after a run: transformers' Swin stores the ones that it used."""
    library = type(block).__module__.split(".")[0]
    if library == "transformers":
        return (block.window_size,) * 2, (block.shift_size,) * 2, False
    if library == "timm":
        return tuple(block.window_size), tuple(block.shift_size), True
    size, shift = block.attn.window_size, block.attn.shift_size
    shift = [0 if window >= side else by for window, by, side in zip(size, shift, grid, strict=True)]
    return tuple(size), tuple(shift), False
