"""Ablation of heads at the input of the output projection, in a plain run without vitscope.

Every library multiplies the concatenated outputs of all heads with the weight of the projection. Here the linear
function is replaced: if the weight is that of a projection, the columns of a head are replaced, one head at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.helpers.families import Family
from tests.helpers.swin_families import SwinFamily
from tests.reference.swin_rollout import Block, story


@dataclass
class Projection:
    """The output projection of a block.

    Attributes:
        weight: its weight.
        heads: number of heads.
        tokens_first: True if tokens come before images, as in nn.MultiheadAttention.
        places: the window and slot of each token; None if the only window holds all tokens.
    """

    weight: Tensor
    heads: int
    tokens_first: bool = False
    places: list[tuple[int, int]] | None = None

    def replaced(self, inputs: Tensor, batch: int, head: int, replacement: str, images: Sequence[int]) -> Tensor:
        """Return the inputs with the columns of a head replaced for some images."""
        channels = inputs.shape[-1] // self.heads
        columns = slice(head * channels, (head + 1) * channels)
        changed = inputs.clone()
        by_image = changed.view(-1, batch, inputs.shape[-1]).transpose(0, 1)
        if not self.tokens_first:
            by_image = changed.view(batch, -1, inputs.shape[-1])
        for image in images:
            outputs = by_image[image, :, columns]
            rows = range(len(outputs))
            if self.places is not None:
                slots = 1 + max(slot for _, slot in self.places)
                rows = [window * slots + slot for window, slot in self.places]
            mean = torch.stack([outputs[row].double() for row in rows]).mean(0)
            outputs[:] = 0 if replacement == "zero" else mean.to(outputs.dtype)
        return changed


def projections(family: Any, module: nn.Module, pixels: Tensor) -> list[Projection]:
    """Return the projection of every block, in order."""
    if isinstance(family, SwinFamily):
        grid = family.grid((pixels.shape[-2], pixels.shape[-1]))
        blocks = [step for step in story(module, pixels, (grid.height, grid.width)).steps if isinstance(step, Block)]
        result = []
        for block, facts in zip(family.blocks(module).values(), blocks, strict=True):
            parts, tokens = family.parts(block), facts.grid[0] * facts.grid[1]
            result.append(Projection(parts.out.weight, parts.heads, places=facts.places[:tokens]))
        return result
    assert isinstance(family, Family)
    names = ("attention.o_proj", "self_attn.out_proj", "attn.proj", "self_attention.out_proj")
    layers = [(name, child) for name, child in module.named_modules() if name.endswith(names)]
    return [Projection(child.weight, 4, "self_attention" in name) for name, child in layers]


def run(
    evaluate: Callable[[], Tensor],
    batch: int,
    blocks: Sequence[Projection],
    off: Sequence[set[tuple[int, int]]],
    replacement: str,
) -> Tensor:
    """Return the output of a plain run with heads replaced.

    Args:
        evaluate: a function that runs the model with gradients enabled; without them, nn.MultiheadAttention calls a
            single function instead of the linear one.
        batch: number of images.
        blocks: projection of every block.
        off: for each image, (layer, head) of the heads to replace.
        replacement: "mean" or "zero".
    """
    linear = torch.nn.functional.linear

    def replaced(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer, block in enumerate(blocks):
            if weight is block.weight:
                for head in range(block.heads):
                    images = [image for image in range(batch) if (layer, head) in off[image]]
                    inputs = block.replaced(inputs, batch, head, replacement, images)
        return linear(inputs, weight, bias)

    with mock.patch("torch.nn.functional.linear", replaced):
        return evaluate()


def importance(
    evaluate: Callable[[], Tensor], batch: int, blocks: Sequence[Projection], targets: Sequence[int], replacement: str
) -> Tensor:
    """Return the drop of each image's target without each head, (image, layer, head); NaN for missing heads."""
    original = run(evaluate, batch, blocks, [set()] * batch, replacement)
    heads = max(block.heads for block in blocks)
    drops = torch.full((batch, len(blocks), heads), torch.nan, dtype=torch.float64)
    for layer, block in enumerate(blocks):
        for head in range(block.heads):
            output = run(evaluate, batch, blocks, [{(layer, head)}] * batch, replacement)
            for image, target in enumerate(targets):
                drops[image, layer, head] = float(original[image, target]) - float(output[image, target])
    return drops
